"""Question: how fast is an export, beside copying and hashing the same bytes?

Method: a trace of 512 features a sample in calls of 256; then in turn an export without deduplication (and
one with it), and `cp` and `sha256sum` of the archive it made, on the disk with everything in the page
cache. Median of the ratios of the pairs. Memory: the highest anonymous memory of the process during the
export less that before it. The archive is read back by numpy and compared bit for bit; with a row lost
there is no figure.

Excluded: recording; the write-back of the archive, on both sides.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu.models import Layers
from benchmarks.cpu.training_overhead import one_thread
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "cpu_export"
QUESTION = "How fast is an export, beside copying and hashing the same bytes?"
ROWS, FEATURES = 256, 512
LOOK_S = 0.005


def measure(setting: Setting) -> Findings:
    calls = 8 if setting.is_quick else 4000 if setting.is_full else 1000  # half a MiB each
    rounds = 2 if setting.is_quick else 7 if setting.is_full else 4
    model = Layers(1, torch.zeros(ROWS, 10))
    generator = torch.Generator().manual_seed(setting.seed)
    batches = [torch.randn((ROWS, FEATURES), generator=generator) for _ in range(4)]
    samples: dict[str, list[float]] = {"every row": [], "deduplicated": [], "cp and sha256sum": []}
    memory: dict[str, list[int]] = {"every row": [], "deduplicated": []}
    config = TracerConfig(data_dir=setting.disk_dir / "data", durability="process")
    with (
        one_thread(),
        ClassificationTracer(model, "benchmark", "export", model.paths(), config=config) as tracer,
    ):
        for number in range(calls):
            ids = list(range(number * ROWS, (number + 1) * ROWS))
            tracer(batches[number % 4], None, ids, "train", 0)
        tracer.flush()
        losses = settings.losses_of(tracer)
        settings.check_nothing_lost(losses, "export")
        for number in range(rounds + 1):  # the first brings everything into the page cache
            for name in ("every row", "deduplicated"):
                target = setting.disk_dir / "archive.zip"
                took_s, peak = watched(lambda: tracer.export(target, dedupe=name != "every row"))  # noqa: B023
                if number:
                    samples[name].append(took_s)
                    memory[name].append(peak)
                check_archive(target, batches, calls)
            size = target.stat().st_size
            took_s = copy_and_hash(target, setting.disk_dir / "copy.zip")
            if number:
                samples["cp and sha256sum"].append(took_s)
            target.unlink()
    ratios = {
        name: estimate_median(
            [copied / ours for ours, copied in zip(samples[name], samples["cp and sha256sum"], strict=True)]
        )
        for name in memory
    }
    summary = {
        "archive_bytes": size,
        "rows": calls * ROWS,
        "speed_over_cp_and_sha256sum": ratios,
        "bytes_per_s": {name: size / estimate_median(samples[name]).median for name in samples},
        "memory_bytes": {name: max(peaks) for name, peaks in memory.items()},
        "losses": losses,
    }
    bars = [Bar(f"export, {name}", found.median, found.low, found.high) for name, found in ratios.items()]
    unit = "speed / cp + sha256sum"
    return Findings(setting.described(), {"s": samples, "memory": memory}, summary, unit, bars, 0.8)


def copy_and_hash(source: Path, target: Path) -> float:
    """Seconds of `cp` and `sha256sum`, one after the other."""
    began = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sha256sum", str(target)], check=True, stdout=subprocess.DEVNULL)
    took_s = time.perf_counter() - began
    target.unlink()
    return took_s


def anonymous_bytes() -> int:
    """Of this process, as the kernel counts them; 0 where it does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def watched(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of ``run`` and the highest growth of anonymous memory seen meanwhile."""
    done, highest, before = threading.Event(), [0], anonymous_bytes()

    def look() -> None:
        while not done.wait(LOOK_S):
            highest[0] = max(highest[0], anonymous_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    try:
        run()
        took_s = time.perf_counter() - began
    finally:
        done.set()
        watcher.join()
    return took_s, max(0, highest[0] - before)


def check_archive(path: Path, batches: list[torch.Tensor], calls: int) -> None:
    """The archive holds every row, in the order of the calls.

    Raises:
        WrongDataError: It does not.
    """
    with np.load(path) as archive:
        features = archive["extracted_feature/layer0"]
    expected = (calls * ROWS, FEATURES)
    if features.shape != expected:
        raise settings.WrongDataError(f"the archive has features {features.shape}, expected {expected}")
    for number in range(calls):
        if not np.array_equal(features[number * ROWS : (number + 1) * ROWS], batches[number % 4].numpy()):
            raise settings.WrongDataError(f"call {number} of the archive differs from what was recorded")
