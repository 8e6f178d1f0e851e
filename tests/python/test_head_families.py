"""`target_layers=None`: the column ``features`` is the input of the classification head, for many families.

Each model is traced twice, once through the call that finds the head and once through the hook that is left
there. What a plain hook on the module named in the tables saw is the truth; an untraced copy of the model
shows that nothing of the user's run has changed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from head_families import FAMILIES, Family
from head_nets import NETS, Cosine, Net, rows
from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import LayerNotFoundError
from ml_debugger.tracer.outputs import iterate_tensors
from ml_debugger.training import ClassificationTracer

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
MODES = ["train", "inference"]
CALLS = 2


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    """Training with gradients, evaluation without."""
    return request.param


@contextlib.contextmanager
def running(model: nn.Module, mode: str) -> Iterator[None]:
    model.train(mode == "train")
    with contextlib.nullcontext() if mode == "train" else torch.inference_mode():
        yield


def watch(model: nn.Module, path: str) -> tuple[list[torch.Tensor], RemovableHandle]:
    """What the module at ``path`` is given from now on."""
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(next(iterate_tensors((args, kwargs))).detach().clone())

    return seen, model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)


def call(model: Any, given: Any, *rest: Any) -> Any:
    """Call a model as the tracer does, or the tracer itself."""
    if rest:
        return model(given, *rest)
    return model(**given) if isinstance(given, dict) else model(given)


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # some models draw their masks from numpy


def flat(output: Any) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in iterate_tensors(output)]


def hooks(model: nn.Module) -> list[int]:
    return [len(inner._forward_hooks) + len(inner._forward_pre_hooks) for inner in model.modules()]


def trace_features(
    model: nn.Module, given: Any, head: str, mode: str, data_dir: Path, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Trace some calls beside an untraced copy; return the stored features and the true ones."""
    plain = copy.deepcopy(model)
    seen, watched = watch(model, head)
    config = TracerConfig(data_dir=data_dir, durability="process")
    with running(plain, mode), running(model, mode):
        with ClassificationTracer(model, "net", "v1", config=config) as tracer:
            for number in range(CALLS):
                ids = [f"{number}-{row}" for row in range(batch)]
                seed(number)
                expected = flat(call(plain, given))
                state = torch.get_rng_state()
                seed(number)
                output = flat(call(tracer, given, None, ids))
                assert torch.equal(torch.get_rng_state(), state)
                assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
    watched.remove()
    assert hooks(model) == hooks(plain)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    stored = open_trace("net", "v1", data_dir=data_dir).tensors("extracted_feature", columns=["features"])
    return stored["features"], torch.cat(seen)


def expect_features(
    model: nn.Module, given: Any, head: str, mode: str, data_dir: Path, shape: tuple[int, ...], batch: int
) -> None:
    stored, seen = trace_features(model, given, head, mode, data_dir, batch)
    assert stored.shape == (CALLS * batch, *shape)
    assert stored.dtype == seen.dtype
    assert torch.equal(stored, seen)


@needs_transformers
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_head_of_a_family_of_transformers_is_found(
    family: Family, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "seed", lambda: 7)  # Reformer draws a new seed in each call
    # What `transformers` warns about is not ours: it differs from release to release.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"transformers\..*")
        model, given = family.build(), family.batch()
        batch = len(next(iter(given.values())))
        expect_features(model, given, family.head, mode, tmp_path / "data", family.sample_shape, batch)


@pytest.mark.parametrize("net", [net for net in NETS if net.head is not None], ids=lambda net: net.name)
def test_head_of_a_net_is_found(net: Net, mode: str, tmp_path: Path) -> None:
    assert net.head is not None
    given = net.batch()
    expect_features(net.build(), given, net.head, mode, tmp_path / "data", net.sample_shape, len(given))


@pytest.mark.parametrize("net", [net for net in NETS if net.head is None], ids=lambda net: net.name)
def test_net_whose_features_no_module_is_given_says_what_to_pass(net: Net, mode: str, tmp_path: Path) -> None:
    model, given = net.build(), net.batch()
    before = hooks(model)
    config = TracerConfig(data_dir=tmp_path / "data")
    with running(model, mode), ClassificationTracer(model, "net", "v1", config=config) as tracer:
        with pytest.raises(LayerNotFoundError, match="target_layers") as caught:
            tracer(given, None, list(range(len(given))))
        assert hooks(model) == before
        assert tracer.stats().rows_submitted == 0
    # The module it proposes holds the features.
    proposed = re.search(r'target_layers=\{"features": "([^"]+)"\}', str(caught.value))
    assert proposed is not None
    assert isinstance(model.get_submodule(proposed[1]), nn.LayerNorm)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), Cosine())


def test_head_is_found_behind_wrappers(mode: str, tmp_path: Path) -> None:
    model = Wrapper(Wrapper(small_net()))
    expect_features(model, rows(), "module.module.2", mode, tmp_path / "data", (8,), len(rows()))


def test_head_is_found_with_one_sample(mode: str, tmp_path: Path) -> None:
    expect_features(small_net(), rows()[:1], "2", mode, tmp_path / "data", (8,), 1)


@pytest.mark.parametrize("model", ["cosine", "linear"])
def test_head_is_found_under_autocast_and_with_casts_cached_before(
    model: str, mode: str, tmp_path: Path
) -> None:
    net = small_net() if model == "cosine" else nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.autocast("cpu", torch.bfloat16):
        net(rows())
        stored, seen = trace_features(net, rows(), "2", mode, tmp_path / "data", len(rows()))
    assert torch.equal(stored, seen)
    assert stored.dtype == torch.bfloat16


def test_head_is_found_under_no_grad_in_train_mode(tmp_path: Path) -> None:
    with torch.no_grad():
        expect_features(small_net(), rows(), "2", "train", tmp_path / "data", (8,), len(rows()))


def test_head_is_found_in_a_checkpointed_body(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.net = small_net()
            self.reentrant = reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            made: torch.Tensor = checkpoint(self.net, x, use_reentrant=self.reentrant)
            return made

    for number, reentrant in enumerate((True, False)):
        folder = tmp_path / str(number)
        expect_features(Checkpointed(reentrant), rows(), "net.2", "train", folder, (8,), len(rows()))


def test_compiled_model_is_watched_as_it_is_written(tmp_path: Path) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    seen, _ = watch(net, "2")
    config = TracerConfig(data_dir=tmp_path / "data")
    with ClassificationTracer(torch.compile(net, backend="eager"), "net", "v1", config=config) as tracer:
        tracer(rows(), None, range(len(rows())))
    stored = open_trace("net", "v1", data_dir=tmp_path / "data").tensors("extracted_feature")["features"]
    assert torch.equal(stored, torch.cat(seen))
    torch._dynamo.reset()


def test_every_run_of_a_head_is_kept_in_the_call_that_finds_it(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.fc = nn.GRUCell(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state, steps = None, []
            for _ in range(11):
                state = self.cell(x, state)
                steps.append(self.fc(state))
            return torch.stack(steps, 1)

    config = TracerConfig(data_dir=tmp_path / "data", repeat="all")
    model, given = Steps(), rows()
    seen, _ = watch(model, "fc")
    with ClassificationTracer(model, "net", "v1", config=config) as tracer:
        for number in range(CALLS):
            tracer(given, None, [f"{number}-{row}" for row in range(len(given))])
    stored = open_trace("net", "v1", data_dir=tmp_path / "data").tensors("extracted_feature")
    for step in range(11):
        column = stored["features" if step == 0 else f"features.{step}"]
        assert torch.equal(column, torch.cat([seen[step], seen[step + 11]]))


def test_head_that_sees_tokens_of_all_samples_in_one_row_names_the_remedy(tmp_path: Path) -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.reshape(-1, 6)).view(len(x), -1, 3).mean(1)

    config = TracerConfig(data_dir=tmp_path / "data")
    with ClassificationTracer(Flattened(), "net", "v1", config=config) as tracer:
        with pytest.raises(LayerNotFoundError, match=r"'fc'.*\(8, 6\).*target_layers"):
            tracer(torch.randn(4, 2, 6), None, range(4))


def test_sequence_first_head_is_recorded_with_batch_dim(tmp_path: Path) -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.transpose(0, 1)).mean(0)

    config = TracerConfig(data_dir=tmp_path / "data", batch_dim={"features": 1})
    given = torch.randn(4, 2, 6)
    with ClassificationTracer(SequenceFirst(), "net", "v1", config=config) as tracer:
        tracer(given, None, range(4))
    stored = open_trace("net", "v1", data_dir=tmp_path / "data").tensors("extracted_feature")["features"]
    assert torch.equal(stored, given)


def test_table_has_forty_families_and_the_usual_nets() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 40
    assert len({net.name for net in NETS}) == len(NETS)
