"""Writes that reach the disk torn, in another order, or not at all: disks that a power cut could leave."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from acknowledgements import Promise
from disks import require_tools
from injection import require_strace
from recorder import ACKNOWLEDGED
from test_faults_power_cut import another_boot
from trials import Score, Trial, rounds
from write_log import Operation, Replay, WriteLog

LIFE = [
    ["stop"],
    ["open"],
    ["train", 4, 2],
    ["drop", 0],
    ["train", 3, 1],
    ["close"],
    ["open"],
    ["train", 4, 2],
    ["close"],
]
RECOVER = """
from pathlib import Path
from ml_debugger.errors import NotFoundError
from ml_debugger.store import layout
from ml_debugger.trace.recover import recover_trace
from ml_debugger.trace.verify import verify_trace
data_dir, output, must_be_sound = Path(ARGS[0]), Path(ARGS[1]), ARGS[2]
for version in ("v0", "v1"):
    try:
        report = verify_trace(layout.trace_directory(data_dir, "net", version))
        assert report.ok or not must_be_sound, report.problems
        recover_trace(data_dir, "net", version, output.with_name(version))
    except NotFoundError:  # the cut came before there was one
        continue
    recovered = layout.trace_directory(output.with_name(version), "net", version)
    if recovered.exists():
        assert verify_trace(recovered).ok
        both = layout.trace_directory(output, "net", version)
        both.parent.mkdir(parents=True, exist_ok=True)
        recovered.rename(both)
"""


def logged_life(trial: Trial) -> list[Operation]:
    process = trial.start(LIFE, flush_every=2, announce=True)
    process.wait_until_stopped()
    log = WriteLog(process.pid, trial.folder / "strace")
    with log:
        os.kill(process.pid, signal.SIGCONT)
        assert trial.wait(process) == 0, process.output()
    return log.operations()


def promise_at(crash: Replay, promise: Promise, path: Path) -> Promise:
    """What had been acknowledged when the power went."""
    shutil.copyfile(promise.path, path)
    then = replace(promise, path=str(path))
    ledger = then.open()
    ledger.lanes["flushed"] = ledger.lanes["sealed"] = 0
    ledger.drops[:] = 0
    ledger.tracers["committed"] = ledger.tracers["closed"] = 0
    for word, *numbers in crash.acknowledged:
        *place, value = map(int, numbers)
        if word == "drops":
            ledger.drops[place[0], place[1]] = value
        else:
            ledger.lanes[word][place[0]] = value
    return then


@pytest.mark.parametrize("durability", ["power", "process"])
def test_torn_and_reordered_writes_cost_what_the_durability_says(
    durability: str, make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int, tmp_path: Path
) -> None:
    require_strace()
    require_tools("mount")  # for another boot
    survives, kept = ("flushed", "acknowledged") if durability == "power" else ("sealed", "sealed")
    tally = score(f"torn and reordered writes, durability {durability}: all {kept} rows are there")
    trial = make_trial(tally, config={"durability": durability})
    operations = logged_life(trial)
    choice = random.Random(seed)
    total = rounds(3, 0.15)
    crashes = sorted(choice.randrange(len(operations)) for _ in range(total))
    replay = Replay(trial.data_dir, ACKNOWLEDGED)
    for number, operation in enumerate(operations):
        while crashes and crashes[0] == number:
            crashes.pop(0)
            tally.rounds += 1
            state = make_trial(tally, config={"durability": durability})
            tally.fired += replay.materialize(state.data_dir, choice, operation) > 0
            promise = promise_at(replay, trial.promises[0], state.folder / "ledger-0")
            state.promises = [replace(promise, survives=survives)]
            judge_state(state, f"cut at call {number}", durability == "power", another_boot(tmp_path))
            shutil.rmtree(state.folder)
        replay.apply(operation)
    assert {word for word, *_ in replay.acknowledged} == {"flushed", "sealed", "drops"}
    assert tally.fired > 0


def judge_state(state: Trial, title: str, must_be_sound: bool, boot: str) -> None:
    """Readers, verify, recover, and a new tracer."""
    try:
        rows = state.judge(boot_id_file=boot)
        recovered = state.folder / "recovered"
        log = state.folder / "recover.log"
        script = state.server.start(
            {
                "kind": "script",
                "source": RECOVER,
                "args": [str(state.data_dir), str(recovered), "sound" if must_be_sound else ""],
                "log": str(log),
                "boot_id_file": boot,
            }
        )
        assert state.wait(script) == 0, script.output()
        request = {"data_dir": str(recovered), "promises": [asdict(promise) for promise in state.promises]}
        assert state.judge(**request, boot_id_file=boot) >= rows, "recover has lost what a reader reads"
        assert state.verify(boot_id_file=boot) == rows
    except AssertionError as finding:
        raise AssertionError(f"{title}: {finding}") from None
