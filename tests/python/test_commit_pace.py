"""When rows are committed: as `commit_interval_s` says, also where that is more than the default."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# In a process of its own: tracers of one process share the writer, which goes by the most eager of them.
# It waits longer than the default interval, after which a writer that went by that would have committed. A
# writer that was woken to open the attempt may take the first rows with it; then the next ones wait.
SCRIPT = """
import sys, time
import torch
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

config = TracerConfig(data_dir=sys.argv[1], commit_interval_s=3600.0)
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
with ClassificationTracer(model, "m", "v", config=config) as tracer:
    for tries in range(5):
        tracer(torch.zeros(2, 4), None, ["a", "b"])
        time.sleep(0.7)
        before = tracer.stats()
        if before.rows_in_flight == 2:
            break
    else:
        raise AssertionError(before)
    tracer.flush()
    after = tracer.stats()
    assert (after.rows_in_flight, after.commits) == (0, before.commits + 1), after
"""


def test_rows_wait_as_long_as_commit_interval_s_allows(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
