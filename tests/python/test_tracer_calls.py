"""What a call of the tracer records, refuses, and leaves alone in the user's run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import (
    AliasNotCapturedError,
    ArchitectureMismatchError,
    InvalidInputError,
    LayerNotFoundError,
    NotFoundError,
    TracerClosedError,
)
from ml_debugger.training import ClassificationTorchTracer, ClassificationTracer, TrainingTracer

BATCH = 4
IDS = [f"sample-{number}" for number in range(BATCH)]
LABELS = torch.arange(BATCH) % 3


class Net(nn.Module):
    """A body, an optional detour, a head whose input is overwritten in place afterwards."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.body = nn.Linear(6, width)
        self.act = nn.ReLU(inplace=True)
        self.detour = nn.Linear(width, width)
        self.fc = nn.Linear(width, 3)
        self.repeats = 0

    def forward(self, x: torch.Tensor, repeats: int | None = None) -> torch.Tensor:
        x = self.act(self.body(x))
        for _ in range(self.repeats if repeats is None else repeats):
            x = self.detour(x)
        logits = self.fc(x)
        if not torch.is_grad_enabled():
            x.fill_(7)
        return logits


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(BATCH, 6)


@pytest.fixture
def make(data_dir: Path) -> Iterator[Any]:
    """Makes tracers of the trace ("net", "v1") and closes them."""
    made = []

    def factory(model: nn.Module, target_layers: Any = None, **arguments: Any) -> ClassificationTracer:
        config = TracerConfig(**arguments.pop("options", {}))
        cls = arguments.pop("cls", ClassificationTracer)
        made.append(cls(model, "net", "v1", target_layers, config=config, **arguments))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def stored(column: str, table: str = "extracted_feature") -> Any:
    return open_trace("net", "v1").tensors(table)[column]


def rows() -> int:
    return open_trace("net", "v1").num_rows("extracted_feature")


def test_features_of_the_head_are_recorded_from_the_first_call_on(make: Any, inputs: torch.Tensor) -> None:
    model = Net()
    with make(model) as tracer, torch.no_grad():
        expected = model.act(model.body(inputs))
        outputs = [tracer(inputs, LABELS, IDS, n_epoch=epoch) for epoch in range(3)]
        assert torch.equal(tracer.get_hooked_features("features"), expected)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert torch.equal(stored("features"), expected.repeat(3, 1))
    assert torch.equal(stored("logits"), outputs[0].repeat(3, 1))
    assert torch.equal(stored("label", "ground_truth"), LABELS.repeat(3))


def test_a_forward_that_fails_while_the_head_is_searched_stores_nothing(
    make: Any, inputs: torch.Tensor
) -> None:
    tracer = make(Net())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tracer(inputs[:, :2], LABELS, IDS)
    tracer(inputs, LABELS, IDS)
    tracer.flush()
    assert rows() == BATCH


def test_no_head_is_an_error_that_names_target_layers(make: Any) -> None:
    with pytest.raises(LayerNotFoundError, match="target_layers"):
        make(nn.Sequential(nn.Flatten()))


def test_values_are_stored_as_they_were_when_the_layer_returned(make: Any, inputs: torch.Tensor) -> None:
    model = Net()
    with make(model, {"body": "body", "act": "act"}) as tracer:
        tracer(inputs, None, IDS)
        body = model.body(inputs)
        assert torch.equal(tracer.get_hooked_features("body"), body)
        assert torch.equal(tracer.get_hooked_features("act"), body.relu())
    assert torch.equal(stored("body"), body.detach())


def test_a_layer_that_does_not_run_is_named_and_nothing_is_stored(make: Any, inputs: torch.Tensor) -> None:
    tracer = make(Net(), {"body": "body", "far": "detour"})
    with pytest.raises(AliasNotCapturedError, match="'far'"):
        tracer(inputs, LABELS, IDS)
    tracer.flush()
    assert rows() == 0
    assert tracer.stats().rows_submitted == 0
    with pytest.raises(NotFoundError):
        tracer.get_hooked_features("body")


@pytest.mark.parametrize("repeat", ["last", "all"])
def test_repeated_layers(make: Any, inputs: torch.Tensor, repeat: str) -> None:
    model = Net()
    model.repeats = 3
    with make(model, {"loop": "detour"}, options={"repeat": repeat}) as tracer:
        tracer(inputs, LABELS, IDS)
        runs = [model.act(model.body(inputs))]
        for _ in range(3):
            runs.append(model.detour(runs[-1]))
        if repeat == "all":
            for name, run in zip(("loop", "loop.1", "loop.2"), runs[1:], strict=True):
                assert torch.equal(tracer.get_hooked_features(name), run)
            with pytest.raises(AliasNotCapturedError, match="2 times"):
                tracer((inputs, 2), LABELS, IDS)
        else:
            tracer((inputs, 2), LABELS, IDS)
    last = "loop.2" if repeat == "all" else "loop"
    assert torch.equal(stored(last)[:BATCH], runs[-1].detach())


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": IDS[:-1]}, "4"),
    ({"ground_truth": LABELS[:-1]}, "4"),
    ({"n_epoch": -1}, "n_epoch"),
    ({"camera": 3}, "camera"),
    ({"unknown": 3}, "unknown"),
]


@pytest.mark.parametrize(("changed", "named"), BAD_CALLS, ids=lambda value: str(value)[:20])
def test_of_a_bad_call_nothing_is_stored(
    make: Any, inputs: torch.Tensor, changed: dict[str, Any], named: str
) -> None:
    call = {"ground_truth": LABELS, "input_ids": IDS, "camera": "left", **changed}
    tracer = make(Net(), {"body": "body"}, additional_fields=[{"name": "camera", "type": "str"}])
    with pytest.raises((ValueError, TypeError), match=named):
        tracer(inputs, **call)
    with pytest.raises(InvalidInputError, match="camera"):
        tracer(inputs, LABELS, IDS)
    tracer(inputs, LABELS, IDS, camera="left")
    tracer.flush()
    assert rows() == BATCH
    assert tracer.stats().rows_submitted == BATCH


def test_inputs_are_checked_before_the_forward(make: Any, inputs: torch.Tensor) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    tracer = make(model, {"body": "0"})
    with pytest.raises(InvalidInputError):
        tracer(inputs, LABELS[:1], IDS)
    assert model[0].num_batches_tracked == 0


def test_a_call_inside_of_a_call_is_recorded_and_the_outer_one_is_refused(
    make: Any, inputs: torch.Tensor
) -> None:
    model = Net()
    tracer = make(model, {"body": "body"})
    inner = [True]

    def call_again(*_: Any) -> None:
        if inner.pop() if inner else False:
            tracer(inputs, None, [f"inner-{name}" for name in IDS])

    handle = model.fc.register_forward_hook(call_again)
    with pytest.raises(InvalidInputError, match="not from within the model"):
        tracer(inputs, LABELS, IDS)
    handle.remove()
    tracer(inputs, LABELS, IDS)
    tracer.flush()
    assert stored("input_id") == [*(f"inner-{name}" for name in IDS), *IDS]


def test_sampling_keeps_the_same_rows_of_every_column(make: Any) -> None:
    ids = [f"sample-{number}" for number in range(40)]
    inputs, labels = torch.randn(40, 6), torch.arange(40) % 3
    fields = [{"name": "position", "type": "int"}, {"name": "image", "type": "tensor"}]
    model = Net()
    tracer = make(model, None, options={"sample_fraction": 0.4}, additional_fields=fields)
    for _ in range(2):
        tracer(inputs, labels, ids, position=list(range(40)), image=inputs)
    tracer.close()
    position = stored("position")
    assert 0 < len(position) < 80
    assert stored("input_id") == [ids[row] for row in position]
    assert torch.equal(stored("image"), inputs[position])
    assert torch.equal(stored("label", "ground_truth"), labels[position])
    assert torch.equal(stored("features"), model.act(model.body(inputs))[position].detach())


def test_sampling_keeps_the_same_ids_whether_they_come_as_integers_or_as_text(make: Any) -> None:
    tracer = make(Net(), {"act": "act"}, options={"sample_fraction": 0.5})
    numbers = torch.arange(40, dtype=torch.int32)
    for ids in (numbers, numbers.numpy(), numbers.tolist(), list(map(str, numbers.tolist()))):
        tracer(torch.randn(40, 6), numbers, ids)
    tracer.flush()
    kept = stored("input_id")
    share = len(kept) // 4
    assert 0 < share < 40 and kept == kept[:share] * 4
    assert stored("label", "ground_truth").tolist() == list(map(int, kept))


def test_every_n_calls_records_the_first_of_each_n(make: Any, inputs: torch.Tensor) -> None:
    tracer = make(Net(), {"body": "body"}, options={"every_n_calls": 3})
    for epoch in range(7):
        tracer(inputs, None, IDS, n_epoch=epoch)
    with pytest.raises(NotFoundError):
        make(Net(), {"body": "body"}).get_hooked_features("body")
    tracer.flush()
    assert open_trace("net", "v1").epochs == [0, 3, 6]


def test_keep_epochs_drops_older_ones(make: Any, inputs: torch.Tensor) -> None:
    tracer = make(Net(), {"body": "body"}, options={"keep_epochs": 2})
    for epoch in (0, 1, 1, 2, 5, None):
        tracer(inputs, None, IDS, n_epoch=epoch)
    tracer.flush()
    assert sorted(open_trace("net", "v1").epochs) == [-1, 2, 5]


def test_disabled_is_the_plain_forward(make: Any, inputs: torch.Tensor, data_dir: Path) -> None:
    model = Net()
    tracer = make(model, {"body": "body"}, options={"mode": "disabled"})
    assert torch.equal(tracer(inputs, None, ["anything"]), model(inputs))
    tracer.flush()
    assert tracer.drop_epoch_data(0) == {"extracted_feature": 0}
    assert tracer.stats().rows_submitted == 0
    assert not data_dir.exists()
    assert not model.body._forward_hooks


def test_the_users_run_is_left_alone(make: Any, inputs: torch.Tensor) -> None:
    model = Net()
    reference = copy.deepcopy(model)
    calls = []
    model.body.register_forward_hook(lambda *_: calls.append(1))
    keys = list(model.state_dict())
    tracer = make(model, {"body": "body", "fc": "fc", "same": "fc", "all": ""})
    state = torch.get_rng_state()
    output = tracer(inputs, LABELS, IDS)
    assert torch.equal(torch.get_rng_state(), state)
    output.sum().backward()
    reference(inputs).sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert list(model.state_dict()) == keys
    assert model.training
    twin = copy.deepcopy(model)
    twin(inputs)
    pickle.loads(pickle.dumps(Net()))
    assert tracer.stats().rows_submitted == BATCH
    tracer.close()
    assert len(model.body._forward_hooks) == 1
    assert len(calls) == 2


def test_a_subclass_may_take_keywords_out_and_change_the_output(make: Any, inputs: torch.Tensor) -> None:
    class Scaling(ClassificationTracer):
        def _parse_and_save_io_data(
            self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
        ) -> None:
            self.seen = self.get_hooked_features("features")
            factor = kwargs.pop("factor")
            super()._parse_and_save_io_data(model_input, model_output * factor, ground_truth, **kwargs)

    model = Net()
    tracer = make(model, cls=Scaling)
    output = tracer(inputs, LABELS, IDS, factor=2)
    with pytest.raises(InvalidInputError, match="other"):
        tracer(inputs, LABELS, IDS, factor=2, other=1)
    tracer.close()
    assert torch.equal(stored("logits"), output.detach() * 2)
    assert torch.equal(tracer.seen, model.act(model.body(inputs)))


def test_a_subclass_that_does_not_save_stores_nothing(make: Any, inputs: torch.Tensor) -> None:
    class Silent(ClassificationTracer):
        def _parse_and_save_io_data(self, *args: Any, **kwargs: Any) -> None:
            pass

    tracer = make(Net(), {"body": "body"}, cls=Silent)
    tracer(inputs, LABELS, IDS)
    tracer.flush()
    assert rows() == 0


def test_the_bases_can_be_used_alone(make: Any, inputs: torch.Tensor) -> None:
    for number, base in enumerate((TrainingTracer, ClassificationTorchTracer)):
        tracer = base(Net(), "net", f"base{number}", {"body": "body"})
        tracer(inputs, LABELS, IDS)
        tracer.close()
        columns = open_trace("net", f"base{number}").columns("extracted_feature")
        assert ("logits" in columns) == (base is ClassificationTorchTracer)


def test_another_architecture_or_other_columns_need_force(make: Any, inputs: torch.Tensor) -> None:
    make(Net(), {"body": "body"})(inputs, LABELS, IDS)
    make(Net(), {"body": "module.body"}).close()
    with pytest.raises(ArchitectureMismatchError, match="force_table_recreate"):
        make(Net(9), {"body": "body"})
    for other in ({"hidden": "body"}, {"body": "fc"}, {"body": "body", "more": "fc"}):
        with pytest.raises(InvalidInputError, match="aliases"):
            make(Net(), other)
    with pytest.raises(InvalidInputError, match="fields"):
        make(Net(), {"body": "body"}, additional_fields=[{"name": "x", "type": "int"}])


def test_force_takes_another_architecture_and_empties_the_tables(make: Any, inputs: torch.Tensor) -> None:
    make(Net(), {"body": "body"})(inputs, LABELS, IDS)
    make(Net(), {"body": "body"}).close()
    for tracer in (make(Net(), {"body": "body"}),):
        tracer.close()
    with ClassificationTracer(Net(), "net", "v2", {"body": "body"}) as first:
        first(inputs, LABELS, IDS)
    with ClassificationTracer(Net(9), "net", "v2", {"wide": "body"}, force_table_recreate=True) as second:
        assert open_trace("net", "v2").num_rows("extracted_feature") == 0
        second(inputs, LABELS, IDS)
    assert open_trace("net", "v2").tensors("extracted_feature")["wide"].shape == (BATCH, 9)


def test_after_close_only_reading_is_left(make: Any, inputs: torch.Tensor, tmp_path: Path) -> None:
    tracer = make(Net(), {"body": "body"})
    tracer(inputs, LABELS, IDS)
    tracer.close()
    tracer.close()
    for call in (
        lambda: tracer(inputs, LABELS, IDS),
        tracer.flush,
        lambda: tracer.drop_epoch_data(0),
        tracer.drop_version_data,
    ):
        with pytest.raises(TracerClosedError):
            call()
    assert tracer.stats().rows_committed == BATCH
    assert tracer.export(tmp_path).exists()


def test_a_tracer_that_is_dropped_loses_nothing_and_leaves_no_hooks(
    data_dir: Path, inputs: torch.Tensor
) -> None:
    model = Net()
    tracer = ClassificationTracer(model, "net", "v1", {"body": "body"})
    tracer(inputs, LABELS, IDS)
    del tracer
    assert not model.body._forward_hooks
    assert rows() == BATCH


def test_the_key_never_shows(make: Any) -> None:
    tracer = make(Net(), {"body": "body"}, api_endpoint="https://user:pw@host/x", api_key="s3cret")
    texts = [repr(tracer), repr(vars(tracer)), repr(vars(tracer._uploads))]
    with pytest.raises(OSError, match="endpoint") as caught:
        tracer.upload()
    texts += [str(caught.value), repr(caught.value)]
    assert not any("s3cret" in text for text in texts)
    assert not any("pw@" in text for text in texts[:2] + texts[3:])


def test_threads_have_calls_of_their_own(make: Any) -> None:
    import threading

    model = Net().eval()
    tracer = make(model)
    failures = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        try:
            for call in range(20):
                inputs = torch.randn(BATCH, 6, generator=generator)
                tracer(inputs, None, [f"{number}-{call}-{row}" for row in range(BATCH)])
                expected = model.act(model.body(inputs))
                assert torch.equal(tracer.get_hooked_features("features"), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tracer.flush()
    assert rows() == 3 * 20 * BATCH
