"""Contract 4: wait_for_save, upload without an endpoint, drop_epoch_data, drop_version_data."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, batch, carrier_tracer, carry, disk_bytes, refused, rows_of

from ml_debugger import TracerConfig, errors, open_trace


def filled(make_tracer: Any, epochs: int = 3, labelled: bool = True) -> Any:
    tracer = make_tracer()
    for epoch in range(epochs):
        x, y, ids = batch(4, epoch)
        tracer(x, y if labelled else None, ids, n_epoch=epoch)
    return tracer


@pytest.mark.parametrize("epoch", [None, 1, -1, 99])
def test_wait_for_save_returns_when_every_row_is_committed(epoch: int | None, make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=3600.0))
    for e in (0, 1, None):
        tracer(*batch(4, e or 0), n_epoch=e)
    begin = time.monotonic()
    assert tracer.wait_for_save(epoch) is None
    assert time.monotonic() - begin < 3, "the interval is for looking, not for sleeping when all is done"
    expected = 12 if epoch is None else rows_of(n_epoch=epoch)
    assert rows_of(n_epoch=epoch) == expected
    if epoch != 99:
        assert rows_of(n_epoch=epoch) == (12 if epoch is None else 4)


def test_wait_for_save_is_quiet_without_a_terminal_and_takes_its_arguments(
    make_tracer: Any, capfd: Any
) -> None:
    tracer = filled(make_tracer)
    tracer.wait_for_save(n_epoch=0, interval=0.01, force=True)
    assert "".join(capfd.readouterr()) == ""


def test_upload_without_an_endpoint_is_an_upload_error_that_says_what_to_set(make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    for keywords in ({}, {"n_epoch": 1}, {"force": True}):
        with refused(errors.UploadError) as caught:
            tracer.upload(**keywords)
        assert isinstance(caught.value, OSError)
        said = str(caught.value) + str(caught.value.hint)
        assert "api_endpoint" in said and "MLD_API_ENDPOINT" in said
    tracer(*batch(4, 9), n_epoch=0)
    tracer.flush()
    assert rows_of() == 16


@pytest.mark.parametrize("epoch", [1, np.int32(1), np.uint8(1)])
def test_drop_epoch_data_returns_the_deleted_rows_and_the_epoch_is_gone(epoch: Any, make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    assert tracer.drop_epoch_data(epoch) == {"extracted_feature": 4, "ground_truth": 4}
    trace = open_trace("net", "v1")
    assert sorted(trace.epochs) == [0, 2]
    assert trace.num_rows("extracted_feature", n_epoch=1) == trace.num_rows("ground_truth", n_epoch=1) == 0
    assert trace.num_rows("extracted_feature") == 8


def test_drop_without_ground_truth_has_no_second_key(make_tracer: Any) -> None:
    assert filled(make_tracer, labelled=False).drop_epoch_data(1) == {"extracted_feature": 4}


def test_an_epoch_that_is_not_there_gives_zeros(make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    assert tracer.drop_epoch_data(99) == {"extracted_feature": 0, "ground_truth": 0}
    assert tracer.drop_epoch_data(1) == {"extracted_feature": 4, "ground_truth": 4}
    assert tracer.drop_epoch_data(1) == {"extracted_feature": 0, "ground_truth": 0}
    assert rows_of() == 8


@pytest.mark.parametrize("epoch", [None, True, np.bool_(True), 1.0, np.float32(1), "1", [1]])
def test_drop_takes_an_int_only(epoch: Any, make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    with refused(TypeError):
        tracer.drop_epoch_data(epoch)
    tracer.flush()
    assert rows_of() == 12


@pytest.mark.parametrize("epoch", [-1, -5])
def test_drop_of_a_negative_epoch_is_a_value_error(epoch: int, make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    tracer(*batch(2, 9), n_epoch=None)
    with refused(ValueError):
        tracer.drop_epoch_data(epoch)
    tracer.flush()
    assert rows_of() == 14


def test_drop_flushes_first(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=3600.0))
    tracer(*batch(5), n_epoch=0)
    assert tracer.drop_epoch_data(0) == {"extracted_feature": 5, "ground_truth": 5}
    tracer.flush()
    assert rows_of() == 0


def test_a_dropped_epoch_may_be_recorded_again(make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    tracer.drop_epoch_data(1)
    tracer(*batch(2, 50), n_epoch=1)
    tracer.flush()
    trace = open_trace("net", "v1")
    assert sorted(trace.arrays("extracted_feature", n_epoch=1)["input_id"]) == sorted(batch(2, 50)[2])
    row_ids = trace.arrays("extracted_feature")["row_id"]
    assert len(set(row_ids.tolist())) == 10


def test_drop_gives_the_disk_space_back_when_it_returns(make_tracer: Any, store: Path) -> None:
    tracer = carrier_tracer(make_tracer)
    for epoch in range(3):
        for call in range(4):
            carry(tracer, torch.ones(2, 1 << 18), [f"{call}a", f"{call}b"], n_epoch=epoch)
    tracer.flush()
    before = disk_bytes(store)
    assert before >= 24 << 20
    tracer.drop_epoch_data(1)
    assert disk_bytes(store) <= before - (8 << 20)
    tracer.drop_epoch_data(0)
    tracer.drop_epoch_data(2)
    assert disk_bytes(store) < 1 << 20


def test_attempt_drops_only_that_attempts_rows(make_tracer: Any) -> None:
    for size in (2, 3):
        tracer = make_tracer()
        tracer(*batch(size, size), n_epoch=0)
        if size == 2:
            tracer.close()
    tracer.flush()
    first, second = sorted(open_trace("net", "v1").attempts)
    assert tracer.drop_epoch_data(0, attempt=first) == {"extracted_feature": 2, "ground_truth": 2}
    assert sorted(open_trace("net", "v1").arrays("extracted_feature")["input_id"]) == sorted(batch(3, 3)[2])
    assert tracer.drop_epoch_data(0, attempt=second) == {"extracted_feature": 3, "ground_truth": 3}
    assert rows_of() == 0


def test_an_open_iterator_over_a_dropped_epoch_raises_not_found(make_tracer: Any) -> None:
    tracer = make_tracer()
    for call in range(10):
        tracer(*batch(4, call), n_epoch=0)
    tracer(*batch(4, 99), n_epoch=1)
    tracer.flush()
    trace = open_trace("net", "v1")
    iterator = iter(trace.iter_batches("extracted_feature", n_epoch=0, batch_size=4))
    other = iter(trace.iter_batches("extracted_feature", n_epoch=1, batch_size=2))
    assert len(next(iterator)["input_id"]) == len(next(other)["input_id"]) * 2 == 4
    tracer.drop_epoch_data(0)
    with refused(errors.NotFoundError):
        for _ in iterator:
            pass
    assert sum(len(b["input_id"]) for b in other) == 2


def test_a_reader_opened_before_sees_the_drop(make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    tracer.flush()
    trace = open_trace("net", "v1")
    assert trace.num_rows("extracted_feature") == 12
    tracer.drop_epoch_data(1)
    assert trace.num_rows("extracted_feature", n_epoch=1) == 0
    assert 1 not in trace.epochs


def test_another_process_does_not_see_a_dropped_epoch(make_tracer: Any, start_child: Any) -> None:
    tracer = filled(make_tracer)
    tracer.flush()
    child = start_child(
        """
        from ml_debugger import open_trace
        trace = open_trace("net", "v1")
        while True:
            print(*sorted(trace.epochs), trace.num_rows("ground_truth"), flush=True)
            input()
        """
    )
    assert child.line() == "0 1 2 12"
    tracer.drop_epoch_data(1)
    child.say()
    assert child.line() == "0 2 8"


def test_dropping_while_another_thread_records(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=0.01))
    problems: list[BaseException] = []

    def train() -> None:
        try:
            for call in range(100):
                tracer(*batch(4, call), n_epoch=call % 2)
        except BaseException as error:
            problems.append(error)

    trainer = threading.Thread(target=train)
    trainer.start()
    dropped = 0
    while trainer.is_alive():
        dropped += tracer.drop_epoch_data(1).get("extracted_feature", 0)
    trainer.join()
    assert not problems
    tracer.flush()
    assert rows_of(n_epoch=0) == 200
    # A drop that meets an open call takes it along; that is counted apart.
    assert rows_of(n_epoch=1) + dropped + tracer.stats().rows_discarded == 200


def test_drop_version_data_empties_all_tables_and_recording_goes_on(make_tracer: Any, store: Path) -> None:
    tracer = filled(make_tracer)
    tracer(*batch(2, 9), n_epoch=None)
    assert tracer.drop_version_data() is None
    assert rows_of() == rows_of(table="ground_truth") == 0
    assert list(open_trace("net", "v1").epochs) == []
    tracer(*batch(3, 10), n_epoch=5)
    tracer.flush()
    assert list(open_trace("net", "v1").epochs) == [5]
    assert rows_of() == rows_of(table="ground_truth") == 3


def test_drop_version_data_leaves_no_old_thread_or_handle_and_gives_the_space_back(
    make_tracer: Any, store: Path
) -> None:
    tracer = carrier_tracer(make_tracer)
    carry(tracer, torch.ones(2, 1 << 18), ["a", "b"], n_epoch=0)
    tracer.drop_version_data()
    counts = []
    for _ in range(5):
        for epoch in range(3):
            carry(tracer, torch.ones(2, 1 << 18), ["a", "b"], n_epoch=epoch)
        tracer.drop_version_data()
        counts.append(tuple(len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd")))
        assert disk_bytes(store) < 1 << 20
    assert len(set(counts)) == 1, counts


def test_drop_version_data_touches_no_other_version(make_tracer: Any) -> None:
    first, second = make_tracer(version="v1"), make_tracer(version="v2")
    first(*batch(3))
    second(*batch(4))
    second.flush()
    first.drop_version_data()
    assert (rows_of(version="v1"), rows_of(version="v2")) == (0, 4)


def test_the_trace_still_knows_its_architecture_after_drop_version_data(make_tracer: Any) -> None:
    tracer = filled(make_tracer)
    tracer.drop_version_data()
    tracer.close()
    with refused(errors.ArchitectureMismatchError):
        make_tracer(Net(9), layers={"hidden": "body"})
