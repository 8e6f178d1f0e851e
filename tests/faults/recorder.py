"""A program that records like a training loop: several tracers, several threads each, steps from a list.

Every call notes what it is about to submit in the ledger, and what `flush` and `stats` have acknowledged.
What the layers return is known before the forward, bit for bit: the notes owe nothing to the code under test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from acknowledgements import DROP_BEGUN, DROPPED, REFUSED, RETURNED, Ledger, Shape
from ml_debugger import TracerConfig
from ml_debugger.errors import MlDebuggerError
from ml_debugger.training import ClassificationTracer

LAW = ("committed", "discarded", "failed", "in_flight")
EPOCHS_A_ROUND = 8
ACKNOWLEDGED = "/acknowledged"  # no file; see Recorder._announce
WIDTHS = (16, 3000)  # floats a row: one tracer's captures ride in the header, the other's take chunks


class Doubling(nn.Module):
    """Twice the first four values: exact in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :4] * self.factor


class Scene(nn.Module):
    """A tap that gives its input, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.head = Doubling()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tap(x))


def crc_of_call(ids: list[str], features: bytes, logits: bytes, labels: bytes) -> int:
    """What a call consists of, in one number."""
    crc = zlib.crc32("\n".join(ids).encode())
    for part in (features, logits, labels):
        crc = zlib.crc32(part, crc)
    return crc


def make_call(number: int, lane: int, call: int, width: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Inputs, labels and ids of a call: a function of its arguments."""
    base = zlib.crc32(f"{number}.{lane}.{call}".encode())
    rows = 1 + base % 7
    values = (np.arange(rows * width, dtype=np.int64) * 40503 + base) % 16777213
    x = torch.from_numpy(values.astype(np.float32).reshape(rows, width))
    labels = torch.arange(rows) + base % 10
    return x, labels, [f"{number}.{lane}.{call}.{row}" for row in range(rows)]


def version_of(tracer: int) -> str:
    return f"v{tracer}"


class HookClock:
    """Times what runs between its two hooks of a layer: the tracer's own, added in between."""

    def __init__(self, layer: nn.Module, times: list[tuple[float, float]]) -> None:
        self._layer, self._times = layer, times
        self._begin = threading.local()
        layer.register_forward_hook(self._start)

    def end_here(self) -> None:
        """From here on; to be called when the tracer has added its hook."""
        self._layer.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._begin.at = time.monotonic()

    def _stop(self, *_: object) -> None:
        self._times.append((self._begin.at, time.monotonic() - self._begin.at))


def lost_nothing(tracer: ClassificationTracer) -> bool:
    """Whether a flush acknowledges every row: under "discard" and "warn" it returns when some are lost."""
    stats = tracer.stats()
    return stats.rows_discarded == 0 and stats.rows_failed == 0


class Recorder:
    """One run of the program; see `run` for the steps."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._shape = Shape(**job["shape"])
        self._ledger = Ledger(Path(job["ledger"]), self._shape)
        self._number: int = job["number"]
        self._config = TracerConfig(data_dir=job["data_dir"], **job.get("config", {}))
        self._widths: list[int] = job.get("widths", list(WIDTHS))
        self._tracers: list[ClassificationTracer] = []
        self._next = [0] * self._shape.lanes
        # Rounds never share an epoch, since a drop takes an epoch of all attempts.
        self._base_epoch = self._first_epoch = self._number * EPOCHS_A_ROUND
        self._stop = threading.Event()
        self._enough = threading.Event()  # set by SIGUSR1: training ends, the next steps follow
        self._hook_times: list[tuple[float, float]] = []  # start, seconds
        self._watching = threading.Lock()
        self._settled = [dict.fromkeys(("submitted", *LAW), 0) for _ in range(self._shape.tracers)]

    def run(self) -> None:
        """Take the steps of the job, one after another.

        ``["open"]``, ``["recreate"]``, ``["close"]``, ``["flush"]``, ``["train", calls or None, epochs]``,
        ``["drop", epoch of this round]``, ``["drop_all"]``, ``["export", path]``, ``["sleep", seconds]``,
        ``["limit", name, value]``, ``["starve", whom, number, ever]``, ``["feed"]``, and
        ``["stop"]``, which waits for a SIGCONT. With ``tolerant`` our errors end a step, not the run.
        """
        # Waited for, since a handler runs only when the main thread happens to wake up.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=self._wait_for_the_end, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        tolerant = self._job.get("tolerant", False)
        for name, *arguments in self._job["steps"]:
            try:
                getattr(self, f"_step_{name}")(*arguments)
            except (MlDebuggerError, MemoryError) as error:
                self._note(name, error)
                if not tolerant:
                    raise
                if name in ("open", "recreate"):
                    break
        self._stop.set()

    def _note(self, where: str, error: BaseException) -> None:
        self._say(f"{where}: {type(error).__name__}: {error}")

    @staticmethod
    def _say(line: str) -> None:
        """To the log; a system call of ours may be the one that a fault was meant for."""
        with contextlib.suppress(OSError):
            os.write(1, f"{time.monotonic():.3f} {line}\n".encode())

    # Steps

    def _open(self, **kwargs: Any) -> None:
        for number in range(self._shape.tracers):
            scene = Scene()
            clock = HookClock(scene.tap, self._hook_times) if "hook_times" in self._job else None
            tracer = ClassificationTracer(
                scene,
                "net",
                version_of(number),
                {"features": "tap"},
                additional_fields=[{"name": "call", "type": "int"}],
                config=self._config,
                **self._job.get("tracer", {}),
                **kwargs,
            )
            if clock is not None:
                clock.end_here()
            self._ledger.tracers["closed"][number] = 0
            self._tracers.append(tracer)

    def _step_open(self) -> None:
        self._open()

    def _step_recreate(self) -> None:
        self._mark_all_drops(DROP_BEGUN)
        self._open(force_table_recreate=True)
        self._mark_all_drops(DROPPED)

    def _step_close(self) -> None:
        marks = list(self._next)
        tracers, self._tracers = self._tracers, []
        if "hook_times" in self._job:
            np.save(self._job["hook_times"], np.array(self._hook_times))
        with self._watching:  # else an old figure could overwrite the final one
            pass
        first: MlDebuggerError | MemoryError | None = None
        for number, tracer in enumerate(tracers):
            begin = time.monotonic()
            try:
                tracer.close()
            except (MlDebuggerError, MemoryError) as error:
                first = first or error
            else:
                self._acknowledge(number, tracer, marks, "flushed", "sealed")
            self._say(f"closed after {time.monotonic() - begin:.3f} s")
            self._write_stats(number, tracer, closed=True)
        if first is not None:
            raise first

    def _step_flush(self, timeout: float | None = None) -> None:
        marks = list(self._next)
        for number, tracer in enumerate(self._tracers):
            begin = time.monotonic()
            try:
                tracer.flush(timeout)
            finally:
                self._say(f"flushed after {time.monotonic() - begin:.3f} s")
            self._acknowledge(number, tracer, marks, "flushed")

    def _step_train(self, calls: int | None, epochs: int) -> None:
        threads = [
            threading.Thread(target=self._train, args=(lane, calls, epochs), name=f"lane-{lane}")
            for lane in range(self._shape.lanes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._first_epoch += epochs

    def _step_drop(self, epoch: int) -> None:
        epoch += self._base_epoch
        for number, tracer in enumerate(self._tracers):
            self._ledger.drops[number][epoch] = DROP_BEGUN
            self._announce("drops", number, epoch, DROP_BEGUN)
            tracer.drop_epoch_data(epoch)
            self._ledger.drops[number][epoch] = DROPPED
            self._announce("drops", number, epoch, DROPPED)

    def _step_drop_all(self) -> None:
        for number, tracer in enumerate(self._tracers):
            self._ledger.drops[number][: self._first_epoch] = DROP_BEGUN
            tracer.drop_version_data()
            self._ledger.drops[number][: self._first_epoch] = DROPPED

    def _step_export(self, path: str) -> None:
        for number, tracer in enumerate(self._tracers):
            tracer.export(Path(path) / f"{version_of(number)}.zip")

    def _step_stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _step_limit(self, name: str, value: str) -> None:
        """Lower a resource limit of this process; ``value`` may say how much it has now."""

        def vm_bytes() -> int:
            return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

        soft = eval(value, {"os": os, "vm_bytes": vm_bytes})
        kind = getattr(resource, name)
        resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
        self._say(f"limited {name} to {soft}")

    def _step_starve(self, whom: str, number: int, ever: bool) -> None:
        """Let allocations of the core fail, from the N-th on or only that one; `failing_allocator.cpp`."""
        span = [0, 0]
        if whom == "user":  # Python and torch have their memory; all that the writer does is the core's
            lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
            parts = [line[0].split("-") for line in lines if "/_core." in line[-1]]
            span = [min(int(part[0], 16) for part in parts), max(int(part[1], 16) for part in parts)]
        ctypes.CDLL(None).starve(*map(ctypes.c_ulong, span), ctypes.c_long(number), int(ever))

    def _step_feed(self) -> None:
        """No allocation fails any more; says how many there were, and how many have failed."""
        library = ctypes.CDLL(None)
        self._say(f"allocations {library.feed()} failed {library.failed()}")

    def _step_sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    # Recording

    def _wait_for_the_end(self) -> None:
        signal.sigwait({signal.SIGUSR1})
        self._enough.set()

    def _acknowledge(self, number: int, tracer: ClassificationTracer, marks: list[int], *what: str) -> None:
        if not lost_nothing(tracer):
            return
        for lane in self._lanes_of(number):
            for word in what:
                self._ledger.lanes[word][lane] = marks[lane]
                self._announce(word, lane, marks[lane])

    def _announce(self, word: str, *numbers: int) -> None:
        """To whoever logs system calls: an acknowledgement has its place among them."""
        if self._job.get("announce"):
            os.access("/".join([ACKNOWLEDGED, word, *map(str, numbers)]), os.F_OK)

    def _lanes_of(self, tracer: int) -> range:
        return range(tracer * self._shape.threads, (tracer + 1) * self._shape.threads)

    def _mark_all_drops(self, state: int) -> None:
        """Of all epochs so far, those of earlier rounds too."""
        self._ledger.drops[:, : self._first_epoch] = state

    def _train(self, lane: int, calls: int | None, epochs: int) -> None:
        tracer = self._tracers[lane // self._shape.threads]
        first = self._next[lane]
        last = self._shape.calls if calls is None else min(first + calls, self._shape.calls)
        every = self._job.get("flush_every", 5)
        pause_s = self._job.get("pause_s", 0.0)
        for call in range(first, last):
            if self._enough.is_set():
                return
            step = (call - first) * epochs // calls if calls else call // 50 % epochs
            epoch = self._first_epoch + step
            self._next[lane] = call + 1
            try:
                self._call(tracer, lane, call, epoch)
                if every and call % every == every - 1:
                    tracer.flush()
                    if lost_nothing(tracer):
                        self._ledger.lanes["flushed"][lane] = call + 1
                        self._announce("flushed", lane, call + 1)
            except (MlDebuggerError, MemoryError) as error:
                self._ledger.lanes["errors"][lane] += 1
                self._note("call", error)
                if not self._job.get("tolerant", False):
                    os._exit(3)
            if pause_s:
                time.sleep(pause_s)
        if calls is None:
            self._enough.wait()

    def _call(self, tracer: ClassificationTracer, lane: int, call: int, epoch: int) -> None:
        width = self._widths[lane // self._shape.threads % len(self._widths)]
        x, labels, ids = make_call(self._number, lane, call, width)
        logits = x[:, :4] * 2
        crc = crc_of_call(ids, x.numpy().tobytes(), logits.numpy().tobytes(), labels.numpy().tobytes())
        self._ledger.begin(lane, call, crc, len(ids), epoch)
        begin = time.monotonic()
        try:
            output = tracer(x, labels, ids, "train", epoch, call=call)
        except BaseException:
            self._ledger.end(lane, call, REFUSED)
            raise
        finally:
            if (seconds := time.monotonic() - begin) > 1:
                self._say(f"a call took {seconds:.3f} s")
        if not torch.equal(output, logits):
            raise AssertionError("the tracer changed the output")
        self._ledger.end(lane, call, RETURNED)

    # Accounts

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            with self._watching:
                for number, tracer in enumerate(list(self._tracers)):
                    self._write_stats(number, tracer, closed=False)

    def _write_stats(self, number: int, tracer: ClassificationTracer, *, closed: bool) -> None:
        stats = tracer.stats()
        cell = self._ledger.tracers
        before = self._settled[number]
        for unit in ("rows_", "bytes_"):
            if getattr(stats, f"{unit}submitted") != sum(getattr(stats, unit + word) for word in LAW):
                cell["law_broken"][number] = 1
        if not closed:
            cell["committed"][number] = before["committed"] + stats.rows_committed
            return
        for word in ("submitted", *LAW):
            before[word] += getattr(stats, f"rows_{word}")
            cell[word][number] = before[word]
        cell["closed"][number] = 1


def main(job: dict[str, Any]) -> int:
    """Run a job in this process; returns the exit status."""
    try:
        Recorder(job).run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0
