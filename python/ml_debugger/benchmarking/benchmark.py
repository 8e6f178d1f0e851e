"""Question: which part limits recording on this machine, the hook, the ring or the disk?

Method: a model that computes nothing is recorded into a new directory inside ``data_dir``: small tensors one
by one, large ones as fast as they come, with both durabilities; beside it one copy in memory and one bare
write with a sync after each group. Everything runs once before it is timed; medians of few runs. What was
recorded is read back and compared, and rows are counted.

Excluded: the user's model, GPUs, several processes. `benchmarks/` of the source tree has the long form.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from ml_debugger.benchmarking.benchmark_report import BenchmarkReport
from ml_debugger.config import TracerConfig
from ml_debugger.errors import StorageError
from ml_debugger.trace import open_trace
from ml_debugger.training import ClassificationTracer

__all__ = ["run"]

_ROWS, _WIDTH = 256, 4096
_PIECE_BYTES = 1 << 20
_MODEL_NAME = "bench"


def run(quick: bool = False, data_dir: str | os.PathLike[str] | None = None) -> BenchmarkReport:
    """Measure recording on this machine; takes about half a minute, quick some seconds.

    Writes up to 600 MB (quick: 100) into a directory of its own inside ``data_dir``, and removes it. Other
    settings are those of ``TracerConfig``, so ``MLD_RING_BYTES`` and its like are measured as they are set.

    Args:
        quick: Fewer bytes and calls: rougher figures.
        data_dir: On the disk to be measured; made if missing. Default ``MLD_DATA_DIR`` or ``./mld_data``.

    Raises:
        StorageError: The directory cannot be written, or something read back different.
        DiskBudgetError: ``MLD_MAX_BYTES`` is below what is written.
    """
    parent = Path(TracerConfig().data_dir if data_dir is None else data_dir)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=parent))
    except OSError as error:
        raise StorageError(f"cannot write into {parent}: {error}", "name another data_dir") from error
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is timed here runs on one thread in a training too
    try:
        return _Benchmark(parent, folder, quick).run()
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write into {folder}: {error}", "name another data_dir") from error
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)


class _Layers(torch.nn.Module):
    """One layer that computes nothing, and how long it took with what hangs on it."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()
        self.logits = logits
        self.took_s = 0.0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        began = time.perf_counter()
        self.layer(values)
        self.took_s = time.perf_counter() - began
        return self.logits[: len(values)]


class _Benchmark:
    def __init__(self, parent: Path, folder: Path, quick: bool) -> None:
        self._parent = parent
        self._folder = folder
        self._small_calls = 200 if quick else 2000
        self._calls = 8 if quick else 48
        self._runs = 1 if quick else 3
        self._rows_committed = 0
        self._values = torch.randn(_ROWS, _WIDTH, generator=torch.Generator().manual_seed(0))

    def run(self) -> BenchmarkReport:
        hook_us, call_us = self._time_small()
        copy_s, hook_s = self._time_large()
        process_s, _, _, _ = self._time_committed("process")
        power_s, flush_s, stalls, config = self._time_committed("power")
        disk_s = statistics.median(self._write_bare(config.commit_bytes) for _ in range(self._runs + 1))
        call_bytes = self._values.nbytes
        total = self._calls * call_bytes
        return BenchmarkReport(
            data_dir=str(self._parent),
            bytes=total,
            ring_bytes=config.ring_bytes,
            commit_bytes=config.commit_bytes,
            hook_us=hook_us,
            call_us=call_us,
            copy_bytes_per_s=call_bytes / copy_s,
            hook_bytes_per_s=call_bytes / hook_s,
            process_bytes_per_s=total / process_s,
            power_bytes_per_s=total / power_s,
            disk_bytes_per_s=total / disk_s,
            flush_ms=flush_s * 1e3,
            stalls=stalls,
            rows_committed=self._rows_committed,
        )

    def _tracer(
        self, model: _Layers, version: str, durability: Literal["process", "power"] = "process"
    ) -> ClassificationTracer:
        config = TracerConfig(
            data_dir=self._folder / version,
            mode="enabled",
            overflow="block",
            on_error="raise",
            durability=durability,
            every_n_calls=1,
            sample_fraction=1.0,
            data_rank=0,
        )
        return ClassificationTracer(model, _MODEL_NAME, version, {"layer": "layer"}, config=config)

    def _time_small(self) -> tuple[float, float]:
        """Microseconds that a hook adds, and that a call takes."""
        values, ids = torch.zeros(1, 64), ["0"]
        model = _Layers(torch.zeros(1, 2))
        bare_s, hook_s, call_s = [], [], []
        with self._tracer(model, "small") as tracer:
            for number in range(self._small_calls):
                model(values)  # outside of a call the hook does nothing
                bare = model.took_s
                began = time.perf_counter()
                tracer(values, None, ids)
                took = time.perf_counter() - began
                if number >= self._small_calls // 10:
                    bare_s.append(bare)
                    hook_s.append(model.took_s)
                    call_s.append(took)
            self._check(tracer, "small", values, self._small_calls)
        added = statistics.median(hook_s) - statistics.median(bare_s)
        return added * 1e6, statistics.median(call_s) * 1e6

    def _time_large(self) -> tuple[float, float]:
        """Seconds of a copy in memory, and of a hook that copies as much into a ring with room."""
        values, ids = self._values, list(range(_ROWS))
        model, target = _Layers(torch.zeros(_ROWS, 2)), torch.empty_like(self._values)
        copy_s, hook_s = [], []
        with self._tracer(model, "large") as tracer:
            # Once around the ring: its pages are warm then, as those of the copy are.
            warm_up = tracer.config.ring_bytes // values.nbytes + 1
            calls = warm_up + self._calls
            for number in range(calls):
                tracer(values, None, ids)
                took = model.took_s
                tracer.flush()
                copied = _seconds(lambda: target.copy_(values))
                if number >= warm_up:
                    copy_s.append(copied)
                    hook_s.append(took)
            self._check(tracer, "large", values, calls)
        return statistics.median(copy_s), statistics.median(hook_s)

    def _time_committed(
        self, durability: Literal["process", "power"]
    ) -> tuple[float, float, int, TracerConfig]:
        """Seconds to capture and commit, seconds of a small flush, waits in the ring, the settings."""
        model, ids = _Layers(torch.zeros(_ROWS, 2)), list(range(_ROWS))
        took_s, flush_s = [], []

        def record() -> None:
            for _ in range(self._calls):
                tracer(self._values, None, ids)
            tracer.flush()

        with self._tracer(model, durability, durability) as tracer:
            for _ in range(self._runs + 1):
                took_s.append(_seconds(record))
            stalls = tracer.stats().stalls
            for _ in range(5):
                tracer(self._values[:1], None, ids[:1], "flush")
                flush_s.append(_seconds(tracer.flush))
            config = tracer.config
            self._check(tracer, durability, self._values, self._calls * (self._runs + 1), other_rows=5)
        return statistics.median(took_s[1:]), statistics.median(flush_s), stalls, config

    def _write_bare(self, group_bytes: int) -> float:
        """Seconds of writing the same bytes with a sync after each group."""
        buffer, path = self._values.numpy().data.cast("B"), self._folder / "bare"
        file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)

        def write() -> None:
            offset = synced_to = 0
            for _ in range(self._calls):
                for begin in range(0, len(buffer), _PIECE_BYTES):
                    offset += os.pwrite(file, buffer[begin : begin + _PIECE_BYTES], offset)
                if offset - synced_to >= group_bytes:
                    os.fdatasync(file)
                    synced_to = offset
            os.fdatasync(file)

        try:
            return _seconds(write)
        finally:
            os.close(file)
            path.unlink()

    def _check(
        self,
        tracer: ClassificationTracer,
        version: str,
        values: torch.Tensor,
        calls: int,
        *,
        other_rows: int = 0,
    ) -> None:
        """Flush, count the rows, look at the last call's, and delete what was recorded.

        Raises:
            StorageError: Rows are missing or differ.
        """
        tracer.flush()
        stats, expected = tracer.stats(), calls * len(values) + other_rows
        self._rows_committed += stats.rows_committed
        trace = open_trace(_MODEL_NAME, version, data_dir=self._folder / version)
        stored = None
        for batch in trace.iter_batches(
            "extracted_feature", dataset_type="train", columns=["layer"], batch_size=len(values)
        ):
            stored = batch["layer"]
        is_equal = stored is not None and bool((torch.from_numpy(stored) == values).all())
        if stats.rows_committed != expected or not is_equal:
            raise StorageError(
                f"expected {expected} rows that read back equal, {stats.rows_committed} were committed and "
                f"they are {'equal' if is_equal else 'different'}",
                "look at the disk that holds data_dir; its figures mean nothing",
            )
        tracer.drop_version_data()


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
