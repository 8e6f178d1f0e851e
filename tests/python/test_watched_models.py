"""Traced models that are copied, saved, or watched by others: each goes as without a tracer."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ml_debugger import open_trace
from plain_net import BATCH, IDS, Net, rows, stored

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, 4)


# Copies


@pytest.mark.parametrize("layers", [{"hidden": "body"}, None], ids=["layers", "head"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "averaged"])
def test_a_copy_computes_the_same_and_records_nothing_even_within_a_call(
    how: str, layers: Any, trace: Any, x: torch.Tensor
) -> None:
    class Student(Net):
        teacher: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.teacher:
                self.teacher[0](2 * x)
            return super().forward(x)

    model = Student().eval()
    tracer = trace(model, layers)
    tracer(x, None, IDS)  # hooks of the head are there from now on
    if how == "pickle":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "Student", Student, raising=False)
            Student.__qualname__ = "Student"
            twin = pickle.loads(pickle.dumps(model))
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else AveragedModel(model)
    model.teacher = [twin]
    assert torch.equal(tracer(x, None, IDS), twin(x))
    found = stored(tracer)
    column = found["hidden" if layers else "features"]
    expected = model.body(x)
    assert torch.equal(column, torch.cat([expected, expected] if layers else [expected.relu()] * 2))


def test_a_saved_model_loads_and_runs_where_the_package_is_not_installed(
    trace: Any, x: torch.Tensor, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU()), nn.Linear(6, 3))
    tracer = trace(model, None)
    hooked = trace(model, {"hidden": "1", "all": ""}, "layers")
    tracer(x, None, IDS)
    hooked(x, None, IDS)
    torch.save({"model": model, "x": x, "expected": model(x)}, tmp_path / "model.pt")
    script = f"""
        import sys
        sys.modules["ml_debugger"] = None  # any import of it fails
        import torch
        saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(saved["model"](saved["x"]), saved["expected"])
        assert "ml_debugger._core" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_state_dicts_of_a_traced_model_load_as_weights_only(trace: Any, x: torch.Tensor) -> None:
    model = Net()
    keys = list(model.state_dict())
    tracer = trace(model, {"hidden": "body"})
    tracer(x, None, IDS)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert list(loaded) == keys
    Net().load_state_dict(loaded)


# Other watchers


def test_two_tracers_on_one_model_record_their_own_and_close_alone(trace: Any, x: torch.Tensor) -> None:
    model = Net().eval()
    first, second = trace(model, {"hidden": "body"}, "first"), trace(model, {"hidden": "act"}, "second")
    first(x, None, IDS)
    second(x, None, [10 + number for number in IDS])
    assert torch.equal(stored(first, "first")["hidden"], model.body(x))
    assert torch.equal(stored(second, "second")["hidden"], model.body(x).relu())
    second.close()
    first(x, None, IDS)
    assert rows(first, "first") == 2 * BATCH
    assert open_trace("net", "second").num_rows("extracted_feature") == BATCH
    first.close()
    assert not any(module._forward_hooks for module in model.modules())


def watch(model: nn.Module, log: list[Any]) -> None:
    """Hooks of every kind that torch has, in a certain order, each leaving a line in ``log``."""

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: log.append((name, len(arguments)))

    for path, module in (("body", model.body), ("act", model.act), ("head", model.head), ("net", model)):
        module.register_forward_pre_hook(note(f"{path} pre"))
        module.register_forward_pre_hook(note(f"{path} pre kwargs"), with_kwargs=True)
        module.register_forward_pre_hook(note(f"{path} pre first"), prepend=True)
        module.register_forward_hook(note(f"{path} post"))
        module.register_forward_hook(note(f"{path} post kwargs"), with_kwargs=True)
        module.register_forward_hook(note(f"{path} post always"), always_call=True)
        module.register_forward_hook(note(f"{path} post first"), prepend=True)
        if path != "act":  # backward hooks and in-place operations do not go together
            module.register_full_backward_pre_hook(note(f"{path} backward pre"))
            module.register_full_backward_hook(note(f"{path} backward"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "layers", [{"a": "body", "b": "act", "c": "head", "d": ""}, None], ids=["layers", "head"]
)
def test_hooks_of_others_fire_in_their_order_and_number(
    layers: Any, when: str, trace: Any, x: torch.Tensor
) -> None:
    def run(traced: bool) -> tuple[list[Any], list[torch.Tensor]]:
        torch.manual_seed(1)
        model, log = Net(), []
        model.act = nn.ReLU()
        given = x.clone().requires_grad_()
        if when == "before":
            watch(model, log)
        tracer = trace(model, layers, when) if traced else None
        if when == "after":
            watch(model, log)
        for _ in range(2):
            output = model(given) if tracer is None else tracer(given, None, IDS)
            output.sum().backward()
        if tracer is not None:
            tracer.close()
        model(given)  # others stay when ours are gone
        return log, [given.grad, *(parameter.grad for parameter in model.parameters())]

    (log, gradients), (plain_log, plain_gradients) = run(True), run(False)
    assert log == plain_log
    assert all(map(torch.equal, gradients, plain_gradients))
    assert len(log) == 3 * 4 * 7 + 2 * 3 * 2


def test_always_called_hooks_run_when_the_forward_raises_and_ours_stores_nothing(
    trace: Any, x: torch.Tensor
) -> None:
    class Failing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise LookupError("the user's own")

    model, log = Failing(), []
    model.register_forward_hook(lambda module, args, output: log.append(output), always_call=True)
    tracer = trace(model, {"hidden": "body", "all": ""})
    with pytest.raises(LookupError, match="the user's own"):
        tracer(x, None, IDS)
    assert log == [None]
    assert rows(tracer) == 0


def test_a_layer_called_with_keywords_is_recorded(trace: Any, x: torch.Tensor) -> None:
    class Scale(nn.Module):
        def forward(self, *, values: torch.Tensor, factor: float) -> torch.Tensor:
            return values * factor

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.scale(values=x, factor=0.5))

    tracer = trace(Model(), {"scaled": "scale"})
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["scaled"], x * 0.5)


def test_a_hook_that_replaces_the_output_before_ours_is_part_of_what_the_layer_returned(
    trace: Any, x: torch.Tensor
) -> None:
    model = Net().eval()
    plain = model.body(x).detach()
    model.body.register_forward_hook(lambda module, args, output: output + 1)
    tracer = trace(model, {"hidden": "body", "next": "act"})
    model.body.register_forward_hook(lambda module, args, output: output * 2)
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["hidden"], plain + 1)
    assert torch.equal(stored(tracer)["next"], ((plain + 1) * 2).relu())
