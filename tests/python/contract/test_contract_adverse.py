"""Contract 3 and 8 under adverse conditions in one process: signals between any two bytecodes, close,
export and drop from other threads, nested tracers, odd layouts and names, many epochs, a changed working
directory."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, batch, by_id, check_law, raw_bytes, refused, rows_of

from ml_debugger import TracerConfig, errors, load_export, open_trace


class Interruption(BaseException):
    """What a signal handler of the user raises."""


def check_calls(expected: set[int], maybe: set[int], size: int = 4) -> None:
    """Calls ``expected`` are stored whole with their values; of ``maybe`` any, but whole; nothing else is."""
    trace = open_trace("net", "v1")
    hidden = by_id(trace.tensors("extracted_feature"), "hidden")
    labels = set(map(str, trace.tensors("ground_truth")["input_id"]))
    stored = {int(key[1:].split("-")[0]) for key in hidden}
    assert expected <= stored <= expected | maybe
    assert len(hidden) == size * len(stored) and labels == set(hidden)
    body = Net().body
    for call in stored:
        x, _, ids = batch(size, call)
        values = body(x).detach()
        assert [raw_bytes(hidden[key]) for key in ids] == [raw_bytes(row) for row in values]


def test_a_signal_at_any_moment_leaves_whole_calls_and_a_working_tracer(make_tracer: Any) -> None:
    tracer = make_tracer()
    done: set[int] = set()
    interrupted: set[int] = set()

    def interrupt(number: int, frame: Any) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for call in range(300):
            x, y, ids = batch(4, call)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00001 + 0.000003 * (call % 100))
                tracer(x, y, ids, n_epoch=call % 2)
                signal.setitimer(signal.ITIMER_REAL, 0)
                done.add(call)
            except Interruption:
                interrupted.add(call)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted, "no signal arrived in a call"
    tracer(*batch(4, 1000))
    tracer.flush()
    check_law(tracer.stats())
    check_calls(done | {1000}, interrupted)
    assert tracer.stats().rows_discarded == tracer.stats().rows_failed == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_base_exception_of_the_forward_comes_through_and_stores_nothing(
    kind: type[BaseException], make_tracer: Any
) -> None:
    error = kind()

    class Fails(Net):
        fail = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            if self.fail:
                raise error
            return output

    model = Fails()
    tracer = make_tracer(model, layers={"hidden": "body"})
    tracer(*batch(4, 0))
    model.fail = True
    with pytest.raises(kind) as caught:
        tracer(*batch(4, 1))
    assert caught.value is error
    model.fail = False
    tracer(*batch(4, 2))
    tracer.flush()
    check_calls({0, 2}, set())


def test_close_from_another_thread_ends_calls_with_tracer_closed_and_loses_none(make_tracer: Any) -> None:
    tracer = make_tracer()
    done: list[int] = []
    problems: list[BaseException] = []

    def train() -> None:
        try:
            for call in range(100_000):
                tracer(*batch(4, call), n_epoch=0)
                done.append(call)
        except BaseException as error:
            problems.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()
    while len(done) < 20:
        time.sleep(0.001)
    tracer.close()
    trainer.join()
    assert [type(problem) for problem in problems] == [errors.TracerClosedError]
    check_calls(set(done), set())


def test_exports_while_another_thread_records_hold_whole_calls(make_tracer: Any, tmp_path: Path) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=0.01))
    stop = threading.Event()
    done: list[int] = []

    def train() -> None:
        while not stop.is_set():
            tracer(*batch(7, len(done)), n_epoch=len(done) % 2)
            done.append(1)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        for number in range(5):
            handed_over = len(done)
            exported = load_export(tracer.export(tmp_path / f"{number}.zip"))
            rows = exported.num_rows("extracted_feature")
            assert rows % 7 == 0 and rows >= 7 * handed_over
            assert exported.num_rows("ground_truth") == rows
    finally:
        stop.set()
        trainer.join()


def test_a_tracer_called_inside_the_forward_of_another_keeps_its_own_rows(make_tracer: Any) -> None:
    inner_model = Net(seed=5)
    inner = make_tracer(inner_model, name="inner", layers={"hidden": "body"})

    class Outer(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.body(x)
            inner(x * 2, None, [f"inner{i}" for i in range(len(x))], n_epoch=3)
            return self.head(self.act(hidden))

    model = Outer()
    outer = make_tracer(model, layers={"hidden": "body"})
    x, y, ids = batch(3)
    outer(x, y, ids)
    outer.flush()
    inner.flush()
    for name, reference, keys in (
        ("net", model.body(x), ids),
        ("inner", inner_model.body(x * 2), ["inner0", "inner1", "inner2"]),
    ):
        hidden = by_id(open_trace(name, "v1").tensors("extracted_feature"), "hidden")
        assert set(hidden) == set(keys)
        assert all(torch.equal(hidden[key], row) for key, row in zip(keys, reference.detach(), strict=True))


def test_two_aliases_may_name_one_layer(make_tracer: Any) -> None:
    tracer = make_tracer(Net(), layers={"a": "body", "b": "body"})
    tracer(*batch(3))
    tracer.flush()
    data = open_trace("net", "v1").arrays("extracted_feature")
    assert data["a"].shape == (3, 6) and np.array_equal(data["a"], data["b"])


def test_a_recurrent_layer_gives_its_outputs(make_tracer: Any) -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(4, 5, batch_first=True)
            self.head = torch.nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    model = Recurrent()
    tracer = make_tracer(model, layers={"steps": "lstm"})
    x = torch.randn(3, 7, 4)
    tracer(x, None, ["a", "b", "c"])
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "steps")
    assert torch.equal(torch.stack([stored[key] for key in "abc"]), model.lstm(x)[0].detach())


def test_a_tensor_subclass_is_stored_as_its_values(make_tracer: Any) -> None:
    from contract_models import Speaker

    class Mine(torch.Tensor):
        pass

    tracer = make_tracer(Speaker(lambda x: (x * 2).as_subclass(Mine)), layers={"seen": "layer"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "seen")
    assert all(torch.equal(stored[key], row * 2) for key, row in zip(ids, x, strict=True))


LABELS = {
    "negative strides": np.array([1, 2, 0])[::-1],
    "big-endian": np.array([0, 2, 1], dtype=">i8"),
    "strided": np.array([0, 9, 2, 9, 1, 9])[::2],
    "read-only": np.broadcast_to(np.array([0, 2, 1]), (3,)),
    "unsigned": np.array([0, 2, 1], dtype=np.uint16),
    "list of tensors": [torch.tensor(0), torch.tensor(2), torch.tensor(1)],
    "list of numpy ints": [np.int64(0), np.int32(2), np.uint8(1)],
    "transposed tensor": torch.tensor([[0, 9], [2, 9], [1, 9]])[:, 0],
}


@pytest.mark.parametrize("form", sorted(LABELS))
def test_labels_of_any_memory_layout_are_stored_as_their_values(form: str, make_tracer: Any) -> None:
    tracer = make_tracer()
    x, _, ids = batch(3)
    tracer(x, LABELS[form], ids)
    tracer.flush()
    labels = by_id(open_trace("net", "v1").arrays("ground_truth"), "label")
    assert [int(labels[key]) for key in ids] == [0, 2, 1]


def test_label_ints_that_int64_cannot_hold_are_refused_not_rounded(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, _, ids = batch(3)
    with refused(ValueError, TypeError):
        tracer(x, [2**63 + 1, 0, 1], ids)
    tracer.flush()
    assert rows_of() == 0


def test_ids_of_unsigned_and_big_endian_arrays_are_their_numbers(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, _ = batch(3)
    tracer(x, y, np.array([2**64 - 1, 1, 2], dtype=np.uint64))
    tracer(x, y, np.array([5, -6, 7], dtype=">i4"))
    tracer.flush()
    ids = open_trace("net", "v1").tensors("extracted_feature")["input_id"]
    assert sorted(ids) == sorted(["18446744073709551615", "1", "2", "5", "-6", "7"])


@pytest.mark.parametrize("where", ["dataset_type", "alias", "field", "label field"])
def test_lone_surrogates_are_refused_by_an_error_of_ours(where: str, make_tracer: Any) -> None:
    bad = "a\ud800"
    with refused(ValueError):
        if where == "alias":
            make_tracer(Net(), layers={bad: "body"})
        tracer = make_tracer(
            additional_fields=[{"name": "f", "type": "str", "default": ""}],
            additional_label_fields=[{"name": "g", "type": "str", "default": ""}],
        )
        words = {"dataset_type": {"dataset_type": bad}, "field": {"f": bad}, "label field": {"g": bad}}
        tracer(*batch(3), **words[where])
    assert rows_of() == 0


@pytest.mark.parametrize(
    "path", ["body[", "body[x]", 'body["a', "body]", "body..weight", ".body", "body.", "[0]body"]
)
def test_a_malformed_path_is_a_layer_not_found_error(path: str, make_tracer: Any, store: Path) -> None:
    with refused(errors.LayerNotFoundError) as caught:
        make_tracer(Net(), layers={"hidden": path})
    assert path in str(caught.value)
    assert not store.exists()


def test_a_hundred_alternating_epochs_need_few_handles_and_mix_nothing(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=0.01))
    before = len(os.listdir("/proc/self/fd"))
    most = 0
    for turn in range(2):
        for epoch in range(100):
            tracer(*batch(2, 1000 * turn + epoch), n_epoch=epoch)
            most = max(most, len(os.listdir("/proc/self/fd")))
    tracer.flush()
    assert most - before <= 64
    trace = open_trace("net", "v1")
    assert sorted(trace.epochs) == list(range(100))
    data = trace.arrays("extracted_feature")
    assert len(data["input_id"]) == 400
    assert all(
        int(str(key)[1:].split("-")[0]) % 1000 == epoch
        for key, epoch in zip(data["input_id"], data["n_epoch"], strict=True)
    )


def test_the_second_of_two_sharing_tracers_records_on_after_a_drop_by_the_first(make_tracer: Any) -> None:
    first, second = (
        make_tracer(Net(), layers={"hidden": "body"}),
        make_tracer(Net(), layers={"hidden": "body"}),
    )
    first(*batch(2, 0), n_epoch=0)
    second(*batch(3, 1), n_epoch=0)
    second.flush()
    assert first.drop_epoch_data(0) == {"extracted_feature": 5, "ground_truth": 5}
    second(*batch(3, 2), n_epoch=0)
    second.flush()
    assert rows_of() == 3
    first.drop_version_data()
    assert rows_of() == 0
    second(*batch(4, 3), n_epoch=1)
    first(*batch(4, 4), n_epoch=1)
    first.flush()
    second.flush()
    check_calls({3, 4}, set())


def test_a_relative_data_dir_survives_a_change_of_directory(
    make_tracer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tracer = make_tracer(config=TracerConfig(data_dir="relative"))
    tracer(*batch(3, 0), n_epoch=0)
    monkeypatch.chdir(tmp_path / "there")
    tracer(*batch(3, 1), n_epoch=1)
    tracer.flush()
    assert open_trace("net", "v1", data_dir=tmp_path / "here" / "relative").num_rows("extracted_feature") == 6
    assert tracer.drop_epoch_data(0)["extracted_feature"] == 3
    path = tracer.export(tmp_path / "out.zip")
    tracer.close()
    assert load_export(path).num_rows("extracted_feature") == 3
    assert os.listdir(tmp_path / "there") == []
