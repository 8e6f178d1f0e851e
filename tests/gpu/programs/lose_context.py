"""Loses the CUDA context to a failed device-side assertion, traced or not, and prints what happened.

Arguments: device, ``traced`` or ``untraced``. Last line: JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from ml_debugger import TracerConfig, _core
from ml_debugger.errors import MlDebuggerError
from ml_debugger.training import ClassificationTracer
from patterns import Emitter, pattern
from recording import TAP, row_ids

BATCH_SIZE, GOOD_CALLS, CPU_CALLS = 4, 20, 10
device, is_traced = torch.device(sys.argv[1]), sys.argv[2] == "traced"


class Failing(Emitter):
    """From its call `GOOD_CALLS` on it reads outside of a table, which a GPU notices later."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(8, 4, device=device)

    def forward(self, values: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        index = 3 if self.forwards < GOOD_CALLS else 99
        logits = super().forward(values, memory)
        row = self.table[torch.full((1,), index, device=device)]
        return logits + row.sum()


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def stats_of(tracer: ClassificationTracer) -> dict[str, Any]:
    values = asdict(tracer.stats())
    return {name: value for name, value in values.items() if name.startswith("rows_")}


answer: dict[str, Any] = {}
model, host_model = Failing(), Emitter()
config = TracerConfig(commit_interval_s=0.05)
if is_traced:
    tracer = ClassificationTracer(model, "net", "gpu", TAP, config=config)
    host_tracer = ClassificationTracer(host_model, "net", "cpu", TAP, config=config)
try:
    for call in range(GOOD_CALLS + 5):
        values = pattern((BATCH_SIZE, 4096), torch.float32, call, device)
        if is_traced:
            tracer(values, None, row_ids(call, BATCH_SIZE))
        else:
            model(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
    answer["raised"] = None
except Exception as error:
    answer["raised"] = text_of(error)
if is_traced:
    for call in range(CPU_CALLS):  # the host goes on
        host_tracer(pattern((BATCH_SIZE, 64), torch.float32, call), None, row_ids(call, BATCH_SIZE))
    host_tracer.flush()
    answer["cpu_before_close"] = stats_of(host_tracer)
    answer["trouble"] = []
    for end in (tracer.flush, tracer.close, host_tracer.flush, host_tracer.close):
        try:
            end()
        except MlDebuggerError as error:
            answer["trouble"].append(f"{end.__qualname__} {text_of(error)}")
    answer["gpu"], answer["cpu"] = stats_of(tracer), stats_of(host_tracer)
    answer["report"] = _core.device_report()
print(json.dumps(answer), flush=True)
