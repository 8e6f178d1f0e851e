"""The acknowledgement ledger: what a recorder has submitted, and what it was told is committed.

A file of its own, mapped shared: what was stored in it outlives ``kill -9`` of the writer, in program order.
For power cuts it lies on another filesystem than the trace. Every cell has one writing thread.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

EPOCHS = 256

# States of a call.
NEVER, BEGUN, RETURNED, REFUSED = range(4)
# States of an epoch's drop.
KEPT, DROP_BEGUN, DROPPED = range(3)

_CALL = np.dtype([("crc", "<u4"), ("rows", "<u4"), ("epoch", "<i4"), ("state", "<u4")])
_LANE = np.dtype([("flushed", "<i8"), ("sealed", "<i8"), ("errors", "<i8")])
_TRACER = np.dtype(
    [
        ("submitted", "<i8"),
        ("committed", "<i8"),
        ("discarded", "<i8"),
        ("failed", "<i8"),
        ("in_flight", "<i8"),
        ("closed", "<i8"),  # the five above are final
        ("law_broken", "<i8"),
    ]
)


@dataclass(frozen=True)
class Shape:
    """How many recorders a ledger has room for; a lane is one thread of one tracer."""

    tracers: int = 2
    threads: int = 2
    calls: int = 4096  # of a lane

    @property
    def lanes(self) -> int:
        return self.tracers * self.threads


class Ledger:
    """One run of a recorder, as structured arrays over a mapped file."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.shape = path, shape
        sizes = [(shape.tracers, _TRACER), (shape.lanes, _LANE), (shape.tracers * EPOCHS, np.dtype("<u4"))]
        sizes.append((shape.lanes * shape.calls, _CALL))
        total = sum(count * dtype.itemsize for count, dtype in sizes)
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(total)
        mapped = np.memmap(path, np.uint8, "r+", shape=(total,))
        parts: list[Any] = []
        offset = 0
        for count, dtype in sizes:
            end = offset + count * dtype.itemsize
            parts.append(mapped[offset:end].view(dtype))
            offset = end
        self.tracers, self.lanes = parts[0], parts[1]
        self.drops = parts[2].reshape(shape.tracers, EPOCHS)
        self.calls = parts[3].reshape(shape.lanes, shape.calls)

    def begin(self, lane: int, call: int, crc: int, rows: int, epoch: int) -> None:
        """Note a call before it is made; its state comes last, so that a kill leaves no half entry."""
        cell = self.calls[lane]
        cell["crc"][call], cell["rows"][call], cell["epoch"][call] = crc, rows, epoch
        cell["state"][call] = BEGUN

    def end(self, lane: int, call: int, state: int) -> None:
        self.calls[lane]["state"][call] = state


@dataclass(frozen=True)
class Promise:
    """A ledger and what it entitles to: one round of a store's life.

    Attributes:
        number: Of the round; every id begins with it.
        path: Of the ledger.
        survives: Which watermark must be on disk: "flushed", or "sealed" after a power cut in process mode.
    """

    number: int
    path: str
    shape: dict[str, int]
    survives: str = "flushed"

    @classmethod
    def of(cls, number: int, path: Path, shape: Shape, survives: str = "flushed") -> Promise:
        return cls(number, str(path), asdict(shape), survives)

    def open(self) -> Ledger:
        return Ledger(Path(self.path), Shape(**self.shape))
