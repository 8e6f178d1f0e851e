"""Question: does the cost of a call stay a + b·bytes: for every batch size, epoch, number of calls, after a
fork?

Method: a model of three layers that compute nothing (256 floats a sample each), ids, labels, data on tmpfs.
Batches: blocks of calls at B = 1 to 8192, drained within their time; lines through wall and through CPU time
a call against bytes a call, weighted so that each size counts alike, give a and b, and each size is compared
with its line (by CPU time: at large sizes the wall is that of the memory behind tmpfs). Epochs: CPU time of
a call at B = 32 while the epoch is always the same, changes every call between two, rises through many, or
goes round robin through them, over that of one epoch. Fork: seconds of the first call after `os.fork`, with
the child alive, over that of an ordinary one. Memory and handles: anonymous and locked memory, descriptors
and threads over many calls from two threads with epochs in turn, their slope over the last 80 %; 10^6 calls
in a full run. What was stored is counted and read back in part; with a row lost there is no figure.

Excluded: opening and closing. The kernel's own memory for open files is not seen.
"""

from __future__ import annotations

import os
import signal
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
from benchmarks.harness.blocks import Arm, Block, run_blocks, step_seconds
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

NAME = "cpu_scaling"
QUESTION = "Does the cost of a call stay a + b·bytes, for every batch size, epoch and number of calls?"
LAYERS, WIDTH = 3, 256
EPOCH_BATCH = 32
LOOKS = 50


class Recording:
    """A tracer over `Layers` and one batch for it."""

    def __init__(self, folder: Path, version: str, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(batch_size)
        self.values = torch.randn((batch_size, WIDTH), generator=generator)
        self.labels = torch.zeros(batch_size, dtype=torch.int64)
        self.ids = [f"sample-{row:08d}" for row in range(batch_size)]
        self.version, self.folder = version, folder
        model = Layers(LAYERS, torch.zeros(batch_size, 10))
        config = TracerConfig(data_dir=folder, durability="process")
        self.tracer = ClassificationTracer(model, "benchmark", version, model.paths(), config=config)
        self.calls = 0

    def call(self, epoch: int) -> None:
        self.tracer(self.values, self.labels, self.ids, "train", epoch)
        self.calls += 1

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self.call(0)

    def finish(self) -> dict[str, Any]:
        """Close, check that every row is there and what the first epoch holds; what was lost."""
        self.tracer.flush()
        losses = settings.losses_of(self.tracer)
        self.tracer.close()
        settings.check_nothing_lost(losses, self.version)
        trace = open_trace("benchmark", self.version, data_dir=self.folder)
        rows = trace.num_rows("extracted_feature")
        if rows != self.calls * len(self.ids):
            raise settings.WrongDataError(
                f"{self.version}: expected {self.calls * len(self.ids)} rows, there are {rows}"
            )
        epoch = min(trace.epochs)
        for batch in trace.iter_batches(
            "extracted_feature", batch_size=len(self.ids), n_epoch=epoch, columns=["layer0"]
        ):
            if not np.array_equal(batch["layer0"], self.values.numpy()):
                raise settings.WrongDataError(f"{self.version} reads back different")
        return losses


def measure(setting: Setting) -> Findings:
    with one_thread():
        batches, batch_blocks = time_batches(setting)
        settings.empty_folder(setting.memory_dir)
        epochs, epoch_samples = time_epochs(setting)
        settings.empty_folder(setting.memory_dir)
        fork, fork_samples = time_fork(setting)
        settings.empty_folder(setting.memory_dir)
        memory, memory_samples = watch_memory(setting)
        settings.empty_folder(setting.memory_dir)
    bars = [
        Bar("a: us a call at no bytes", batches["a_us"]),
        Bar("CPU time at the size that is furthest from the line / line", batches["furthest_from_line"]),
        *(Bar(f"epochs, {name}: CPU / one epoch", found["cpu_ratio"]) for name, found in epochs.items()),
        Bar("first call after a fork / a call", fork["first_over_ordinary"].median),
        Bar("anonymous memory, KiB over the last 80 %", memory["growth"]["RssAnon"] / 1024),
        Bar("descriptors over the last 80 %", memory["growth"]["descriptors"]),
    ]
    summary = {"batches": batches, "epochs": epochs, "fork": fork, "memory": memory}
    samples = {
        "batches": batch_blocks,
        "epochs": epoch_samples,
        "fork_s": fork_samples,
        "memory": memory_samples,
    }
    return Findings(setting.described(), samples, summary, "(see label)", bars)


def time_batches(setting: Setting) -> tuple[dict[str, Any], dict[str, list[Block]]]:
    """The line through the cost of calls of many sizes."""
    sizes = (1, 8) if setting.is_quick else (1, 8, 32, 128, 512, 2048, 8192)
    rounds = 2 if setting.is_quick else 15 if setting.is_full else 5
    found: dict[str, dict[str, float]] = {}
    samples: dict[str, list[Block]] = {}
    losses = {}
    for size in sizes:  # each alone: the ring and the writer are shared by all tracers of a process
        recording = Recording(setting.memory_dir, f"batch{size}", size)
        calls = 20 if setting.is_quick else max(30, min(2000, 65536 // size))
        recording.run(5)
        blocks = run_blocks({"call": Arm(recording.run, recording.tracer.flush)}, rounds=rounds, steps=calls)
        losses[str(size)] = recording.finish()
        stats = losses[str(size)]
        found[str(size)] = {
            "us": step_seconds(blocks, "call").median * 1e6,
            "cpu_us": step_seconds(blocks, "call", clock="cpu_s").median * 1e6,
            "bytes": stats["bytes_committed"] / recording.calls,
        }
        samples[str(size)] = blocks
        settings.empty_folder(setting.memory_dir)
    size_bytes = np.array([entry["bytes"] for entry in found.values()])
    lines = {}
    for clock in ("us", "cpu_us"):
        took = np.array([entry[clock] for entry in found.values()])
        b, a = np.polyfit(size_bytes, took, 1, w=1 / took)
        lines[clock] = {"a": float(a), "b": float(b), "at_sizes": (took / (a + b * size_bytes)).tolist()}
    summary = {
        "by_batch_size": found,
        "lines": lines,
        "a_us": lines["us"]["a"],
        "furthest_from_line": max(lines["cpu_us"]["at_sizes"], key=lambda ratio: abs(ratio - 1)),
        "losses": losses,
    }
    return summary, samples


def time_epochs(setting: Setting) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """CPU time of a call under several orders of epochs."""
    calls = 30 if setting.is_quick else 1000
    many = 10 if setting.is_quick else 1000 if setting.is_full else 100
    rounds = 2 if setting.is_quick else 5
    orders: dict[str, Callable[[int], int]] = {
        "one": lambda call: 0,
        "two in turn": lambda call: call % 2,
        f"{many} in order": lambda call: call * many // calls,
        f"{many} round robin": lambda call: call % many,
    }
    samples: dict[str, list[float]] = {name: [] for name in orders}
    losses = {}
    for number in range(rounds + 1):
        for name, epoch_of in orders.items():
            recording = Recording(setting.memory_dir, f"{name} {number}", EPOCH_BATCH)
            recording.run(5)
            recording.tracer.flush()
            began = time.process_time()
            for call in range(calls):
                recording.call(epoch_of(call))
            recording.tracer.flush()
            took = time.process_time() - began
            losses[name] = recording.finish()
            if number:
                samples[name].append(took / calls)
            settings.empty_folder(setting.memory_dir)
    base = estimate_median(samples["one"]).median
    summary = {
        name: {
            "cpu_us_a_call": estimate_median(values).median * 1e6,
            "cpu_ratio": estimate_median(values).median / base,
            "losses": losses[name],
        }
        for name, values in samples.items()
    }
    return summary, samples


def time_fork(setting: Setting) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The first call after a fork has the pages of the process to itself again, one fault at a time."""
    rounds = 3 if setting.is_quick else 30
    recording = Recording(setting.memory_dir, "fork", 256)
    recording.run(20)
    samples: dict[str, list[float]] = {"ordinary": [], "first": []}
    for _ in range(rounds):
        recording.tracer.flush()
        samples["ordinary"].append(_seconds(lambda: recording.call(0)))
        recording.tracer.flush()
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        try:
            samples["first"].append(_seconds(lambda: recording.call(0)))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    losses = recording.finish()
    ratios = [first / ordinary for first, ordinary in zip(samples["first"], samples["ordinary"], strict=True)]
    return {"first_over_ordinary": estimate_median(ratios), "losses": losses}, samples


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def watch_memory(setting: Setting) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """What the process holds, over many calls from two threads with epochs in turn."""
    calls = 200 if setting.is_quick else 1_000_000 if setting.is_full else 100_000
    recording = Recording(setting.memory_dir, "memory", 1)
    for call in range(calls // 10):  # every epoch has its segment, every page has been touched
        recording.call(call % 4)
    recording.tracer.flush()
    samples: list[dict[str, float]] = []
    failures: list[BaseException] = []
    begin = threading.Barrier(2)

    def work(thread: int) -> None:
        try:
            begin.wait()
            for call in range(calls // 2):
                recording.tracer(
                    recording.values, recording.labels, recording.ids, "train", (call + thread) % 4
                )
                if thread == 0 and call % max(1, calls // 2 // LOOKS) == 0:
                    samples.append(held_by_process())
        except BaseException as error:
            failures.append(error)
            begin.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recording.calls += calls // 2 * 2
    if failures:
        raise failures[0]
    losses = recording.finish()
    tail = samples[len(samples) // 5 :]
    growth = {}
    for key in tail[0]:
        values = np.array([sample[key] for sample in tail])
        slope = np.polyfit(np.arange(len(values)), values, 1)[0] if len(values) > 1 else 0.0
        growth[key] = float(slope * (len(values) - 1))
    return {"calls": calls, "growth": growth, "losses": losses}, samples


def held_by_process() -> dict[str, float]:
    """Bytes of anonymous and locked memory, descriptors, threads; zeros where the kernel does not tell."""
    held = {"RssAnon": 0.0, "VmLck": 0.0, "descriptors": 0.0, "threads": 0.0}
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmLck"):
                held[name] = float(value.split()[0]) * 1024
        held["descriptors"] = float(len(os.listdir("/proc/self/fd")))
        held["threads"] = float(len(os.listdir("/proc/self/task")))
    except OSError:
        pass
    return held
