"""A full disk and a frozen one, under each policy: training goes on or waits, as asked, and no longer."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acknowledgements import REFUSED
from disks import Disk, ext4, require_tools, tmpfs
from trials import Score, Trial, is_long

RING_BYTES = 1 << 20
UNTIL_STOPPED = [["open"], ["train", None, 2], ["close"]]
# A machine that does other things besides.
SLACK_S = 15.0
PATIENCE_S = 40.0


def figures(trial: Trial) -> dict[str, int]:
    """Of the round that runs: rows committed, calls begun and refused."""
    ledger = trial.promises[-1].open()
    return {
        "committed": int(ledger.tracers["committed"].sum()),
        "begun": int((ledger.calls["state"] != 0).sum()),
        "refused": int((ledger.calls["state"] == REFUSED).sum()),
    }


def wait_for(what: str, condition: Callable[[], bool], trial: Trial) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        log = trial.processes[-1].output()
        assert time.monotonic() < deadline, (
            f"seed {trial.seed}: never {what}; {figures(trial)}\n{log[-3000:]}"
        )
        time.sleep(0.02)


def is_still(trial: Trial, seconds: float = 0.5) -> bool:
    """Whether nothing is committed for a while."""
    before = figures(trial)["committed"]
    time.sleep(seconds)
    return before > 0 and figures(trial)["committed"] == before


def finish(trial: Trial, process: Any) -> dict[str, int]:
    """Let the training end; returns the sums of the final `stats`."""
    os.kill(process.pid, signal.SIGUSR1)
    assert trial.wait(process) == 0, process.output()
    cells = trial.promises[-1].open().tracers
    assert cells["closed"].all()
    return {
        name: int(cells[name].sum())
        for name in ("submitted", "committed", "discarded", "failed", "in_flight")
    }


FILESYSTEMS = {"tmpfs": (tmpfs, 8), "ext4": (ext4, 24)}


@pytest.mark.parametrize("filesystem", sorted(FILESYSTEMS))
@pytest.mark.parametrize("overflow", ["block", "discard", "raise"])
def test_a_full_disk_is_waited_for_and_recording_recovers_by_itself(
    overflow: str,
    filesystem: str,
    make_trial: Callable[..., Any],
    score: Callable[[str], Score],
    tmp_path: Path,
) -> None:
    if filesystem == "ext4" and overflow != "block" and not is_long():
        pytest.skip("in make test-faults only")
    tally = score(f"full disk ({filesystem}), overflow {overflow}: recovers when there is space")
    make, megabytes = FILESYSTEMS[filesystem]
    with make(tmp_path / "disk", megabytes) as disk:
        config = {"overflow": overflow, "ring_bytes": RING_BYTES}
        trial = make_trial(tally, config=config, data_dir=disk.mount / "data")
        ballast = disk.fill(leave_bytes=2 << 20)
        tally.rounds += 1
        process = trial.start(UNTIL_STOPPED, tolerant=True, pause_s=0.003, flush_every=0)
        wait_for("full", lambda: disk.free_bytes < 1 << 20 and is_still(trial), trial)
        tally.fired += 1
        before = figures(trial)
        time.sleep(0.5)
        during = figures(trial)
        if overflow == "block":
            assert during["begun"] - before["begun"] <= 1, "it should wait"
        else:
            wait_for("trained on", lambda: figures(trial)["begun"] > before["begun"] + 20, trial)
        ballast.unlink()
        wait_for("recovered", lambda: figures(trial)["committed"] > during["committed"], trial)
        sums = finish(trial, process)
        assert sums["failed"] == sums["in_flight"] == 0, sums
        assert (sums["discarded"] > 0) == (overflow == "discard"), sums
        assert (figures(trial)["refused"] > 0) == (overflow == "raise")
        trial.verify()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_disk_that_stays_full_ends_in_an_error_or_a_warning_and_nothing_hangs(
    on_error: str, make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score(f"disk stays full, on_error {on_error}: given up after stall_timeout_s, counted")
    with tmpfs(tmp_path / "disk", 6) as disk:
        config = {
            "on_error": on_error,
            "ring_bytes": RING_BYTES,
            "stall_timeout_s": 0.7,
            "close_timeout_s": 2.0,
        }
        trial = make_trial(tally, config=config, data_dir=disk.mount / "data")
        ballast = disk.fill(leave_bytes=2 << 20)
        tally.rounds += 1
        process = trial.start(UNTIL_STOPPED, tolerant=True, pause_s=0.003, flush_every=0)
        wait_for("full", lambda: disk.free_bytes < 1 << 20 and is_still(trial), trial)
        tally.fired += 1
        before = figures(trial)
        wait_for("went on", lambda: figures(trial)["begun"] > before["begun"] + 20, trial)
        sums = finish(trial, process)
        assert sums["failed"] > 0 and sums["in_flight"] == 0, sums
        log = process.output()
        if on_error == "raise":
            assert "StorageError" in log and "full" in log
        else:
            assert log.count("RuntimeWarning") == trial.shape.tracers and "StorageError" not in log
        ballast.unlink()
        trial.verify()


def seconds_in(log: str, what: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{what} ([0-9.]+) s", log)]


FROZEN = {
    "block": {"overflow": "block"},
    "block, then discard": {"overflow": "block", "on_error": "warn"},
    "discard": {"overflow": "discard"},
    "raise": {"overflow": "raise"},
}


@pytest.mark.parametrize("policy", sorted(FROZEN))
def test_a_frozen_disk_holds_nobody_longer_than_its_deadline(
    policy: str, make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    require_tools("fsfreeze")
    tally = score(f"frozen filesystem, overflow {policy}: calls, flush and close end in time")
    with ext4(tmp_path / "disk", 64) as disk:
        timeouts = {"stall_timeout_s": 0.6, "close_timeout_s": 0.6}
        config = {**FROZEN[policy], **timeouts, "ring_bytes": RING_BYTES}
        trial = make_trial(tally, config=config, data_dir=disk.mount / "data")
        steps = [["open"], ["train", None, 2], ["flush", 0.3], ["close"], ["sleep", 3600]]
        hook_times = trial.folder / "hooks.npy"
        tally.rounds += 1
        process = trial.start(steps, tolerant=True, pause_s=0.002, flush_every=0, hook_times=str(hook_times))
        wait_for("recording", lambda: figures(trial)["committed"] > 0, trial)
        try:
            check_frozen(policy, disk, trial, process, hook_times)
            tally.fired += 1
        finally:
            disk.thaw()
            process.kill()
        trial.wait(process)
        trial.verify()


def check_frozen(policy: str, disk: Disk, trial: Trial, process: Any, hook_times: Path) -> None:
    """With the disk frozen: see the policy at work, then the end of it all."""
    disk.freeze()
    frozen_at = time.monotonic()
    wait_for("still", lambda: is_still(trial), trial)
    before = figures(trial)
    if policy == "block":
        wait_for("raised", lambda: "TraceStallError" in process.output(), trial)
        waits = seconds_in(process.output(), "a call took")
        assert not waits or min(waits) < 0.6 + SLACK_S
    elif policy == "raise":
        wait_for("raised", lambda: "RingOverflowError" in process.output(), trial)
    else:
        wait_for("trained on", lambda: figures(trial)["begun"] > before["begun"] + 8, trial)
    os.kill(process.pid, signal.SIGUSR1)
    wait_for("closed", lambda: process.output().count("closed after") == trial.shape.tracers, trial)
    log = process.output()
    flushes, closes = seconds_in(log, "flushed after"), seconds_in(log, "closed after")
    assert flushes and max(flushes) < 0.3 + SLACK_S and max(closes) < 0.6 + SLACK_S, log
    assert "TraceStallError" in log  # of the flush
    if policy == "discard":
        times = np.load(hook_times)
        frozen = times[times[:, 0] > frozen_at + 0.2][:, 1]
        assert len(frozen) > 100 and np.median(frozen) <= 100e-6, f"hook: median {np.median(frozen) * 1e6} us"


OPENING = """
import os, signal, sys, time
from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import TraceStallError
from ml_debugger.training import ClassificationTracer
from recorder import Scene, make_call

def opened(data_dir, version, seconds=0.5):
    config = TracerConfig(data_dir=data_dir, ring_bytes=1 << 20, stall_timeout_s=seconds, close_timeout_s=1.0)
    return ClassificationTracer(Scene(), "net", version, {"features": "tap"}, config=config)

frozen, sound = ARGS
before = opened(sound, "before")
x, labels, ids = make_call(0, 0, 0, 16)
before(x, labels, ids, "train", 0)
for _ in range(2):  # the second one waits for the first, which still sits there
    begin = time.monotonic()
    try:
        opened(frozen, "late")
        print("opened", flush=True)
    except TraceStallError as error:
        print(f"stalled after {time.monotonic() - begin:.3f} s: {error}", flush=True)
before.flush()
before(x, labels, ids, "train", 1)
begin = time.monotonic()
before.close()
rows = open_trace("net", "before", data_dir=sound).num_rows("extracted_feature")
print(f"closed after {time.monotonic() - begin:.3f} s, rows {rows} of {2 * len(ids)}", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)  # thawed meanwhile
tracer = opened(frozen, "late", 20.0)
tracer(x, labels, ids, "train", 0)
tracer.close()
trace = open_trace("net", "late", data_dir=frozen)
print("recorded", trace.num_rows("extracted_feature"), "of", len(ids), "attempts", trace.attempts, flush=True)
"""


def test_a_tracer_that_is_made_on_a_frozen_disk_stalls_in_time_and_can_be_made_later(
    make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    require_tools("fsfreeze")
    tally = score("frozen filesystem under a tracer being made: TraceStallError in time, later it works")
    tally.rounds += 1
    with ext4(tmp_path / "disk", 64) as disk:
        trial = make_trial(tally, data_dir=disk.mount / "data")
        places = [str(disk.mount / "data"), str(tmp_path / "sound")]
        job = {"kind": "script", "source": OPENING, "args": places}
        disk.freeze()
        try:
            process = trial.server.start({**job, "log": str(tmp_path / "opening.log")})
            trial.processes.append(process)
            process.wait_until_stopped(PATIENCE_S)
            log = process.output()
            assert not (disk.mount / "data").exists()
            tally.fired += log.count("stalled after") == 2
        finally:
            disk.thaw()
        stalls = seconds_in(log, "stalled after")
        assert len(stalls) == 2 and max(stalls) < 0.5 + SLACK_S, log
        assert max(seconds_in(log, "closed after")) < 1.0 + SLACK_S, log
        os.kill(process.pid, signal.SIGCONT)
        assert trial.wait(process) == 0, process.output()
        assert re.search(r"rows (\d+) of \1\n", log), log
        assert re.search(r"recorded (\d+) of \1 ", process.output())
        process = trial.start([["open"], ["train", 3, 1], ["close"]])
        assert trial.wait(process) == 0, process.output()
        trial.verify()
