"""Layers that run several times, are shared, or do not know their shapes yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import AliasNotCapturedError, ArchitectureMismatchError, NotFoundError
from ml_debugger.tracer.fingerprint import fingerprint
from ml_debugger.training import ClassificationTracer

BATCH = 8
IDS = list(range(BATCH))
HALF = [2, 4, 6]  # of these ids, what sample_fraction=0.5 keeps

pytestmark = pytest.mark.usefixtures("data_dir")


class Loop(nn.Module):
    """``layer`` runs as often as the call says; what it returned each time is in ``runs``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, times: int = 3) -> torch.Tensor:
        self.runs = []
        for _ in range(times):
            x = self.layer(x)
            self.runs.append(x.detach().clone())
            x = self.act(x)
        return self.head(x)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, 4)


@pytest.fixture
def trace() -> Iterator[Callable[..., ClassificationTracer]]:
    """Makes tracers of the trace ("net", "v1") and closes them."""
    made = []

    def factory(model: nn.Module, layers: Mapping[str, str], **options: Any) -> ClassificationTracer:
        config = TracerConfig(durability="process", **options)
        made.append(ClassificationTracer(model, "net", "v1", layers, config=config))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def stored(tracer: ClassificationTracer) -> dict[str, Any]:
    tracer.flush()
    return open_trace("net", "v1").tensors("extracted_feature")


def equal(stored_columns: dict[str, Any], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(stored_columns[name], values) for name, values in expected.items())


# Repeats


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_all_runs_are_columns_of_their_own_in_order(
    times: int, fraction: float, trace: Any, x: torch.Tensor
) -> None:
    model = Loop()
    tracer = trace(model, {"hidden": "layer", "other": "head"}, repeat="all", sample_fraction=fraction)
    tracer((x, times), None, IDS)
    kept = IDS if fraction == 1.0 else HALF
    expected = {f"hidden.{run}" if run else "hidden": values[kept] for run, values in enumerate(model.runs)}
    found = stored(tracer)
    assert equal(found, expected)
    assert sorted(name for name in found if name.startswith("hidden")) == sorted(expected)
    assert all(torch.equal(tracer.get_hooked_features(name), values) for name, values in expected.items())
    with pytest.raises(NotFoundError):
        tracer.get_hooked_features(f"hidden.{times}")


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_last_run_counts_however_many_there_are(fraction: float, trace: Any, x: torch.Tensor) -> None:
    model = Loop()
    tracer = trace(model, {"hidden": "layer"}, sample_fraction=fraction)
    kept = IDS if fraction == 1.0 else HALF
    expected = []
    for times in (3, 1, 4):
        tracer((x, times), None, IDS)
        expected.append(model.runs[-1][kept])
        assert torch.equal(tracer.get_hooked_features("hidden"), expected[-1])
    assert torch.equal(stored(tracer)["hidden"], torch.cat(expected))
    assert "hidden.1" not in stored(tracer)


def test_another_number_of_runs_is_an_error_of_that_call_alone(trace: Any, x: torch.Tensor) -> None:
    model = Loop()
    tracer = trace(model, {"hidden": "layer"}, repeat="all")
    tracer((x, 2), torch.zeros(BATCH), IDS)
    for times in (1, 3):
        with pytest.raises(AliasNotCapturedError, match=rf"'hidden' ran {times} times.* 2 before") as caught:
            tracer((x, times), torch.zeros(BATCH), IDS)
        assert 'repeat="last"' in caught.value.hint
    with pytest.raises(AliasNotCapturedError, match="did not run"):
        tracer((x, 0), None, IDS)
    tracer((x, 2), torch.zeros(BATCH), IDS)
    assert tracer.stats().rows_submitted == 2 * BATCH
    assert len(stored(tracer)["hidden.1"]) == 2 * BATCH
    assert open_trace("net", "v1").num_rows("ground_truth") == 2 * BATCH


def test_a_refused_first_call_does_not_decide_how_many_runs_there_are(trace: Any, x: torch.Tensor) -> None:
    class Late(Loop):
        def forward(self, x: torch.Tensor, times: int = 3) -> torch.Tensor:
            output = super().forward(x, times)
            return output[1:] if times == 3 else output

    tracer = trace(Late(), {"hidden": "layer"}, repeat="all")
    with pytest.raises(ValueError, match="the model returned"):
        tracer((x, 3), None, IDS)
    tracer((x, 2), None, IDS)
    assert len(stored(tracer)["hidden.1"]) == BATCH


def test_a_new_tracer_may_meet_another_number_of_runs(trace: Any, x: torch.Tensor) -> None:
    model = Loop()
    for times in (2, 1):
        tracer = trace(model, {"hidden": "layer"}, repeat="all")
        tracer((x, times), None, [f"{times}-{number}" for number in IDS], n_epoch=times)
        tracer.close()
    trace_now = open_trace("net", "v1")
    assert trace_now.tensors("extracted_feature", n_epoch=2)["hidden.1"].shape == (BATCH, 4)
    assert "hidden" in trace_now.tensors("extracted_feature", n_epoch=1)
    assert len(trace_now.tensors("extracted_feature")["hidden"]) == 2 * BATCH


def test_runs_may_differ_in_shape_and_dtype(trace: Any) -> None:
    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool1d(2)
            self.tap = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs = [self.tap(x)]
            for dtype in (torch.float64, torch.bfloat16):
                x = self.pool(x)
                self.runs.append(self.tap(x.to(dtype)))
            return x[:, 0]

    model = Shrinking()
    tracer = trace(model, {"tap": "tap"}, repeat="all")
    tracer(torch.randn(BATCH, 2, 12), None, IDS)
    found = stored(tracer)
    for name, values in zip(("tap", "tap.1", "tap.2"), model.runs, strict=True):
        assert found[name].dtype is values.dtype
        assert torch.equal(found[name], values)


def test_repeats_with_a_path_a_reduction_and_a_cast(trace: Any, x: torch.Tensor) -> None:
    class Pairs(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Identity()

        def forward(self, x: torch.Tensor, times: int = 3) -> torch.Tensor:
            output = super().forward(x, times)
            for run in self.runs:
                self.pair((None, {"value": run}))
            return output

    model = Pairs()
    options = {"repeat": "all", "reduce": {"pair": lambda t: t.amax(1)}, "capture_dtype": "bfloat16"}
    tracer = trace(model, {"pair": 'pair[1]["value"]'}, **options)
    tracer((x, 2), None, IDS)
    first, second = (run.amax(1).bfloat16() for run in model.runs)
    assert equal(stored(tracer), {"pair": first, "pair.1": second})


# Shared modules


class Shared(nn.Module):
    """One module registered under three names, and another that shares its weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.blocks = nn.ModuleList([self.first, nn.Linear(4, 4)])
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs = [self.first(x)]
        self.runs.append(self.second(self.runs[0]))
        self.tied_out = self.tied(self.runs[1])
        return self.head(self.blocks[1](self.tied_out))


@pytest.mark.parametrize("path", ["first", "second", "blocks.0"])
def test_a_module_under_several_names_is_one_layer_that_runs_several_times(
    path: str, trace: Any, x: torch.Tensor
) -> None:
    model = Shared()
    tracer = trace(model, {"shared": path, "tied": "tied"}, repeat="all")
    tracer(x, None, IDS)
    expected = {"shared": model.runs[0], "shared.1": model.runs[1], "tied": model.tied_out}
    assert equal(stored(tracer), expected)
    assert "tied.1" not in stored(tracer)


def test_two_aliases_of_one_shared_module_hold_the_same(trace: Any, x: torch.Tensor) -> None:
    model = Shared()
    tracer = trace(model, {"a": "first", "b": "second"})
    tracer(x, None, IDS)
    assert equal(stored(tracer), {"a": model.runs[1], "b": model.runs[1]})


def test_a_shared_module_has_another_fingerprint_than_two_of_a_kind_of_another_width() -> None:
    other = Shared()
    assert fingerprint(Shared()) == fingerprint(other)
    other.blocks[1] = nn.Linear(4, 4, bias=False)
    assert fingerprint(Shared()) != fingerprint(other)


# Lazy modules


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv1d(5, 1)
        self.norm = nn.LazyBatchNorm1d()
        self.head = nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.norm(self.conv(x)).flatten(1)
        return self.head(self.seen)


@pytest.mark.parametrize("layers", [{"conv": "conv", "norm": "norm"}, None], ids=["layers", "head"])
def test_lazy_modules_are_traced_before_they_know_their_shapes(layers: Any, trace: Any) -> None:
    model = Lazy()
    tracer = ClassificationTracer(model, "net", "v1") if layers is None else trace(model, layers)
    with tracer:
        for epoch in range(2):
            images = torch.randn(BATCH, 2, 3)
            tracer(images, None, IDS, n_epoch=epoch)
        assert type(model.conv) is nn.Conv1d
        tracer.flush()
        found = open_trace("net", "v1").tensors("extracted_feature", n_epoch=1)
        if layers is None:
            assert torch.equal(found["features"], model.seen)
        else:
            assert equal(found, {"conv": model.conv(images), "norm": model.seen.reshape(BATCH, 5, 3)})


def test_a_lazy_model_is_known_again_in_the_state_in_which_it_was_traced(trace: Any) -> None:
    images = torch.randn(BATCH, 2, 3)
    for _ in range(2):  # the same script twice
        model = Lazy()
        tracer = trace(model, {"conv": "conv"})
        tracer(images, None, IDS)
        tracer.close()
    with pytest.raises(ArchitectureMismatchError):  # shapes are part of the architecture
        trace(model, {"conv": "conv"})
    assert open_trace("net", "v1").num_rows("extracted_feature") == 2 * BATCH
