"""Question: how long does the first CUDA tensor of a process wait while the ring is pinned, by the ring's
size?

Method: a tracer with a new ring, closed again, for each sample; the host time of its first call with a
CUDA tensor (pinning and the setting up of the device path) and of its third. Beside it cudaHostRegister
of as many bytes of prefaulted memory, and the time until a tracer is made (which maps and prefaults the
ring). Every row is read back.

Excluded: initialising CUDA and loading kernels, which torch did before.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu.bandwidth import MIB, Passing
from benchmarks.gpu.models import synchronize
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "gpu_pinning"
QUESTION = "How long does the first CUDA tensor of a process wait while the ring is pinned?"


def measure(setting: Setting) -> Findings:
    sizes = [8 * MIB] if setting.is_quick else [64 * MIB, 256 * MIB, 1024 * MIB]
    repeats = 2 if setting.is_quick else 5
    samples: dict[str, list[dict[str, float]]] = {}
    summary: dict[str, Any] = {}
    bars: list[Bar] = []
    for ring_bytes in sizes:
        name = f"{ring_bytes // MIB} MiB"
        samples[name], losses = [], []
        for number in range(repeats):
            sample, lost = time_first_call(setting, f"pin-{ring_bytes}-{number}", ring_bytes)
            sample["bare_register_s"] = time_bare_register(setting.device, ring_bytes)
            samples[name].append(sample)
            losses.append(lost)
        summary[name] = {
            key: estimate_median([sample[key] for sample in samples[name]]) for key in samples[name][0]
        }
        summary[name]["losses"] = losses
        first = summary[name]["first_call_s"]
        bars.append(Bar(f"first call, ring of {name}", first.median, first.low, first.high))
        bare = summary[name]["bare_register_s"]
        bars.append(Bar(f"cudaHostRegister, {name}", bare.median, bare.low, bare.high))
    options = {**setting.described(), "ring_bytes": sizes, "repeats": repeats}
    return Findings(options, samples, summary, "seconds", bars)


def time_first_call(
    setting: Setting, version: str, ring_bytes: int
) -> tuple[dict[str, float], dict[str, Any]]:
    model = Passing(1, setting.device)
    values = torch.arange(1024.0, device=setting.device)[None]
    model(values)
    synchronize(setting.device)
    config = TracerConfig(data_dir=setting.memory_dir, ring_bytes=ring_bytes)
    began = time.perf_counter()
    with ClassificationTracer(model, "benchmark", version, model.layers, config=config) as tracer:
        times = {"make_s": time.perf_counter() - began}
        for key in ("first_call_s", "second_call_s", "third_call_s"):
            began = time.perf_counter()
            tracer(values, None, ["0"])
            times[key] = time.perf_counter() - began
        tracer.flush()
        losses = settings.losses_of(tracer)
    settings.check_nothing_lost(losses, f"a ring of {ring_bytes} bytes")
    stored = settings.read_column(setting.memory_dir, version, "layer0")
    settings.check_equal(stored, values.repeat(3, 1), f"a ring of {ring_bytes} bytes")
    return times, losses


def time_bare_register(device: torch.device, byte_count: int) -> float:
    """Seconds of cudaHostRegister over memory that is mapped and touched; 0 on a CPU, where there is none."""
    if device.type != "cuda":
        return 0.0
    memory = torch.ones(byte_count, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    began = time.perf_counter()
    status = runtime.cudaHostRegister(memory.data_ptr(), byte_count, 0)
    seconds = time.perf_counter() - began
    if int(status) != 0:
        raise RuntimeError(f"cudaHostRegister of {byte_count} bytes failed with {status}")
    runtime.cudaHostUnregister(memory.data_ptr())
    return seconds
