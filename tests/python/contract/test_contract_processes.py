"""Contract 3 for whole processes under adverse conditions: daemon threads at exit, development mode, a stuck
writer at exit, forks and kill -9 at any moment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from contract_children import verify_segments
from contract_models import Net, batch, by_id, raw_bytes, rows_of

from ml_debugger import TracerConfig, open_trace

DAEMON = """
import threading, time
from contract_models import Net, batch
from ml_debugger.training import ClassificationTracer

tracer = ClassificationTracer(Net(), "net", "v1", {"hidden": "body"})
count = 0

def train():
    global count
    while True:
        tracer(*batch(4, count), n_epoch=count % 2)
        count += 1

threading.Thread(target=train, daemon=True).start()
while count < 50:
    time.sleep(0.01)
print(count, flush=True)
"""


def test_a_process_ends_cleanly_while_a_daemon_thread_still_records(run_child: Any, store: Path) -> None:
    done = run_child(DAEMON)
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr
    seen = int(done.stdout)
    assert rows_of() % 4 == 0 and rows_of() >= 4 * seen
    assert verify_segments(store) >= 1


def test_development_mode_finds_nothing_to_complain_about(run_child: Any, store: Path) -> None:
    done = run_child(
        """
        from contract_models import Net, batch
        from ml_debugger import open_trace
        from ml_debugger.training import ClassificationTracer

        with ClassificationTracer(Net(), "net", "v1", {"hidden": "body"}) as tracer:
            for i in range(20):
                tracer(*batch(4, i), n_epoch=i % 2)
            tracer.get_hooked_features("hidden")
            tracer.export(__import__("sys").argv[1])
            tracer.drop_epoch_data(0)
        assert open_trace("net", "v1").num_rows("extracted_feature") == 40
        """,
        store.parent / "out.zip",
        env={"PYTHONDEVMODE": "1"},
    )
    assert done.stderr == ""


def test_a_process_ends_within_close_timeout_when_the_disk_hangs(run_child: Any, store: Path) -> None:
    done = run_child(
        """
        import contract_gate, os, subprocess, sys, time
        from contract_models import Net, batch
        from ml_debugger import TracerConfig
        from ml_debugger.training import ClassificationTracer

        config = TracerConfig(close_timeout_s=1.0, stall_timeout_s=1.0, commit_interval_s=0.05)
        tracer = ClassificationTracer(Net(), "net", "v1", {"hidden": "body"}, config=config)
        tracer(*batch(4, 0))
        tracer.flush()
        gate = subprocess.Popen([sys.executable, contract_gate.__file__, os.environ["MLD_DATA_DIR"]],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert gate.stdout.readline().startswith("held 1")
        tracer(*batch(4, 1))
        print(time.time(), flush=True)
        """,
        expect=None,
    )
    assert time.time() - float(done.stdout) < 30
    assert done.returncode >= 0, f"ended by signal {-done.returncode}\n{done.stderr}"
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr
    assert rows_of() in (4, 8)


FORKS = """
import faulthandler, os, random, threading, time
import torch
from contract_models import batch, check_law, rows_of
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

# No matrix product: the libraries behind it take locks, and a fork may inherit one that is held.
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Tanh()

    def forward(self, x):
        return self.body(x)[:, :3] * 2

random.seed(7)
model = Model()
config = TracerConfig(commit_interval_s=0.005)
tracer = ClassificationTracer(model, "net", "v1", {"hidden": "body"}, config=config)
stop, counts = False, [0, 0]

def train(thread):
    while not stop:
        tracer(*batch(4, 2 * counts[thread] + thread), n_epoch=counts[thread] % 3)
        counts[thread] += 1

def child(version):
    faulthandler.dump_traceback_later(30, exit=True)
    tracer(*batch(4, 0))
    with ClassificationTracer(model, "net", version, {"hidden": "body"}, config=config) as mine:
        for i in range(10):
            mine(*batch(4, i), n_epoch=i % 2)
    assert mine.stats().rows_committed == 40

threads = [threading.Thread(target=train, args=(t,)) for t in range(2)]
for thread in threads:
    thread.start()
for number in range(10):
    time.sleep(0.02 * random.random())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(f"c{number}")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, number
stop = True
for thread in threads:
    thread.join()
tracer.close()
stats = tracer.stats()
check_law(stats)
assert stats.rows_committed == 4 * sum(counts) == rows_of()
assert [rows_of("net", f"c{number}") for number in range(10)] == [40] * 10
"""


def test_forks_at_any_moment_while_threads_record_leave_parent_and_children_sound(
    run_child: Any, store: Path
) -> None:
    run_child(FORKS)
    assert verify_segments(store) >= 11


KILLS = """
import os, random, signal, struct, sys, time
from contract_models import Net, batch
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

random.seed(int(sys.argv[2]))
ledger = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
ROUNDS = 15
os.ftruncate(ledger, 8 * ROUNDS)

def record(number):
    durability = "power" if number % 2 else "process"
    config = TracerConfig(durability=durability, commit_interval_s=0.003)
    tracer = ClassificationTracer(Net(), "net", f"r{number}", {"hidden": "body"}, config=config)
    call = 0
    while True:
        for _ in range(5):
            tracer(*batch(4, call), n_epoch=call % 3)
            call += 1
        tracer.flush()
        os.pwrite(ledger, struct.pack("<q", call), 8 * number)

for number in range(ROUNDS):
    pid = os.fork()
    if pid == 0:
        try:
            record(number)
        finally:
            os._exit(1)
    time.sleep(0.25 * random.random())
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "the recorder ended by itself"
"""


def test_kill_9_at_any_moment_keeps_all_that_was_flushed_and_only_whole_calls(
    run_child: Any, make_tracer: Any, store: Path
) -> None:
    ledger = store.parent / "ledger"
    run_child(KILLS, ledger, 11)
    flushed = np.fromfile(ledger, dtype="<i8")
    assert flushed.max() > 0
    body = Net().body
    for number, calls in enumerate(flushed.tolist()):
        version = f"r{number}"
        before = rows_of("net", version)
        assert before % 4 == 0 and before >= 4 * calls
        durability = "power" if number % 2 else "process"
        tracer = make_tracer(version=version, config=TracerConfig(durability=durability))
        tracer(*batch(4, 10_000))
        tracer.close()
        stored = by_id(open_trace("net", version).tensors("extracted_feature"), "hidden")
        assert len(stored) == before + 4
        seen = sorted({int(key[1:].split("-")[0]) for key in stored})
        assert set(range(calls)) <= set(seen)
        for call in seen:
            x, _, ids = batch(4, call)
            expected = body(x).detach()
            assert [raw_bytes(stored[key]) for key in ids] == [raw_bytes(row) for row in expected]
    assert verify_segments(store) >= 15
