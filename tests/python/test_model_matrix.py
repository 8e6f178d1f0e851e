"""Every model in every mode under every wrapper: recorded right, and trained as without a tracer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import model_support
from matrix_models import NEEDS_TRANSFORMERS
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer
from model_matrix import ALL_CELLS, SAME, SAME_GRAPH, TORCH_REFUSES, Cell, is_quick, try_cell
from model_support import UNKNOWN

pytestmark = [
    pytest.mark.usefixtures("data_dir", "inductor_cache"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # What torch says of code of its own, such as DDP's.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = ALL_CELLS if metafunc.config.getoption("--matrix") else list(filter(is_quick, ALL_CELLS))
        metafunc.parametrize("cell", cells, ids=str)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make(model: nn.Module, layers: dict[str, str]) -> ClassificationTracer:
    config = TracerConfig(durability="process", repeat="all")
    return ClassificationTracer(model, "net", "v1", layers, config=config)


@pytest.fixture(scope="module")
def committed() -> dict[Cell, str]:
    """What docs/model_support.md says."""
    return model_support.read()


def test_a_model_is_recorded_right_and_trained_as_without_a_tracer(
    cell: Cell, committed: dict[Cell, str], request: pytest.FixtureRequest
) -> None:
    if cell.model in NEEDS_TRANSFORMERS:
        pytest.importorskip("transformers")
    if cell.wrapper in ("ddp", "fsdp2"):
        request.getfixturevalue("process_group")
    found = try_cell(cell, make)
    if request.config.getoption("--matrix") == "write":
        model_support.write({cell: found})
    else:
        assert found == committed[cell] or committed[cell] == UNKNOWN, (
            "the page says otherwise: run make matrix"
        )


def test_the_page_says_something_of_every_cell_in_the_form_that_is_generated() -> None:
    cells = model_support.read()
    assert {cells[cell] for cell in ALL_CELLS if is_quick(cell)} <= {SAME, SAME_GRAPH, TORCH_REFUSES}
    assert set(cells.values()) <= {SAME, SAME_GRAPH, TORCH_REFUSES, UNKNOWN}
    assert model_support.generated_part() == model_support.render(cells)
