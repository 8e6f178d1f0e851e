"""`tracer.recording(...)`: the forward that the user's own code runs is a call like any other."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import (
    AliasNotCapturedError,
    DiskBudgetError,
    InvalidInputError,
    LayerNotFoundError,
    TracerClosedError,
)
from ml_debugger.training import ClassificationTracer

IDS = ["a", "b", "c", "d"]
LABELS = torch.tensor([0, 1, 2, 0])


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def make_tracer(model: nn.Module, layers: Any = None, **options: Any) -> ClassificationTracer:
    return ClassificationTracer(model, "m", "v", {"hidden": "1"} if layers is None else layers, **options)


def rows(data_dir: Path, table: str = "extracted_feature", **options: Any) -> dict[str, Any]:
    return open_trace("m", "v", data_dir=data_dir).arrays(table, **options)


def test_a_recorded_forward_stores_what_a_call_stores(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    fields = [{"name": "camera", "type": "str"}]
    with make_tracer(model, additional_fields=fields) as tracer:
        tracer(inputs, LABELS, IDS, "train", 0, camera="front")
        with tracer.recording(LABELS, IDS, "train", 1, camera="front"):
            output = model(inputs)
        assert torch.equal(tracer.get_hooked_features("hidden"), model[:2](inputs))
        assert tracer.stats().rows_submitted == 8
    for table in ("extracted_feature", "ground_truth"):
        called, recorded = (rows(data_dir, table, n_epoch=epoch) for epoch in (0, 1))
        assert list(called) == list(recorded)
        for column in set(called) - {"row_id", "n_epoch"}:
            assert np.array_equal(called[column], recorded[column]), column
    assert np.array_equal(recorded["label"], LABELS.numpy())
    assert np.array_equal(rows(data_dir, n_epoch=1)["logits"], output.detach().numpy())


def test_training_is_bit_for_bit_the_same_inside(data_dir: Path) -> None:
    def train(recorded: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracer = ClassificationTracer(model, "m", "v") if recorded else None
        for step in range(3):
            inputs = torch.randn(4, 5)
            optimizer.zero_grad()
            if tracer is None:
                nn.functional.cross_entropy(model(inputs), LABELS).backward()
            else:
                with tracer.recording(LABELS, IDS, "train", step):
                    nn.functional.cross_entropy(model(inputs), LABELS).backward()
            optimizer.step()
        if tracer is not None:
            tracer.close()
        return [*model.state_dict().values(), torch.get_rng_state()]

    plain, traced = train(False), train(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, traced, strict=True))
    assert rows(data_dir)["features"].shape == (12, 6)


@pytest.mark.parametrize("make", [make_model, lambda: nn.Linear(5, 3)], ids=["sequential", "head alone"])
def test_head_is_found_in_a_recorded_forward(data_dir: Path, make: Any) -> None:
    model, inputs = make(), torch.randn(4, 5)
    seen: list[torch.Tensor] = []
    head = model if isinstance(model, nn.Linear) else model[2]
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    with ClassificationTracer(model, "m", "v") as tracer:
        for _ in range(2):
            with tracer.recording(LABELS, IDS, "train"):
                model(inputs)
    assert np.array_equal(rows(data_dir)["features"], torch.cat(seen).numpy())


def test_head_search_survives_a_forward_that_fails(data_dir: Path) -> None:
    model = make_model()
    with ClassificationTracer(model, "m", "v") as tracer:
        with pytest.raises(RuntimeError, match="mat1 and mat2"), tracer.recording(LABELS, IDS):
            model(torch.randn(4, 7))
        assert torch.overrides._get_current_function_mode() is None
        with tracer.recording(LABELS, IDS):
            model(torch.randn(4, 5))
    assert rows(data_dir)["features"].shape == (4, 6)


def test_no_head_is_an_error_of_the_forward(data_dir: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.cumsum(1)

    model = Sum()
    with ClassificationTracer(model, "m", "v") as tracer:
        for _ in range(2):
            with pytest.raises(LayerNotFoundError), tracer.recording(LABELS, IDS):
                model(torch.randn(4, 5))
        assert tracer.stats().rows_submitted == 0


def test_nothing_is_recorded_outside_of_the_block(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer:
        with tracer.recording(None, IDS, "probe"):
            model(inputs)
        model(inputs)
        tracer(inputs, None, IDS, "call")
        model(inputs)
        assert tracer.stats().rows_submitted == 8


def test_a_block_without_a_forward_is_an_error_and_stores_nothing(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer:
        with pytest.raises(AliasNotCapturedError, match="did not run inside of recording"):
            with tracer.recording(LABELS, IDS):
                model.forward(inputs)  # calls no hooks
        with pytest.raises(AliasNotCapturedError, match="did not run"):
            with tracer.recording(LABELS, IDS):
                model[0](inputs)
        assert tracer.stats().rows_submitted == 0


def test_a_second_forward_in_the_block_is_an_error_and_the_first_is_stored(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer:
        with pytest.raises(InvalidInputError, match="a second time"), tracer.recording(LABELS, IDS):
            model(inputs)
            model(inputs + 1)
        assert tracer.stats().rows_submitted == 4
    assert np.array_equal(rows(data_dir)["hidden"], model[:2](inputs).detach().numpy())


def test_exceptions_pass_unchanged_and_only_a_finished_forward_is_stored(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)

    class OwnError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise OwnError

    with make_tracer(model) as tracer:
        with pytest.raises(OwnError), tracer.recording(LABELS, IDS, "before the forward"):
            raise OwnError
        handle = model[2].register_forward_hook(fail)
        with pytest.raises(OwnError), tracer.recording(LABELS, IDS, "in the forward"):
            model(inputs)
        handle.remove()
        with pytest.raises(OwnError), tracer.recording(LABELS, IDS, "after the forward"):
            model(inputs)
            raise OwnError
        assert tracer.stats().rows_submitted == 4
    assert set(rows(data_dir)["dataset_type"]) == {"after the forward"}


def test_a_forward_that_raised_may_be_tried_again(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer, tracer.recording(LABELS, IDS):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(4, 7))
        model(inputs)
    assert np.array_equal(rows(data_dir)["hidden"], model[:2](inputs).detach().numpy())


def test_bad_input_is_refused_at_the_block_and_by_the_models_call(data_dir: Path) -> None:
    model = make_model()
    with make_tracer(model) as tracer:
        with pytest.raises(InvalidInputError, match="ground_truth must have shape"):
            with tracer.recording(LABELS[:3], IDS):
                pytest.fail("the block must not run")
        with pytest.raises(InvalidInputError, match="unknown keyword 'camera'"):
            with tracer.recording(LABELS, IDS, camera="front"):
                pytest.fail("the block must not run")
        with tracer.recording(LABELS, IDS) as recording:
            with pytest.raises(InvalidInputError, match="expected 4 samples"):
                model(torch.randn(5, 5))
            assert not recording.is_saved
            model(torch.randn(4, 5))
            assert recording.is_saved
        with tracer.recording(LABELS, IDS):
            with pytest.raises(InvalidInputError, match=r"in a recording\(\) of this tracer already"):
                with tracer.recording(LABELS, IDS):
                    pytest.fail("the block must not run")
            model(torch.randn(4, 5))
        assert tracer.stats().rows_submitted == 8
    with pytest.raises(TracerClosedError), tracer.recording(LABELS, IDS):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_backward_is_no_second_forward(data_dir: Path, reentrant: bool) -> None:
    model, inputs = make_model(), torch.randn(4, 5, requires_grad=True)
    with make_tracer(model) as tracer, tracer.recording(LABELS, IDS):
        checkpoint(model, inputs, use_reentrant=reentrant).sum().backward()
    assert rows(data_dir)["hidden"].shape == (4, 6)
    assert inputs.grad is not None


def test_forwards_of_other_threads_are_not_recorded(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer, tracer.recording(LABELS, IDS):
        thread = threading.Thread(target=model, args=(torch.randn(9, 5),))
        thread.start()
        thread.join()
        model(inputs)
    assert np.array_equal(rows(data_dir)["hidden"], model[:2](inputs).detach().numpy())


@pytest.mark.parametrize("layers", [{"hidden": "1"}, None], ids=["named", "head"])
def test_a_call_of_the_tracer_inside_is_its_own(data_dir: Path, layers: Any) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with ClassificationTracer(model, "m", "v", layers) as tracer:
        with tracer.recording(LABELS, IDS, "block"):
            tracer(inputs, None, ["x"] * 4, "before")
            model(inputs)
            tracer(inputs, None, ["x"] * 4, "after")
    kinds = ["before"] * 4 + ["block"] * 4 + ["after"] * 4
    assert rows(data_dir)["dataset_type"].tolist() == kinds


def test_first_calls_of_two_threads_do_not_wait_for_each_other_for_ever(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    inside, called = threading.Event(), threading.Event()

    def call(tracer: ClassificationTracer) -> None:
        inside.wait(10)
        tracer(inputs, None, ["x"] * 4, "call")
        called.set()

    with ClassificationTracer(model, "m", "v") as tracer:
        thread = threading.Thread(target=call, args=(tracer,))
        thread.start()
        with tracer.recording(LABELS, IDS, "block"):
            inside.set()
            with pytest.raises(RuntimeError, match="mat1 and mat2"):
                model(torch.randn(4, 7))
            model(inputs)
            assert called.wait(10)  # the search is over, the block is not
        thread.join()
        assert tracer.stats().rows_submitted == 8


def test_a_storage_that_refuses_the_first_try_may_take_the_second(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer, tracer.recording(LABELS, IDS):
        with monkeypatch.context() as patch:
            full = DiskBudgetError("full", "drop an epoch")
            patch.setattr(tracer._recorder, "core", _Refusing(tracer._recorder.core, full))
            with pytest.raises(DiskBudgetError):
                model(inputs)
        model(inputs)
    assert rows(data_dir)["hidden"].shape == (4, 6)


class _Refusing:
    """A recorder that takes no end of a call."""

    def __init__(self, recorder: Any, error: Exception) -> None:
        self._recorder, self._error = recorder, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def end_call(self, *_: Any) -> bool:
        raise self._error


def test_export_and_script_meet_the_hooks_as_those_of_layers(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer:
        with tracer.recording(LABELS, IDS):
            model(inputs)
        program = torch.export.export(model, (inputs,), strict=True)
        assert torch.equal(program.module()(inputs), model(inputs))
        assert not any("ml_debugger" in str(node.target) for node in program.graph.nodes)
        with pytest.raises(InvalidInputError, match="cannot take in the hook of a tracer"):
            torch.jit.script(model)
        assert tracer.stats().rows_submitted == 4


def test_copies_of_the_model_carry_hooks_that_do_nothing(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model) as tracer:
        with tracer.recording(LABELS, IDS):
            model(inputs)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        with tracer.recording(LABELS, IDS):
            for other in copies:
                assert torch.equal(other(inputs), model[2](model[1](model[0](inputs))))
            model(inputs)
        assert tracer.stats().rows_submitted == 8
        hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
        assert hooks == 2
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_mixed_precision_stores_the_dtype_of_the_forward(data_dir: Path) -> None:
    model = make_model()
    with make_tracer(model) as tracer, tracer.recording(LABELS, IDS):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(4, 5))
    stored = open_trace("m", "v", data_dir=data_dir).tensors("extracted_feature")
    assert stored["hidden"].dtype == stored["logits"].dtype == torch.bfloat16
    assert torch.equal(stored["logits"], output)


def test_what_is_left_out_on_purpose_is_left_out(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(4, 5)
    with make_tracer(model, config=TracerConfig(every_n_calls=2)) as tracer:
        for step in range(3):
            with tracer.recording(LABELS, IDS, "train", step):
                model(inputs)
        with tracer.recording(LABELS[:0], [], "train", 9):  # an empty batch
            model(inputs[:0])
    assert open_trace("m", "v", data_dir=data_dir).epochs == [0, 2]
    with ClassificationTracer(model, "m", "other", config=TracerConfig(mode="disabled")) as tracer:
        with tracer.recording(LABELS, IDS):
            model(inputs)
        assert not model._forward_hooks


def test_sample_fraction_keeps_the_same_samples_as_calls(data_dir: Path) -> None:
    model, inputs = make_model(), torch.randn(64, 5)
    with make_tracer(model, config=TracerConfig(sample_fraction=0.5)) as tracer:
        tracer(inputs, None, range(64), "train", 0)
        with tracer.recording(None, range(64), "train", 1):
            model(inputs)
    called, recorded = (rows(data_dir, n_epoch=epoch) for epoch in (0, 1))
    assert 0 < len(called["hidden"]) < 64
    assert called["input_id"].tolist() == recorded["input_id"].tolist()
    assert np.array_equal(called["hidden"], recorded["hidden"])


def test_subclass_sees_what_the_model_was_called_with(data_dir: Path) -> None:
    seen: list[Any] = []

    class Own(ClassificationTracer):
        def _parse_and_save_io_data(self, model_input: Any, *rest: Any, **kwargs: Any) -> None:
            seen.append(model_input)
            super()._parse_and_save_io_data(model_input, *rest, **kwargs)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, inputs: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.linear(inputs) * scale

    model, inputs = Scaled(), torch.randn(4, 5)
    with Own(model, "m", "v", {"linear": "linear"}) as tracer:
        for call in (
            lambda: model(inputs),
            lambda: model(inputs, 2.0),
            lambda: model(inputs=inputs),
            lambda: model(inputs, scale=2.0),
        ):
            with tracer.recording(LABELS, IDS):
                call()
    assert seen[0] is inputs
    assert seen[1] == (inputs, 2.0)
    assert seen[2] == {"inputs": inputs}
    assert seen[3] == (inputs, {"scale": 2.0})


# The compiler hides this one by a filter of its own, at each break of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("inductor_cache")
@pytest.mark.parametrize("layers", [{"hidden": "1"}, None], ids=["named", "head"])
@pytest.mark.parametrize("how", ["wrapper is the model", "compiled in place", "compiled around"])
def test_compiled_models_are_recorded(data_dir: Path, how: str, layers: Any) -> None:
    plain, inputs = make_model(), torch.randn(4, 5)
    traced: Any = plain
    if how == "wrapper is the model":
        traced = torch.compile(plain, backend="aot_eager")
    elif how == "compiled in place":
        plain.compile(backend="aot_eager")
    with ClassificationTracer(traced, "m", "v", layers) as tracer:
        run = torch.compile(plain, backend="aot_eager") if how == "compiled around" else traced
        for step in range(3):
            with tracer.recording(LABELS, IDS, "train", step):
                output = run(inputs + step)
        column = "features" if layers is None else "hidden"
        assert torch.allclose(tracer.get_hooked_features(column), plain[1](plain[0](inputs + 2)))
        assert tracer.stats().rows_submitted == 12
    assert np.allclose(rows(data_dir, n_epoch=2)["logits"], output.detach().numpy())
