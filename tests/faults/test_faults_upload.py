"""kill -9 of tracers and uploaders at random times: what a trace holds arrives, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_faults_kill import FOREVER
from trials import Score, Trial, rounds

CONFIG = {"close_timeout_s": 5.0, "stall_timeout_s": 20.0}
ROUNDS_A_STORE = 20  # a ledger has room for 256 epochs
PATIENCE_S = 40.0
UPLOAD = """
from ml_debugger.uploading.upload import upload_trace
for version in ("v0", "v1"):
    upload_trace("net", version, data_dir=ARGS[0], endpoint=ARGS[1], stall_timeout_s=20.0)
    assert upload_trace("net", version, data_dir=ARGS[0], endpoint=ARGS[1]).segments_sent == 0
"""


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def one_round(trial: Trial, victim: str, there: Path, choice: random.Random) -> None:
    """Record and upload until the kill; then all processes of the round end by themselves."""
    endpoint = {"auto_sync": True, "api_endpoint": str(there)}
    process = trial.start(FOREVER, flush_every=3, pause_s=0.02, tracer=endpoint)
    time.sleep(0.3 + choice.random() * 2.0)
    uploaders = children(process.pid)
    trial.score.fired += victim == "tracer" or bool(uploaders)
    if victim == "uploader":
        kill(uploaders)
        time.sleep(choice.random() * 0.5)
        assert is_running(process.pid), f"the death of its uploader ended the tracer\n{process.output()}"
        os.kill(process.pid, signal.SIGKILL)
    elif victim == "tracer":
        os.kill(process.pid, signal.SIGKILL)
    else:
        kill([process.pid, *uploaders])
    assert trial.wait(process) == -signal.SIGKILL, process.output()
    deadline = time.monotonic() + PATIENCE_S
    while left := [pid for pid in uploaders if is_running(pid)]:
        if time.monotonic() > deadline:
            trial.score.hung += 1
            kill(left)
            raise AssertionError(f"seed {trial.seed}: uploaders outlive a tracer that was killed")
        time.sleep(0.02)


def test_killed_tracers_and_uploaders_leave_an_endpoint_that_is_completed(
    make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int, tmp_path: Path
) -> None:
    tally = score("kill -9 of tracer, uploader or both during uploads: the endpoint has every row, once")
    choice = random.Random(seed)
    total = rounds(3, 0.1)
    for first in range(0, total, ROUNDS_A_STORE):
        trial, there = make_trial(tally, config=CONFIG), tmp_path / f"endpoint-{first}"
        for number in range(first, min(first + ROUNDS_A_STORE, total)):
            tally.rounds += 1
            one_round(trial, ("tracer", "uploader", "both")[number % 3], there, choice)
        rows = trial.verify()
        job = {"kind": "script", "source": UPLOAD, "args": [str(trial.data_dir), str(there)]}
        upload = trial.server.start({**job, "log": str(tmp_path / "upload.log")})
        assert trial.wait(upload) == 0, upload.output()
        assert trial.judge(data_dir=str(there)) == trial.judge() > rows > 0
        assert not list(there.rglob("*.tmp")), "half a slice was left"
        trial.remove()
    assert tally.fired > 0
