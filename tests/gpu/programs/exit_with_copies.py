"""Records many batches on a stream that runs late, and ends without close(), as the argument says."""

from __future__ import annotations

import sys

import torch

from ml_debugger import _core
from ml_debugger.training import ClassificationTracer
from patterns import Emitter, pattern
from recording import TAP, keep_busy, row_ids

device, ending, calls = torch.device(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tracer = ClassificationTracer(Emitter(), "net", "v1", TAP)
tracer(pattern((4, 1 << 14), torch.float32, 0, device), None, row_ids(0, 4))
keep_busy(device, 2.0)
for call in range(1, calls):
    tracer(pattern((4, 1 << 14), torch.float32, call, device), None, row_ids(call, 4))
report = _core.device_report()
assert tracer.stats().rows_committed <= 4 or device.type == "cpu", "the copies were to be on their way still"
assert device.type == "cpu" or (report["copies"] and report["pinned"] and not report["synchronous_copies"])
if ending == "raises":
    raise ValueError("the end of a training run")
if ending == "sys.exit":
    sys.exit(7)
