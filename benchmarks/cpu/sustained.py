"""Question: how many bytes a second are captured and committed, beside a bare write of the same bytes?

Method: pairs in turn: a file written by `pwrite` in pieces of 1 MiB from a warm buffer, and a tracer that
records the same bytes (4 MiB a call in one layer that computes nothing) until its flush has returned, each
into a new place. First pairs of every kind warm memory and page cache and do not count. On tmpfs for the
software's own cost, on the disk for the whole: ``durability="power"`` beside `pwrite` with an `fdatasync`
and a 4 KiB O_DSYNC write after every 32 MiB; ``"process"`` until the tracer's close has sealed and synced its
segment, beside `pwrite` with one `fdatasync` at the end, so that both wait for the disk and not for the page
cache alone. CPU seconds are
those of all threads of the process. Latency of a flush of one small call is listed. Bytes on disk are those
of the files' blocks after close, for columns of 1 MiB a call, for 512 features at B = 32 and at B = 1. Each
trace is read back (the last call bit for bit, the rows by their number); with a row lost there is no figure.

Excluded: opening the tracer, closing it except where it is named, reading back.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.cpu.models import Layers
from benchmarks.cpu.training_overhead import one_thread
from benchmarks.harness import setting as settings
from benchmarks.harness.estimates import describe_samples, estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "cpu_sustained"
QUESTION = "How many bytes a second are captured and committed, beside a bare write of the same bytes?"
PIECE_BYTES = 1 << 20
GROUP_BYTES = 32 << 20
CALL_SHAPE = (256, 4096)
Durability = Literal["process", "power"]
Sync = Literal["never", "at the end", "every group"]
Sample = dict[str, float]


def measure(setting: Setting) -> Findings:
    samples: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    bars: list[Bar] = []
    with one_thread():
        for place, folder in (("tmpfs", setting.memory_dir), ("disk", setting.disk_dir)):
            for durability in ("process", "power"):
                name = f"{place}, {durability}"
                samples[name], summary[name] = time_pairs(setting, folder, durability)
                for figure, label in (
                    ("throughput", "throughput / bare write"),
                    ("cpu", "CPU s / bare write"),
                ):
                    found = summary[name][f"{figure}_ratio"]
                    bars.append(Bar(f"{name}: {label}", found.median, found.low, found.high))
            settings.empty_folder(folder)
        summary["bytes_on_disk"] = {
            label: disk_bytes_over_payload(setting, shape, calls)
            for label, shape, calls in (
                ("columns of 1 MiB a call", (256, 1024), 64),
                ("512 features, B = 32", (32, 512), 256),
                ("512 features, B = 1", (1, 512), 1024),
            )
        }
    for label, found in summary["bytes_on_disk"].items():
        bars.append(Bar(f"bytes on disk / payload, {label}", found["ratio"]))
    options = {**setting.described(), "call_shape": CALL_SHAPE, "piece_bytes": PIECE_BYTES}
    return Findings(options, samples, summary, "ratio", bars, 1.0)


def time_pairs(
    setting: Setting, folder: Path, durability: Durability
) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    values = torch.randn(CALL_SHAPE, generator=torch.Generator().manual_seed(setting.seed))
    calls = 4 if setting.is_quick else 512 if setting.is_full else 128
    rounds = 2 if setting.is_quick else 12 if setting.is_full else 6
    raw: list[Sample] = []
    traced: list[Sample] = []
    losses: list[dict[str, Any]] = []
    flush_s: list[float] = []
    to_disk = folder == setting.disk_dir
    sync: Sync = "every group" if durability == "power" else "at the end" if to_disk else "never"
    for number in range(rounds + 1):
        bare = write_bare(folder / "bare", values, calls, sync)
        ours, lost, latencies = write_traced(
            folder / "traced", values, calls, durability, until_closed=sync == "at the end"
        )
        if number == 0:
            continue  # memory, page cache and the ring are warm from here on
        raw.append(bare)
        traced.append(ours)
        losses.append(lost)
        flush_s += latencies
    total = calls * values.nbytes
    summary = {
        "bytes": total,
        "throughput_ratio": _ratio(raw, traced, "wall_s"),
        "cpu_ratio": _ratio(traced, raw, "cpu_s"),
        "bytes_per_s": estimate_median([total / sample["wall_s"] for sample in traced]),
        "bare_bytes_per_s": estimate_median([total / sample["wall_s"] for sample in raw]),
        "cpu_s_a_gb": estimate_median([sample["cpu_s"] / total * 1e9 for sample in traced]),
        "bare_cpu_s_a_gb": estimate_median([sample["cpu_s"] / total * 1e9 for sample in raw]),
        "flush_s": describe_samples(flush_s),
        "losses": losses[-1],
        "rows_lost": sum(lost["rows_submitted"] - lost["rows_committed"] for lost in losses),
    }
    return {"bare": raw, "traced": traced}, summary


def _ratio(over: list[Sample], under: list[Sample], key: str) -> Any:
    return estimate_median([a[key] / max(b[key], 1e-9) for a, b in zip(over, under, strict=True)])


def timed(run: Callable[[], Any]) -> Sample:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    run()
    return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}


def write_bare(path: Path, values: torch.Tensor, calls: int, sync: Sync) -> Sample:
    """The same bytes by `pwrite`, made durable as a database would."""
    buffer = memoryview(values.numpy()).cast("B")
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    meta = os.open(f"{path}.meta", os.O_CREAT | os.O_WRONLY | os.O_DSYNC, 0o600)

    def run() -> None:
        offset = synced_to = 0
        for _ in range(calls):
            for begin in range(0, len(buffer), PIECE_BYTES):
                offset += os.pwrite(file, buffer[begin : begin + PIECE_BYTES], offset)
            if sync == "every group" and offset - synced_to >= GROUP_BYTES:
                os.fdatasync(file)
                os.pwrite(meta, bytes(4096), 0)
                synced_to = offset
        if sync != "never":
            os.fdatasync(file)
            os.pwrite(meta, bytes(4096), 0)

    try:
        sample = timed(run)
        if os.pread(file, PIECE_BYTES, (calls - 1) * len(buffer)) != bytes(buffer[:PIECE_BYTES]):
            raise settings.WrongDataError("the bare write reads back different")
    finally:
        os.close(file)
        os.close(meta)
        path.unlink()
        Path(f"{path}.meta").unlink()
    return sample


def write_traced(
    folder: Path, values: torch.Tensor, calls: int, durability: Durability, *, until_closed: bool = False
) -> tuple[Sample, dict[str, Any], list[float]]:
    """The same bytes by a tracer; what was lost, and seconds of flushes of one small call each."""
    rows = len(values)
    ids = list(range(rows))
    model = Layers(1, torch.zeros(rows, 2))
    config = TracerConfig(data_dir=folder, durability=durability)
    with ClassificationTracer(model, "benchmark", "sustained", model.paths(), config=config) as tracer:
        latencies = []
        for _ in range(6):  # after the first the segment is made and the ring is there
            tracer(values, None, ids, "flush")
            latencies.append(timed(tracer.flush)["wall_s"])

        losses: dict[str, Any] = {}

        def run() -> None:
            for _ in range(calls):
                tracer(values, None, ids)
            tracer.flush()
            losses.update(settings.losses_of(tracer))
            if until_closed:
                tracer.close()

        sample = timed(run)
    settings.check_nothing_lost(losses, "sustained")
    if losses["rows_committed"] != (calls + 6) * rows:
        raise settings.WrongDataError(f"sustained: expected {(calls + 6) * rows} rows, got {losses}")
    stored = settings.read_column(folder, "sustained", "layer0", dataset_type="flush")
    settings.check_equal(stored[-rows:], values, "sustained")
    shutil.rmtree(folder)
    return sample, losses, latencies[1:]


def disk_bytes_over_payload(setting: Setting, shape: tuple[int, int], calls: int) -> dict[str, Any]:
    """Blocks of the store's files over what was captured: features, 10 logits, label and id."""
    calls = min(calls, 16) if setting.is_quick else calls
    folder = setting.disk_dir / "size"
    rows = shape[0]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(setting.seed))
    model = Layers(1, torch.zeros(rows, 10))
    labels, ids = torch.zeros(rows, dtype=torch.int64), [f"sample-{row:08d}" for row in range(rows)]
    config = TracerConfig(data_dir=folder)
    with ClassificationTracer(model, "benchmark", "size", model.paths(), config=config) as tracer:
        for _ in range(calls):
            tracer(values, labels, ids)
        tracer.flush()
        losses = settings.losses_of(tracer)
    settings.check_nothing_lost(losses, "size")
    stored = settings.read_column(folder, "size", "layer0")
    settings.check_equal(stored, values.repeat(calls, 1), "size")
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("data.mdb"))
    shutil.rmtree(folder)
    return {"ratio": used / losses["bytes_committed"], "bytes_on_disk": used, "losses": losses}
