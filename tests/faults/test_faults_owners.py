"""Two openers by every path, forks from inside of hooks, and exits that nobody planned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from disks import require_tools, tmpfs
from fork_server import HERE
from trials import Score, Trial

RECORDING = [["open"], ["train", None, 2], ["close"]]
OPEN = """
import sys, time
from ml_debugger import TracerConfig, errors
from ml_debugger.training import ClassificationTracer
from recorder import Scene

def try_to_open(data_dir):
    begin = time.monotonic()
    try:
        tracer = ClassificationTracer(
            Scene(), "net", "v0", {"features": "tap"}, additional_fields=[{"name": "call", "type": "int"}],
            config=TracerConfig(data_dir=data_dir, ring_bytes=1 << 20))
    except errors.TraceInUseError:
        print(f"in use, seen after {time.monotonic() - begin:.3f} s", flush=True)
    else:
        print("opened", flush=True)
        tracer.close()
"""


def run_script(trial: Trial, source: str, *args: object) -> str:
    """In another process than the owner's; returns what it printed."""
    log = trial.folder / f"script-{len(list(trial.folder.glob('script-*')))}.log"
    process = trial.server.start(
        {"kind": "script", "source": source, "args": list(map(str, args)), "log": str(log)}
    )
    assert trial.wait(process, 40.0) == 0, process.output()
    return process.output()


def start_owner(trial: Trial) -> Any:
    process = trial.start(RECORDING, pause_s=0.005)
    deadline = time.monotonic() + 40
    while not trial.promises[-1].open().lanes["flushed"].any():
        assert time.monotonic() < deadline and process.stop_state() not in "Z?", process.output()
        time.sleep(0.01)
    return process


def end_owner(trial: Trial, process: Any) -> None:
    os.kill(process.pid, signal.SIGUSR1)
    assert trial.wait(process) == 0, process.output()
    trial.verify()


@contextmanager
def bind_mount(source: Path, target: Path) -> Iterator[None]:
    target.mkdir()
    done = subprocess.run(["mount", "--bind", str(source), str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


def hard_link_tree(source: Path, target: Path) -> None:
    """A copy of a directory whose files are the same inodes."""
    for folder, _, names in os.walk(source):
        here = target / Path(folder).relative_to(source)
        here.mkdir(parents=True)
        for name in names:
            os.link(Path(folder) / name, here / name)


@pytest.mark.parametrize("path", ["bind mount", "hard links", "stopped owner"])
def test_a_second_process_is_refused_at_once_by_every_path(
    path: str, make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score(f"second opener, another process: {path}")
    trial = make_trial(tally)
    tally.rounds += 1
    owner = start_owner(trial)
    other = tmp_path / "other"
    call = OPEN + "try_to_open(ARGS[0])"
    if path == "bind mount":
        require_tools("mount")
        with bind_mount(trial.data_dir, other):
            assert os.stat(other).st_ino == os.stat(trial.data_dir).st_ino
            said = run_script(trial, call, other)
    elif path == "hard links":
        hard_link_tree(trial.data_dir, other)
        said = run_script(trial, call, other)
    else:
        os.kill(owner.pid, signal.SIGSTOP)
        owner.wait_until_stopped()
        said = run_script(trial, call, trial.data_dir)
        assert owner.stop_state() == "T"
        os.kill(owner.pid, signal.SIGCONT)
    assert said.startswith("in use"), said
    assert float(said.split()[-2]) < 5
    tally.fired += 1
    end_owner(trial, owner)


SAME_PROCESS = (
    OPEN
    + """
from ml_debugger import open_trace
first = ClassificationTracer(
    Scene(), "net", "v0", {"features": "tap"}, additional_fields=[{"name": "call", "type": "int"}],
    config=TracerConfig(data_dir=ARGS[0], ring_bytes=1 << 20))
import torch
first(torch.ones(2, 16), None, ["a", "b"], call=1)
first.flush()
try_to_open(ARGS[1])
assert open_trace("net", "v0", data_dir=ARGS[1]).num_rows("extracted_feature") == 2
first(torch.ones(2, 16), None, ["c", "d"], call=2)
first.close()
assert open_trace("net", "v0", data_dir=ARGS[0]).num_rows("extracted_feature") == 4
"""
)


@pytest.mark.parametrize("path", ["symlink", "bind mount"])
def test_a_second_opener_in_the_same_process_shares_by_every_path(
    path: str, make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score(f"second opener, same process: {path}")
    trial = make_trial(tally)
    trial.data_dir.mkdir()
    tally.rounds += 1
    other = tmp_path / "other"
    if path == "symlink":
        other.symlink_to(trial.data_dir)
        said = run_script(trial, SAME_PROCESS, trial.data_dir, other)
    else:
        require_tools("mount")
        with bind_mount(trial.data_dir, other):
            said = run_script(trial, SAME_PROCESS, trial.data_dir, other)
    assert said == "opened\n"
    tally.fired += 1


LOCKS = """
import os, sys
from pathlib import Path
import torch
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer
from recorder import Scene

def locks():
    own = [line.split()[1:] for line in open("/proc/locks") if f" {os.getpid()} " in line]
    return sorted(own)

tracer = ClassificationTracer(Scene(), "net", "v0", {"features": "tap"},
                              config=TracerConfig(data_dir=ARGS[0], ring_bytes=1 << 20))
for epoch in range(3):
    tracer(torch.ones(2, 16), None, ["a", "b"], n_epoch=epoch)
tracer.flush()
open_trace("net", "v0", data_dir=ARGS[0]).arrays("extracted_feature")
before = locks()  # the writer's lock; of three live segments LMDB's, and one that says that readers live here
assert len(before) == 7, before
tracer.export(ARGS[1])
trace = open_trace("net", "v0", data_dir=ARGS[0])
trace.arrays("extracted_feature")
list(trace.iter_batches("extracted_feature", batch_size=1))
after = locks()
assert after == before, (before, after)
tracer.close()
assert not locks()
print("same locks")
"""


def test_export_and_reading_leave_the_locks_of_the_process_alone(
    make_trial: Callable[..., Any], score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score("locks of the process, before and after export and reading")
    trial = make_trial(tally)
    tally.rounds += 1
    assert run_script(trial, LOCKS, trial.data_dir, tmp_path / "out.zip") == "same locks\n"
    tally.fired += 1


FORK_IN_HOOK = """
import os
import torch
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer
from recorder import Scene

model, children = Scene(), []

def fork(layer, inputs, output):
    if (pid := os.fork()) == 0:
        return None  # goes on with the forward, in the middle of an inherited call
    children.append(pid)

def leave(layer, inputs, output):
    if os.getpid() != parent:
        os._exit(0 if torch.equal(output, inputs[0][:, :4] * 2) else 1)

parent = os.getpid()
config = TracerConfig(data_dir=ARGS[0], ring_bytes=1 << 20, commit_interval_s=0.001)
model.tap.register_forward_hook(fork)
tracer = ClassificationTracer(model, "net", "v0", {"features": "tap"}, config=config)
model.tap.register_forward_hook(fork)
model.head.register_forward_hook(leave)
for call in range(15):
    tracer(torch.full((2, 16), float(call)), None, [f"{call}-0", f"{call}-1"])
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 30
tracer.close()
stats = tracer.stats()
assert stats.rows_submitted == stats.rows_committed == 30, stats
found = open_trace("net", "v0", data_dir=ARGS[0]).arrays("extracted_feature")
assert found["features"][:, 0].tolist() == [float(call) for call in range(15) for _ in range(2)]
print("sound")
"""


def test_forks_from_hooks_before_and_behind_ours_leave_parent_and_children_sound(
    make_trial: Callable[..., Any], score: Callable[[str], Score]
) -> None:
    tally = score("fork inside a forward hook")
    trial = make_trial(tally)
    tally.rounds += 30
    assert run_script(trial, FORK_IN_HOOK, trial.data_dir).endswith("sound\n")
    tally.fired += 30


ENDS = """
import sys, threading, time
import torch
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer
from recorder import Scene
torch.set_num_threads(1)

config = TracerConfig(data_dir=sys.argv[1], **eval(sys.argv[2]))
tracer = ClassificationTracer(Scene(), "net", "v0", {"features": "tap"}, config=config)

def train(lane, pause_s):
    call = 0
    while True:
        tracer(torch.full((2, 4096), float(call)), None, [f"{lane}-{call}-0", f"{lane}-{call}-1"])
        call += 1
        time.sleep(pause_s)
"""
TWO_INTERRUPTS = ENDS + "print('running', flush=True)\ntrain(0, 0.001)\n"
FULL_RING = (
    ENDS
    + """
for lane in range(3):
    threading.Thread(target=train, args=(lane, 0), daemon=True).start()
while not tracer.stats().stalls:
    time.sleep(0.01)
print("stalled", flush=True)
"""
)


def start_ending(source: str, data_dir: Path, config: dict[str, Any]) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "ignore", "-c", source, str(data_dir), repr(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def whole_calls(data_dir: Path) -> int:
    from ml_debugger import open_trace

    ids = open_trace("net", "v0", data_dir=data_dir).arrays("extracted_feature")["input_id"].tolist()
    calls = {key.rpartition("-")[0] for key in ids}
    assert len(ids) == len(set(ids)) == 2 * len(calls), "a call is there in part"
    return len(calls)


def test_two_interrupts_in_a_row_end_a_process_soon_with_whole_calls(
    score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score("SIGINT twice")
    tally.rounds += 1
    data_dir = tmp_path / "data"
    child = start_ending(TWO_INTERRUPTS, data_dir, {"ring_bytes": 8 << 20, "commit_interval_s": 3600.0})
    try:
        assert child.stdout is not None and child.stdout.readline() == "running\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    tally.fired += "KeyboardInterrupt" in stderr
    assert child.returncode in (1, 130, -signal.SIGINT), stderr
    assert "Fatal" not in stderr and "terminate" not in stderr, stderr
    assert whole_calls(data_dir) >= 0


def test_a_process_ends_in_time_while_threads_wait_for_a_full_ring_and_a_full_disk(
    score: Callable[[str], Score], tmp_path: Path
) -> None:
    tally = score("exit with a full ring on a full disk")
    tally.rounds += 1
    with tmpfs(tmp_path / "disk", 6) as disk:
        ballast = disk.fill(leave_bytes=2 << 20)
        config = {"ring_bytes": 1 << 20, "commit_interval_s": 0.01, "close_timeout_s": 1.0}
        child = start_ending(FULL_RING, disk.mount / "data", config)
        try:
            assert child.stdout is not None and child.stdout.readline() == "stalled\n", child.stderr.read()
            tally.fired += 1
            begin = time.monotonic()
            _, stderr = child.communicate(timeout=60)
            assert time.monotonic() - begin < 1 + 20
        finally:
            child.kill()
            child.wait()
        assert child.returncode == 0 and "Fatal" not in stderr and "terminate" not in stderr, stderr
        assert whole_calls(disk.mount / "data") > 0
        ballast.unlink()
