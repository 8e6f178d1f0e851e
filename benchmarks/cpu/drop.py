"""Question: how long until a dropped epoch is invisible, and until its disk space is back?

Method: epochs of one size are recorded, and files of as many bytes are written; everything is synced, since
an unlink waits for pages that are on their way to the disk. In turn one epoch is dropped and one file is
unlinked, on the disk. A second thread looks for the epoch's directory without a pause: invisible is when it
is gone. The space is back when `drop_epoch_data` has returned. Sizes of 1 MiB to 256 MiB (1 GiB in a full
run) show whether the size matters. The remaining epoch is read back and compared; with a row lost there is
no figure.

Excluded: recording; what the filesystem does later.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.models import Layers
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "cpu_drop"
QUESTION = "How long until a dropped epoch is invisible, and until its disk space is back?"
CALL_SHAPE = (256, 1024)  # 1 MiB
LOOK_S = 0.0002


def measure(setting: Setting) -> Findings:
    sizes = (1, 2) if setting.is_quick else (1, 64, 256, 1024) if setting.is_full else (1, 64, 256)
    summary: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    bars: list[Bar] = []
    for megabytes in sizes:
        name = f"{megabytes} MiB"
        samples[name], losses = time_drops(setting, megabytes)
        invisible = estimate_median([sample["invisible_s"] for sample in samples[name]])
        back = estimate_median([sample["drop_s"] / sample["unlink_s"] for sample in samples[name]])
        more = estimate_median([sample["drop_s"] - sample["unlink_s"] for sample in samples[name]])
        summary[name] = {
            "invisible_s": invisible,
            "drop_over_unlink": back,
            "drop_minus_unlink_s": more,
            "losses": losses,
        }
        bars.append(
            Bar(f"{name}: invisible", invisible.median * 1e3, invisible.low * 1e3, invisible.high * 1e3)
        )
        bars.append(Bar(f"{name}: drop - unlink", more.median * 1e3, more.low * 1e3, more.high * 1e3))
    return Findings(setting.described(), samples, summary, "ms", bars, 20.0)


def time_drops(setting: Setting, megabytes: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    rounds = 3 if setting.is_quick else 6
    values = torch.randn(CALL_SHAPE, generator=torch.Generator().manual_seed(setting.seed))
    ids = list(range(len(values)))
    model = Layers(1, torch.zeros(len(values), 2))
    folder = setting.disk_dir / "data"
    config = TracerConfig(data_dir=folder, durability="process")
    samples = []
    with ClassificationTracer(model, "benchmark", "drop", model.paths(), config=config) as tracer:
        for epoch in range(rounds + 1):
            for _ in range(megabytes):
                tracer(values, None, ids, "train", epoch)
        tracer.flush()
        losses = settings.losses_of(tracer)
        settings.check_nothing_lost(losses, "drop")
        os.sync()
        for epoch in range(rounds):
            path = next(folder.glob(f"benchmark-*/drop-*/rank-*/epoch-{epoch}"))
            invisible_s, drop_s = watched_drop(tracer, epoch, path)
            samples.append(
                {"invisible_s": invisible_s, "drop_s": drop_s, "unlink_s": unlink_file(setting, megabytes)}
            )
        left = settings.read_column(folder, "drop", "layer0", n_epoch=rounds)
        settings.check_equal(left, values.repeat(megabytes, 1), "drop")
    shutil.rmtree(folder)
    return samples, losses


def watched_drop(tracer: ClassificationTracer, epoch: int, path: Path) -> tuple[float, float]:
    """Seconds until the epoch's directory is gone, and until the drop has returned."""
    gone: list[float] = []

    def look() -> None:
        while path.exists():
            time.sleep(LOOK_S)
        gone.append(time.perf_counter())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    dropped = tracer.drop_epoch_data(epoch)
    took_s = time.perf_counter() - began
    watcher.join()
    if not dropped["extracted_feature"]:
        raise settings.WrongDataError(f"epoch {epoch} had no rows to drop: {dropped}")
    return gone[0] - began, took_s


def unlink_file(setting: Setting, megabytes: int) -> float:
    """Seconds of the unlink of a file of that size."""
    path = setting.disk_dir / "file"
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(4096) * 256)
        file.flush()
        os.fsync(file.fileno())  # else it has no blocks yet that an unlink would give back
    began = time.perf_counter()
    path.unlink()
    return time.perf_counter() - began
