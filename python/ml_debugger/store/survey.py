"""What traces there are and how much they hold, by the counters of their segments: no rows are read.

A call found in two segments counts once, as for readers.

Needs neither numpy nor torch, so that the command line starts quickly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.store.job_ranks import missing_ranks
from ml_debugger.store.repeats import first_key, repeated
from ml_debugger.store.status import is_writing, read_status

_BLOCK_BYTES = 512  # the unit of st_blocks


@dataclass
class Totals:
    """Counters of segments, added up; ``disk_bytes`` is what their files take."""

    rows: int = 0
    ground_truth_rows: int = 0
    calls: int = 0
    discarded_rows: int = 0
    disk_bytes: int = 0

    def add(self, other: Totals) -> None:
        """Take in some more."""
        self.rows += other.rows
        self.ground_truth_rows += other.ground_truth_rows
        self.calls += other.calls
        self.discarded_rows += other.discarded_rows
        self.disk_bytes += other.disk_bytes

    def subtract(self, counters: dict[str, int]) -> None:
        """Take some off, by name."""
        for name, value in counters.items():
            setattr(self, name, getattr(self, name) - value)


@dataclass
class RankSurvey:
    """One rank; ``status`` is what its writer left, or leaves while ``writing``."""

    rank: int
    writing: bool
    attempts: list[int]
    status: dict[str, Any] | None
    totals: Totals = field(default_factory=Totals)


@dataclass
class TraceSurvey:
    """One trace, as committed now.

    Attributes:
        directory: Where it lies.
        info: Its `version.json`.
        epochs: Counters by epoch, rising; -1 for the rows without one.
        ranks: Its ranks.
        totals: Counters of all segments.
        unusable: Segments that were open when the machine lost power; they are not counted.
        missing_ranks: Ranks of the newest job that left nothing here.
    """

    directory: Path
    info: layout.VersionInfo
    epochs: dict[int, Totals]
    ranks: list[RankSurvey]
    totals: Totals
    unusable: list[Path]
    missing_ranks: list[int] = field(default_factory=list)

    @property
    def writing(self) -> bool:
        """Whether a process records here."""
        return any(rank.writing for rank in self.ranks)


def survey_trace(trace_dir: Path) -> TraceSurvey:
    """Look at one trace.

    Raises:
        NotFoundError: No trace there.
        CorruptDataError: A file of it is damaged.
    """
    survey = TraceSurvey(trace_dir, layout.read_version(trace_dir), {}, [], Totals(), [])
    for rank, rank_dir in layout.rank_directories(trace_dir):
        found = RankSurvey(rank, is_writing(rank_dir), layout.attempts(rank_dir), read_status(rank_dir))
        survey.ranks.append(found)
        for partition in layout.partitions(rank_dir):
            totals = _add_partition(partition, survey.unusable)
            for target in (found.totals, survey.totals):
                target.add(totals)
            if totals.rows:
                survey.epochs.setdefault(partition.epoch, Totals()).add(totals)
    survey.epochs = dict(sorted(survey.epochs.items()))
    survey.missing_ranks = missing_ranks(trace_dir)
    return survey


def _add_partition(partition: layout.Partition, unusable: list[Path]) -> Totals:
    """Counters of a partition; its segments that must not be opened go to ``unusable``."""
    totals = Totals()
    attempts: dict[int, list[tuple[layout.SegmentEntry, int]]] = {}
    for segment in layout.segments(partition.path):
        if not segment.usable:
            unusable.append(segment.path)
            continue
        found, first = _look_into(segment)
        totals.add(found)
        if first is not None:
            attempts.setdefault(segment.attempt, []).append((segment, first))
    for segments in attempts.values():
        for _, counters in repeated(segments):
            totals.subtract(counters)
    return totals


def _look_into(segment: layout.SegmentEntry) -> tuple[Totals, int | None]:
    """Counters of a segment, and its first key if it is no slice and not empty."""
    name = layout.parse_slice_name(segment.path.name)
    if name is not None:  # brought by an upload: its name says what it holds
        try:
            size = os.stat(segment.path).st_size
        except FileNotFoundError:
            return Totals(), None
        return Totals(name.rows, name.ground_truth_rows, disk_bytes=size), None
    try:
        blocks = os.stat(segment.path / layout.DATA_FILE).st_blocks
        handle = _core.Segment(str(segment.path), sealed=segment.sealed)
    except (FileNotFoundError, NotADirectoryError, NotFoundError):
        return Totals(), None  # dropped meanwhile
    try:
        meta, first = read_meta(handle, segment.path), first_key(handle)
    finally:
        handle.close()
    totals = Totals(
        meta.get("rows", 0),
        meta.get("ground_truth_rows", 0),
        meta.get("calls", 0),
        meta.get("discarded_rows", 0),
        blocks * _BLOCK_BYTES,
    )
    return totals, first


def read_meta(handle: _core.Segment, path: Path) -> dict[str, int]:
    """Counters of an open segment; empty where nothing is committed yet.

    Raises:
        CorruptDataError: They cannot be decoded.
    """
    encoded = handle.meta()
    try:
        found = msgpack.unpackb(encoded) if encoded else {}
    except (ValueError, msgpack.UnpackException) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise _damaged(path, "expected a map of integers")
    return found


def _damaged(path: Path, problem: str) -> CorruptDataError:
    return CorruptDataError(
        f"the counters of {path} are damaged: {problem}", "restore the segment from a copy"
    )
