"""Forks with CUDA in use and copies on their way. The child records on the CPU; the parent goes on.

Argument: device. Last line: JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ml_debugger.training import ClassificationTracer
from patterns import Emitter, pattern, same_bits
from recording import TAP, check_nothing_lost, keep_busy, row_ids, stored

device = torch.device(sys.argv[1])


class Numbers(Dataset[Any]):
    """Batches made by worker processes, which are forked."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return pattern((64,), torch.float32, index), index


def child(inherited: ClassificationTracer) -> int:
    """0 if an inherited tracer is inert and a new one of the child's own works."""
    logits = inherited(torch.ones(4, 8), None, row_ids(0, 4))  # the plain forward
    if logits.tolist() != [[0, 1], [2, 3], [4, 5], [6, 7]]:
        return 1
    inherited.close()
    with ClassificationTracer(Emitter(), "net", "child", TAP) as tracer:
        for call in range(5):
            tracer(pattern((4, 64), torch.float32, call), None, row_ids(call, 4))
    check_nothing_lost(tracer.stats())
    expected = torch.cat([pattern((4, 64), torch.float32, call) for call in range(5)])
    return 0 if same_bits(stored("out", "child"), expected) else 2


tracer = ClassificationTracer(Emitter(), "net", "parent", TAP)
for call in range(8):
    if call == 1:
        keep_busy(device, 1.0)
    tracer(pattern((4, 1 << 14), torch.float32, call, device), None, row_ids(call, 4))
pid = os.fork()
if pid == 0:
    status = 9
    try:
        status = child(tracer)
    finally:
        os._exit(status)
_, waited = os.waitpid(pid, 0)
for call in range(8, 16):
    tracer(pattern((4, 1 << 14), torch.float32, call, device), None, row_ids(call, 4))
tracer.close()
check_nothing_lost(tracer.stats())
expected = torch.cat([pattern((4, 1 << 14), torch.float32, call) for call in range(16)])
parent_is_exact = same_bits(stored("out", "parent"), expected)

with ClassificationTracer(Emitter(), "net", "loader", TAP) as loading:
    for values, numbers in DataLoader(Numbers(), batch_size=4, num_workers=2, multiprocessing_context="fork"):
        loading(values.to(device), numbers, numbers)
check_nothing_lost(loading.stats())
loaded = torch.stack([pattern((64,), torch.float32, number) for number in range(32)])
labels = stored("label", "loader", "ground_truth").tolist()
answer = {
    "child": os.waitstatus_to_exitcode(waited),
    "parent": parent_is_exact,
    "loader": same_bits(stored("out", "loader"), loaded) and labels == list(range(32)),
}
print(json.dumps(answer), flush=True)
