"""The interpreter ends while the core still works for it: the process ends as it should, and at once.

Each case is a process of its own, for it is the end of the process that is looked at.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ending_programs import last_words_of

RECORDER = """
import sys
from ml_debugger import _core
store = _core.Store(sys.argv[1], rank=0, durability="process")
recorder = store.recorder(
    0, overflow="block", on_error="raise", ring_bytes=1 << 16, commit_bytes=1 << 16,
    commit_interval_s=0.05, stall_timeout_s=20.0,
)
"""

# What the end of a larger program does: work that lets other threads have a turn.
END_SLOWLY = """
import time
class Slow:
    def __del__(self, now=time.monotonic):  # an argument, since modules may be empty by then
        end = now() + 0.05
        while now() < end:
            pass
slow = Slow()
"""


@pytest.mark.parametrize("megabytes", [0.001, 1, 30])
def test_threads_that_work_without_the_gil_at_the_end_do_not_abort_the_process(megabytes: float) -> None:
    """The smallest mostly wait for the GIL when the end begins, the largest ask for it long after."""
    program = """
import sys, threading, time
from ml_debugger import _core
data = bytearray(int(float(sys.argv[1]) * 1e6))
def work():
    while True:
        _core.crc32c(data)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""
    last_words_of(program + END_SLOWLY, str(megabytes))


def test_a_thread_whose_work_without_the_gil_fails_at_the_end_does_not_abort_the_process(
    tmp_path: Path,
) -> None:
    program = """
import sys, threading, time
from ml_debugger import _core
from ml_debugger.errors import NotFoundError
def work():
    while True:
        try:
            _core.Segment(sys.argv[1], sealed=True)
        except NotFoundError:
            pass
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""
    last_words_of(program + END_SLOWLY, str(tmp_path / "missing"))


@pytest.mark.parametrize("wait", ["flush", "close"])
def test_a_recorder_can_be_waited_for_by_what_the_end_of_the_interpreter_deletes(
    tmp_path: Path, wait: str
) -> None:
    program = f"""
class Trainer:
    def __init__(self):
        self.recorder = recorder
        self.recorder.begin_call(0, 1)
        self.recorder.capture_buffer(0, b"x")
        self.recorder.end_call(b"\\xc0", 1, 0)
    def __del__(self):
        self.recorder.{wait}(5.0)
        print(self.recorder.counters()["rows_committed"], "committed")
trainer = Trainer()
"""
    assert last_words_of(RECORDER + program, str(tmp_path)) == "1 committed\n"


def test_a_broken_call_that_stays_open_does_not_outlive_the_interpreter(tmp_path: Path) -> None:
    program = """
import signal
class Interrupt(Exception):
    pass
def interrupt(*_):
    raise Interrupt
signal.signal(signal.SIGALRM, interrupt)
recorder.begin_call(0, 1)
signal.setitimer(signal.ITIMER_REAL, 0.02)
try:
    recorder.capture_buffer(0, bytes(30_000_000))
except Interrupt:
    print("interrupted")
print(recorder.close(5.0))
store.close()
"""
    assert last_words_of(RECORDER + program, str(tmp_path)) == "interrupted\nTrue\n"
