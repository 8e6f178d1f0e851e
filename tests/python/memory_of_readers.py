"""Run as a program: makes a trace of some size, or reads one in a certain way and prints its peak memory.

memory_of_readers.py make DATA_DIR GIGABYTES
memory_of_readers.py report|npy|parquet|arrow DATA_DIR
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WIDTH, CLASSES, SAMPLES, BATCH = 4096, 10, 12_800, 256
POLL_S = 0.005


def rss_anon_kib() -> int:
    """Memory of this process that is no file's."""
    line = next(
        one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("RssAnon")
    )
    return int(line.split()[1])


@contextmanager
def peak_kib() -> Iterator[Callable[[], int]]:
    """Watches the memory; what is yielded tells the most that was seen."""
    seen, done = [rss_anon_kib()], threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            seen[0] = max(seen[0], rss_anon_kib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        done.set()
        thread.join()


def make(data_dir: Path, gigabytes: float) -> None:
    """The same samples epoch after epoch, until the features have this size."""
    import torch

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    torch.manual_seed(0)
    centres, noise = torch.randn(CLASSES, WIDTH), torch.randn(BATCH, WIDTH)
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(WIDTH, CLASSES))
    config = TracerConfig(data_dir=data_dir, durability="process", ring_bytes=64 << 20)
    calls = max(2 * SAMPLES // BATCH, round(gigabytes * 1e9 / (4 * WIDTH * BATCH)))
    with (
        ClassificationTracer(model, "large", "v1", {"features": "0"}, config=config) as tracer,
        torch.no_grad(),
    ):
        for call in range(calls):
            epoch, first = divmod(call * BATCH, SAMPLES)
            ids = range(first, first + BATCH)
            labels = torch.arange(first, first + BATCH) * 7 % CLASSES
            tracer(centres[labels] + noise.roll(call, 0), labels, ids, "train", epoch)


def read(kind: str, data_dir: Path) -> None:
    """Go through the whole trace in one way."""
    from ml_debugger import open_trace
    from ml_debugger.exporting import export_trace
    from ml_debugger.store import layout

    trace = open_trace("large", "v1", data_dir)
    if kind == "report":
        from ml_debugger.report import write_report

        write_report(trace, data_dir / "r.html")
    elif kind == "arrow":
        assert sum(batch.num_rows for batch in trace.to_arrow_reader("extracted_feature")) > 0
    else:
        directory = layout.trace_directory(data_dir, "large", "v1")
        export_trace(directory, data_dir / "out.zip", format=kind).unlink()


def main() -> None:
    kind, data_dir = sys.argv[1], Path(sys.argv[2])
    if kind == "make":
        make(data_dir, float(sys.argv[3]))
        return
    with peak_kib() as peak:
        read(kind, data_dir)
        print(peak())


if __name__ == "__main__":
    main()
