"""Contract 3: flush, close, with; a process that ends in any way; kill -9 after flush; multiprocessing
children; attempts; sound segments."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_children import verify_segments
from contract_models import Net, batch, by_id, check_law, raw_bytes, rows_of

from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

RECORD = """
import os, sys, signal
from contract_models import Net, batch
from ml_debugger.training import ClassificationTracer
from ml_debugger import TracerConfig

def record(calls, version="v1", config=None, size=4):
    tracer = ClassificationTracer(Net(), "net", version, {"hidden": "body"}, config=config)
    for i in range(calls):
        tracer(*batch(size, i), n_epoch=i % 2)
    return tracer
"""


def check_recorded(calls: int, store: Path, version: str = "v1", size: int = 4) -> None:
    """Every row of ``record(calls)`` is there with its values, and the segments are sound."""
    trace = open_trace("net", version)
    data = trace.tensors("extracted_feature")
    hidden = by_id(data, "hidden")
    labels = by_id(trace.arrays("ground_truth"), "label")
    assert len(hidden) == len(labels) == calls * size
    model = Net()
    for i in range(calls):
        x, y, ids = batch(size, i)
        expected = model.body(x).detach()
        for k, key in enumerate(ids):
            assert raw_bytes(hidden[key]) == raw_bytes(expected[k])
            assert int(labels[key]) == int(y[k])
    assert verify_segments(store) >= 1


def test_flush_returns_when_all_rows_are_committed(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=3600.0))
    for i in range(20):
        tracer(*batch(4, i))
    tracer.flush()
    stats = tracer.stats()
    assert (stats.rows_committed, stats.rows_in_flight) == (80, 0)
    assert rows_of() == 80


def test_flush_without_rows_returns_at_once(make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer.flush()
    tracer.flush(timeout=0.5)


def test_rows_are_committed_within_the_interval_without_a_flush(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=0.05))
    tracer(*batch(4))
    deadline = time.monotonic() + 20
    while rows_of() < 4:
        assert time.monotonic() < deadline, "nothing was committed by the interval"
        time.sleep(0.02)
    check_law(tracer.stats())


def test_rows_are_committed_by_commit_bytes_without_a_flush(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_bytes=4096, commit_interval_s=3600.0))
    for i in range(200):
        tracer(*batch(4, i))
    deadline = time.monotonic() + 20
    while tracer.stats().rows_committed < 400:
        assert time.monotonic() < deadline, "commit_bytes never made a commit"
        time.sleep(0.02)
    assert rows_of() >= 400


def test_close_is_idempotent_and_flushes(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=3600.0))
    tracer(*batch(4))
    tracer.close()
    tracer.close()
    assert rows_of() == 4


def test_with_closes_also_when_the_body_raises() -> None:
    class Stop(Exception):
        pass

    with (
        pytest.raises(Stop),
        ClassificationTracer(Net(), "net", "v1", {"hidden": "body"}) as tracer,
    ):
        tracer(*batch(4))
        raise Stop
    assert rows_of() == 4
    with pytest.raises(RuntimeError):
        tracer(*batch(4))


def test_each_construction_opens_an_attempt(make_tracer: Any) -> None:
    for i in range(3):
        tracer = make_tracer()
        tracer(*batch(2, i))
        tracer.close()
    attempts = list(open_trace("net", "v1").attempts)
    assert len(attempts) == 3 and attempts == sorted(set(attempts))
    assert all(type(a) is int for a in attempts)


ENDINGS = {
    "return": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "uncaught exception": ("raise RuntimeError('user')", 1),
    "exception in a thread's join": (
        "import threading; threading.Thread(target=lambda: 1).start(); sys.exit(0)",
        0,
    ),
}


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_a_process_that_just_ends_loses_nothing(ending: str, run_child: Any, store: Path) -> None:
    statement, code = ENDINGS[ending]
    config = "TracerConfig(commit_interval_s=3600.0)"
    done = run_child(f"{RECORD}\ntracer = record(30, config={config})\n{statement}\n", expect=code)
    assert "Fatal" not in done.stderr and "terminate called" not in done.stderr
    check_recorded(30, store)


def test_a_tracer_in_a_function_that_returned_loses_nothing_at_exit(run_child: Any, store: Path) -> None:
    run_child(f"{RECORD}\nrecord(30, config=TracerConfig(commit_interval_s=3600.0))\n")
    check_recorded(30, store)


def test_sigint_loses_nothing(start_child: Any, store: Path) -> None:
    # A shell starts its background jobs, and what they start, with SIGINT ignored.
    script = f"""{RECORD}
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
tracer = ClassificationTracer(
    Net(), "net", "v1", {{"hidden": "body"}}, config=TracerConfig(commit_interval_s=3600.0))
done = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
i = 0
while True:
    tracer(*batch(4, i), n_epoch=i % 2)
    i += 1
    os.pwrite(done, str(i).encode(), 0)
    if i == 20:
        print("running", flush=True)
"""
    ledger = store.parent / "ledger"
    child = start_child(script, ledger)
    assert child.line() == "running"
    child.signal(signal.SIGINT)
    finished = child.finish()
    assert "KeyboardInterrupt" in finished.stderr and "Fatal" not in finished.stderr
    calls = int(ledger.read_text())
    assert calls >= 20
    stored = rows_of() // 4
    assert rows_of() % 4 == 0, "a call is atomic"
    assert calls <= stored <= calls + 1
    check_recorded(stored, store)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_kill_9_after_flush_loses_nothing(durability: str, start_child: Any, store: Path) -> None:
    script = f"""{RECORD}
tracer = record(40, config=TracerConfig(durability=sys.argv[1], commit_interval_s=3600.0))
tracer.flush()
print("flushed", flush=True)
i = 1000
while True:
    tracer(*batch(4, i))
    i += 1
"""
    child = start_child(script, durability)
    assert child.line() == "flushed"
    child.signal(signal.SIGKILL)
    assert child.finish().returncode == -signal.SIGKILL
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "hidden")
    assert len(stored) % 4 == 0
    for i in range(40):
        x, _, ids = batch(4, i)
        expected = Net().body(x).detach()
        assert [raw_bytes(stored[key]) for key in ids] == [raw_bytes(row) for row in expected]
    assert verify_segments(store) >= 1


def test_after_kill_9_the_next_process_records_on_and_reads_all_attempts(
    start_child: Any, make_tracer: Any, store: Path
) -> None:
    script = f"{RECORD}\ntracer = record(10)\ntracer.flush()\nprint('flushed', flush=True)\ninput()\n"
    child = start_child(script)
    assert child.line() == "flushed"
    child.signal(signal.SIGKILL)
    child.finish()
    tracer = make_tracer()
    for i in range(10):
        tracer(*batch(4, i), n_epoch=i % 2)
    tracer.close()
    trace = open_trace("net", "v1")
    assert trace.num_rows("extracted_feature") == 80
    assert trace.num_rows("extracted_feature", dedupe=True) == 40
    assert len(trace.attempts) == 2
    assert verify_segments(store) >= 2


HARD_ENDS = {
    "os._exit": ("os._exit(0)", 0),
    "abort": (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()",
        -signal.SIGABRT,
    ),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
}


@pytest.mark.parametrize("ending", sorted(HARD_ENDS))
def test_hard_ends_lose_at_most_rows_in_flight(ending: str, run_child: Any, store: Path) -> None:
    statement, code = HARD_ENDS[ending]
    script = f"""{RECORD}
tracer = record(15)
tracer.flush()
for i in range(15, 30):
    tracer(*batch(4, i), n_epoch=i % 2)
stats = tracer.stats()
print(stats.rows_submitted, stats.rows_in_flight, flush=True)
{statement}
"""
    done = run_child(script, expect=code)
    submitted, in_flight = map(int, done.stdout.split())
    assert submitted == 120
    assert 60 <= submitted - in_flight <= rows_of() <= submitted
    assert rows_of() % 4 == 0
    assert verify_segments(store) >= 1


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_multiprocessing_child_that_just_ends_loses_nothing(
    method: str, run_child: Any, store: Path
) -> None:
    script = f"""{RECORD}
import multiprocessing

def child(version):
    record(20, version=version, config=TracerConfig(commit_interval_s=3600.0))

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    process = context.Process(target=child, args=("child",))
    process.start()
    process.join(80)
    assert process.exitcode == 0, process.exitcode
"""
    run_child(script)
    check_recorded(20, store, "child")


@pytest.mark.parametrize("ending", ["sys.exit(4)", "raise RuntimeError('user')"])
def test_a_fork_child_that_ends_badly_loses_nothing_while_its_parent_is_traced(
    ending: str, run_child: Any, store: Path
) -> None:
    script = f"""{RECORD}
import multiprocessing

def child(version):
    record(20, version=version, config=TracerConfig(commit_interval_s=3600.0))
    {ending}

parent = record(20, version="parent")
process = multiprocessing.get_context("fork").Process(target=child, args=("child",))
process.start()
process.join(80)
assert process.exitcode in (1, 4), process.exitcode
"""
    run_child(script)
    check_recorded(20, store, "child")
    check_recorded(20, store, "parent")


def test_in_a_forked_child_an_inherited_tracers_call_is_the_plain_forward(
    run_child: Any, store: Path
) -> None:
    script = f"""{RECORD}
model = Net()
tracer = ClassificationTracer(model, "net", "v1", {{"hidden": "body"}})
tracer(*batch(4, 0), n_epoch=0)
pid = os.fork()
if pid == 0:
    code = 1
    try:
        for i in range(100, 140):
            x, y, ids = batch(4, i)
            assert torch.equal(tracer(x, y, ids), model(x))
        mine = ClassificationTracer(model, "net", "child", {{"hidden": "body"}})
        for i in range(5):
            mine(*batch(4, i), n_epoch=i % 2)
        mine.close()
        tracer.close()
        code = 0
    finally:
        os._exit(code)
assert os.waitpid(pid, 0)[1] == 0
tracer(*batch(4, 1), n_epoch=1)
tracer.close()
assert tracer.stats().rows_committed == 8, tracer.stats()
"""
    run_child(script)
    check_recorded(2, store)
    check_recorded(5, store, "child")


def test_a_fork_in_mid_call_leaves_the_parent_sound(run_child: Any, store: Path) -> None:
    script = f"""{RECORD}
class Forks(Net):
    def forward(self, x):
        hidden = self.body(x)
        if (pid := os.fork()) == 0:
            self.head(self.act(hidden))
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        return self.head(self.act(hidden))

tracer = ClassificationTracer(Forks(), "net", "v1", {{"hidden": "body"}})
for i in range(10):
    tracer(*batch(4, i), n_epoch=i % 2)
tracer.close()
"""
    run_child(script)
    check_recorded(10, store)


def test_an_orphaned_child_does_not_keep_the_next_run_out(start_child: Any, make_tracer: Any) -> None:
    script = f"""{RECORD}
tracer = record(5)
tracer.flush()
if os.fork() == 0:
    signal.pause()
print("forked", flush=True)
signal.pause()
"""
    child = start_child(script)
    assert child.line() == "forked"
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (
        Path(f"/proc/{child.pid}/task").exists()
        and "Z" not in Path(f"/proc/{child.pid}/stat").read_text().split()[2]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tracer = make_tracer()
    tracer(*batch(4, 99))
    tracer.flush()
    assert rows_of() == 24


def test_two_exits_later_the_numbers_of_rows_are_unique(make_tracer: Any) -> None:
    for i in range(3):
        tracer = make_tracer()
        tracer(*batch(5, i), n_epoch=0)
        tracer.close()
    row_ids = open_trace("net", "v1").arrays("extracted_feature")["row_id"]
    assert len(np.unique(row_ids)) == 15
