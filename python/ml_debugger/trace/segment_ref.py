"""One segment that a reader has listed: found again, opened for one bounded step, or dropped meanwhile."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from ml_debugger import _core
from ml_debugger.errors import NotFoundError
from ml_debugger.store import layout
from ml_debugger.trace.header import Call
from ml_debugger.trace.runs import CallRun
from ml_debugger.trace.slice_file import SliceFile

_TRIES = 5

_Result = TypeVar("_Result")

# (rank, epoch, attempt, sequence)
SegmentKey: TypeAlias = tuple[int, int, int, int]


class VanishedError(NotFoundError):
    """What was being read has been dropped."""


class SegmentLookup(Protocol):
    """Knows where the pieces of calls lie."""

    def segment(self, call: Call | CallRun, sequence: int) -> SegmentRef:
        """The segment that holds a piece of a call."""


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """One segment, not open; ``inode`` tells it from a later one of the same name.

    One that is staged may be moved to ``home`` meanwhile; there ``made_ns``, the time of its `segment.json`,
    tells it from a later one.
    """

    rank: int
    epoch: int
    attempt: int
    sequence: int
    path: Path
    sealed: bool
    inode: int
    home: Path | None = None
    made_ns: int = -1

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice, which an upload has brought."""
        return self.path.suffix == ".zip"

    @contextlib.contextmanager
    def opened(self) -> Iterator[_core.Segment | SliceFile]:
        """The open segment, for one bounded step.

        Raises:
            VanishedError: It has been dropped.
        """
        try:
            segment = self._open()
        except NotFoundError:
            try:
                segment = self._open()  # moved in this moment
            except NotFoundError as error:
                raise self._vanished() from error
        try:
            yield segment
        finally:
            segment.close()

    def _open(self) -> _core.Segment | SliceFile:
        path, sealed = self._place()
        return SliceFile(path) if self.is_slice else _core.Segment(str(path), sealed=sealed)

    def check_exists(self) -> None:
        """Raise VanishedError if the segment has been dropped."""
        self._place()

    def _place(self) -> tuple[Path, bool]:
        """Where it lies now, and whether it is sealed there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.stat(self.path).st_ino == self.inode:
                return self.path, self.sealed
        if self.home is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.stat(self.home / layout.SEGMENT_FILE).st_mtime_ns == self.made_ns:
                    return self.home, True
        raise self._vanished()

    def data_bytes(self) -> int:
        """Size of the data file: no chunk in it can be larger."""
        path, _ = self._place()
        try:
            return os.stat(path if self.is_slice else path / layout.DATA_FILE).st_size
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._vanished() from error

    def _vanished(self) -> VanishedError:
        epoch = "the rows without an epoch" if self.epoch == layout.NO_EPOCH else f"epoch {self.epoch}"
        return VanishedError(
            f"{epoch} of rank {self.rank} was dropped while it was read ({self.path} is gone)",
            "start reading again; what is left is complete",
        )


def retry_vanished(operation: Callable[[], _Result]) -> _Result:
    """Run ``operation`` again, a few times, when an epoch is dropped under it."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(VanishedError):
            return operation()
    return operation()


def partition_segments(
    rank: int, partition: layout.Partition
) -> tuple[list[SegmentRef], list[layout.SegmentEntry]]:
    """(Segments that may be opened, those that a power cut may have torn) of a partition.

    Raises:
        VanishedError: It was dropped meanwhile.
    """
    usable, torn = [], []
    for entry in layout.segments(partition.path):
        if not entry.usable:
            torn.append(entry)
            warnings.warn(
                f"{entry.path} was being written when the machine lost power and is left out; "
                "`ml-debugger recover` saves what it holds",
                stacklevel=2,
            )
            continue
        home = partition.path / entry.path.name
        is_staged = home != entry.path
        try:
            inode = os.stat(entry.path).st_ino
            made_ns = os.stat(entry.path / layout.SEGMENT_FILE).st_mtime_ns if is_staged else -1
        except (FileNotFoundError, NotADirectoryError) as error:
            raise VanishedError(
                f"{entry.path} was dropped while it was listed", "start reading again"
            ) from error
        usable.append(
            SegmentRef(
                rank,
                partition.epoch,
                entry.attempt,
                entry.sequence,
                entry.path,
                entry.sealed,
                inode,
                home if is_staged else None,
                made_ns,
            )
        )
    return usable, torn
