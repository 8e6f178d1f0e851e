"""Contract 2 and 3, storage that fails: on_error "raise" and "warn", wait_for_save after a failure, a
disk that is full for a while and one that stays full."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_models import by_id, carrier_tracer, check_law, disk_bytes, refused, send, small_ring

from ml_debugger import errors, open_trace

FAILING = """
import logging, resource, sys, warnings
from contract_models import carrier_tracer, carry, check_law, rows_of
from ml_debugger import TracerConfig, errors
from ml_debugger.training import ClassificationTracer

def make(model, layers, config):
    return ClassificationTracer(model, "net", "v1", layers, config=config)

def run(on_error):
    config = TracerConfig(on_error=on_error, ring_bytes=8 << 20, commit_interval_s=0.05, stall_timeout_s=5,
                          close_timeout_s=5)
    tracer = carrier_tracer(make, config=config)
    carry(tracer, torch.zeros(1, 8), ["first"])
    tracer.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    return tracer

BIG = torch.zeros(1, 1 << 19)
"""


def test_a_writer_that_failed_for_good_raises_storage_error_at_the_next_call(run_child: Any) -> None:
    done = run_child(
        FAILING
        + """
tracer = run("raise")
try:
    for i in range(200):
        carry(tracer, BIG, [str(i)])
        try:
            tracer.flush()
        except errors.StorageError:
            print("flush")
except errors.StorageError as error:
    print("call", isinstance(error, OSError))
for action in (tracer.flush, tracer.close):
    try:
        action()
    except errors.StorageError:
        print(action.__name__)
stats = tracer.stats()
check_law(stats)
print("failed", stats.rows_failed >= 1, rows_of())
"""
    )
    words = done.stdout.split("\n")
    assert "call True" in words and "flush" in words and "close" in words
    assert "failed True 1" in words


def test_on_error_warn_warns_once_stops_recording_counts_and_training_goes_on(run_child: Any) -> None:
    done = run_child(
        FAILING
        + """
class Listener(logging.Handler):
    heard = 0
    def emit(self, record):
        self.heard += 1

listener = Listener(logging.WARNING)
logging.getLogger().addHandler(listener)
tracer = run("warn")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for i in range(20):
        output = carry(tracer, BIG, [str(i)])
        assert output.shape == (1, 3)
        tracer.flush()
print(len(caught) + listener.heard)
stats = tracer.stats()
check_law(stats)
print(stats.rows_submitted, stats.rows_failed, stats.rows_committed, rows_of())
for _ in range(2):
    try:
        tracer.wait_for_save()
        print("saved")
    except errors.StorageError:
        print("lost")
tracer.close()
"""
    )
    warned, counts, first, second = done.stdout.strip().split("\n")
    assert int(warned) == 1
    submitted, failed, committed, visible = map(int, counts.split())
    assert committed == visible == 1
    assert failed >= 1 and submitted == committed + failed
    assert (first, second) == ("lost", "saved")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 6 MiB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(folder)], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting needs more rights")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_waited_for_and_loses_nothing_when_somebody_clears_it(
    make_tracer: Any, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\1" * (4 << 20))
    tracer = carrier_tracer(make_tracer, config=small_ring(data_dir=small_disk / "store", stall_timeout_s=60))

    calls = 60  # more than the disk and the ring take together, less than the disk without its ballast

    def train() -> None:
        for call in range(calls):
            send(tracer, call)

    trainer = threading.Thread(target=train)
    trainer.start()

    def stands_still() -> bool:
        """Full, and nothing moves: a first stall alone may be a writer that is slow."""
        committed = tracer.stats().rows_committed
        time.sleep(0.3)
        stats = tracer.stats()
        return disk_bytes(small_disk) > 5 << 20 and stats.stalls > 0 and stats.rows_committed == committed

    deadline = time.monotonic() + 30
    while not stands_still():
        assert trainer.is_alive() and time.monotonic() < deadline, "the disk never filled up"
    ballast.unlink()
    trainer.join(60)
    assert not trainer.is_alive()
    tracer.close()
    stored = by_id(open_trace("net", "v1", data_dir=small_disk / "store").tensors("extracted_feature"), "tap")
    assert {key: float(value[-1]) for key, value in stored.items()} == {
        f"{c}-0": float(c) for c in range(calls)
    }


@pytest.mark.leaves_core_behind
def test_a_disk_that_stays_full_is_an_error_after_the_timeout(make_tracer: Any, small_disk: Path) -> None:
    config = small_ring(data_dir=small_disk / "store", stall_timeout_s=1.0, close_timeout_s=1.0)
    tracer = carrier_tracer(make_tracer, config=config)
    begin = time.monotonic()
    with refused(errors.StorageError, errors.TraceStallError):
        for call in range(200):
            send(tracer, call)
        tracer.flush()
    assert time.monotonic() - begin < 30
    check_law(tracer.stats())
    stored = open_trace("net", "v1", data_dir=small_disk / "store").num_rows("extracted_feature")
    assert stored == tracer.stats().rows_committed
    with pytest.raises(errors.MlDebuggerError):
        tracer.close()
