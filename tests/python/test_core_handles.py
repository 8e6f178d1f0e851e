"""Handles of the core that threads share: closed or dropped in one while another works with them.

What would crash or hang runs in a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ending_programs import last_words_of
from ml_debugger import _core
from ml_debugger.errors import InvalidInputError, TracerClosedError

CALLS = 2000


def make_recorder(store: _core.Store) -> _core.Recorder:
    return store.recorder(
        0,
        overflow="block",
        on_error="raise",
        ring_bytes=1 << 20,
        commit_bytes=1 << 20,
        commit_interval_s=0.05,
        stall_timeout_s=20.0,
    )


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed segment whose headers take a reader a few milliseconds."""
    directory = tmp_path_factory.mktemp("rank")
    store = _core.Store(str(directory), rank=0, durability="process")
    recorder = make_recorder(store)
    for _ in range(CALLS):
        recorder.begin_call(0, 1)
        recorder.capture_buffer(0, b"abc" * 1000)
        recorder.end_call(b"\xc0", 1, 0)
    recorder.close(20.0)
    store.close()
    return directory / "epoch-0" / "a00000-s00000"


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[_core.Recorder]:
    store = _core.Store(str(tmp_path / "rank"), rank=0, durability="process")
    made = make_recorder(store)
    yield made
    made.close(20.0)
    store.close()


@pytest.mark.parametrize("work", ["headers(None, 100000)", "scan(None, 100000, **identity)"])
def test_a_segment_that_is_closed_in_another_thread_is_read_to_the_end(segment: Path, work: str) -> None:
    program = f"""
import sys, threading, time
from ml_debugger import _core
identity = dict(rank=0, attempt=0, epoch=0, sequence=0)
for _ in range(20):
    segment = _core.Segment(sys.argv[1], sealed=True)
    found = []
    reader = threading.Thread(target=lambda: found.append(segment.{work}))
    reader.start()
    time.sleep(0.0005)
    segment.close()
    reader.join()
    calls = len(found[0]["keys"]) // 8 if isinstance(found[0], dict) else len(found[0])
    assert calls == {CALLS}, calls
"""
    last_words_of(program, str(segment))


def test_a_closed_segment_says_so(segment: Path) -> None:
    handle = _core.Segment(str(segment), sealed=True)
    handle.close()
    handle.close()
    with pytest.raises(InvalidInputError, match="closed"):
        handle.meta()


def test_a_drop_keeps_the_trace_locked_though_its_handle_is_closed_meanwhile(tmp_path: Path) -> None:
    """A drop that no writer thread does is done by the caller, without the GIL."""
    for epoch in range(40):
        for call in range(20):
            (tmp_path / f"epoch-{epoch}" / f"a00000-s{call:05}").mkdir(parents=True)
    lock = str(tmp_path / "writer.lock")
    store = _core.Store(str(tmp_path), rank=0, durability="process")
    ended: list[bool] = []

    def drop() -> None:
        store.drop_all(timeout_s=20.0)
        ended.append(True)

    thread = threading.Thread(target=drop)
    thread.start()
    while (tmp_path / "epoch-0").exists() and not ended:
        pass  # until it has begun
    store.close()
    while _core.is_locked(lock):
        pass
    assert not list(tmp_path.glob("epoch-*"))
    thread.join()
    with pytest.raises(TracerClosedError):
        store.drop_all(timeout_s=20.0)


def test_the_last_recorder_is_let_go_of_without_the_gil(tmp_path: Path) -> None:
    """Its destructor joins the writer thread, which here waits for another process's lock."""
    pytest.importorskip("lmdb")
    program = """
import subprocess, sys, threading, time
from ml_debugger import _core
store = _core.Store(sys.argv[1], rank=0, durability="process")
recorders = [store.recorder(
    0, overflow="block", on_error="raise", ring_bytes=1 << 20, commit_bytes=1 << 20,
    commit_interval_s=0.01, stall_timeout_s=20.0,
)]
def call():
    recorders[0].begin_call(0, 1)
    recorders[0].capture_buffer(0, b"x")
    recorders[0].end_call(b"\\xc0", 1, 0)
call()
recorders[0].flush(5.0)
holder = subprocess.Popen([sys.executable, "-c", '''
import sys, lmdb
held = lmdb.open(sys.argv[1], map_size=4 << 30, max_dbs=2, max_readers=510).begin(write=True)
print("held", flush=True)
sys.stdin.read()
''', sys.argv[1] + "/epoch-0/a00000-s00000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
holder.stdout.readline()
call()
time.sleep(0.1)  # the writer waits for the lock now
let_go = threading.Thread(target=recorders.clear)
let_go.start()
time.sleep(0.1)
print("waiting" if let_go.is_alive() else "ended")
holder.communicate()
let_go.join()
"""
    assert last_words_of(program, str(tmp_path)) == "waiting\n"


def test_a_hook_of_no_recorder_is_refused(recorder: _core.Recorder) -> None:
    wrong: list[Any] = [None, 3, object.__new__(object), _core.Recorder.__new__(_core.Recorder)]
    for value in wrong:
        with pytest.raises(TypeError, match=r"_core\.Recorder"):
            _core.CaptureHook(value, 0, lambda output: output)
    assert _core.CaptureHook(recorder, 0, lambda output: output) is not None


def test_out_of_memory_in_a_hook_is_a_memory_error(tmp_path: Path) -> None:
    """Python itself runs out of memory after 0, 1, ... allocations, until the operation has what it needs."""
    pytest.importorskip("_testcapi")
    program = """
import sys, copy, _testcapi
from ml_debugger import _core
import ml_debugger.errors
store = _core.Store(sys.argv[1], rank=0, durability="process")
recorder = store.recorder(
    0, overflow="block", on_error="raise", ring_bytes=1 << 20, commit_bytes=1 << 20,
    commit_interval_s=0.01, stall_timeout_s=20.0,
)
wrong = object()
taken = [(number, number) for number in range(3000)]  # else the interpreter has tuples in reserve
hook = _core.CaptureHook(recorder, 0, lambda output: wrong)  # neither a tensor nor taken
def call_hook():
    hook(None, (), None)
def starve(operation, expected=None):
    failures = 0
    for number in range(400):
        error = None
        _testcapi.set_nomemory(number)
        try:
            operation()
        except BaseException as caught:
            error = caught
        finally:
            _testcapi.remove_mem_hooks()
        if isinstance(error, MemoryError):
            failures += 1
        elif number - failures > 20:
            break
    assert failures, operation
    assert expected is None and error is None or isinstance(error, expected), error
recorder.begin_call(0, 1)
starve(call_hook, ml_debugger.errors.InvalidTypeError)
recorder.abort_call()
starve(lambda: copy.deepcopy(hook))
starve(lambda: hook.__reduce__())
starve(lambda: _core.CaptureHook(recorder, 0, call_hook))
print(recorder.close(20.0))
store.close()
"""
    assert last_words_of(program, str(tmp_path)) == "True\n"
