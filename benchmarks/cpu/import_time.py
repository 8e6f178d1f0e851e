"""Question: what does `import ml_debugger.training` add to `import torch`?

Method: processes of their own, one after the other, each of which imports torch and then this package, whose
byte code is there from a first process that does not count; CPU time of the second import, and wall time,
which holds what the disk had to read. Medians with intervals; one small run is recorded and committed at the
end of each process, so that what is deferred is not forgotten: its time from the first call on is listed
(`first_call_s`), with the rows.

Excluded: torch, which takes a hundred times as long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting

NAME = "cpu_import_time"
QUESTION = "What does `import ml_debugger.training` add to `import torch`?"
DEADLINE_S = 120
PROGRAM = """
import json, sys, time
import torch
wall, cpu = time.perf_counter(), time.process_time()
import ml_debugger.training
told = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
began = time.perf_counter()
config = ml_debugger.TracerConfig(data_dir=sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
layers = {"features": "0"}
with ml_debugger.training.ClassificationTracer(model, "m", "v", layers, config=config) as tracer:
    tracer(torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64), list(range(8)))
    tracer.flush()
    told["first_call_s"] = time.perf_counter() - began
    from benchmarks.harness.setting import losses_of
    told["losses"] = losses_of(tracer)
print(json.dumps(told))
"""


def measure(setting: Setting) -> Findings:
    processes = 2 if setting.is_quick else 9
    one_process(setting)
    samples = [one_process(setting) for _ in range(processes)]
    summary: dict[str, Any] = {
        key: estimate_median([sample[key] for sample in samples])
        for key in ("cpu_s", "wall_s", "first_call_s")
    }
    summary["losses"] = samples[-1]["losses"]
    bars = [
        Bar(label, found.median * 1e3, found.low * 1e3, found.high * 1e3)
        for label, found in (("CPU time", summary["cpu_s"]), ("wall time", summary["wall_s"]))
    ]
    return Findings(setting.described(), samples, summary, "ms", bars, 20.0)


def one_process(setting: Setting) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", PROGRAM, str(setting.memory_dir / "data")]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=True
    )
    settings.empty_folder(setting.memory_dir)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    settings.check_nothing_lost(told["losses"], NAME)
    return told
