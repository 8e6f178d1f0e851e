"""Checking a trace on disk: every byte that a reader would rely on, without believing any of it.

A segment's file is looked at before LMDB opens it, since LMDB follows a damaged page wherever it points: its
length always, and where the package lmdb 3 is installed (``pip install "ml-debugger[verify]"``) every page of
a segment at rest, by its offline verifier.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError, MlDebuggerError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.store.job_ranks import missing_ranks
from ml_debugger.store.status import is_writing
from ml_debugger.store.survey import read_meta
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.header import INLINE, Call, Gap, HeaderDecoder
from ml_debugger.trace.slice_file import SliceFile

_HEADERS_A_STEP = 256
_BATCH_BYTES = 8 << 20
_META_PAGES = 2
_LMDB_MAGIC = 0xBEEFC0DE
# Of the page header, magic, version, address, map size and two trees' roots, only the magic and what follows.
_META_PAGE = struct.Struct("=16xI4x16x96xQQ")
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Problem:
    """One damage: what is wrong with which file."""

    path: str
    problem: str


@dataclass
class VerifyReport:
    """What a verification has looked at and found.

    Attributes:
        segments: Segments looked at.
        calls: Calls whose header and bytes were read.
        rows: Rows of these calls.
        ground_truth_rows: Those of them that have labels.
        chunks: Pieces of captures whose checksum was computed.
        bytes_checked: Their length.
        discarded_rows: Rows that the gaps name, which were lost while recording; no damage.
        attempts: Attempts that have rows.
        missing_ranks: Ranks of the newest job that left nothing here. No damage: they may record elsewhere,
            or not at all.
        structure_checked: Whether the pages of LMDB's files were checked too (needs the package lmdb).
        problems: All damage; none means that the trace is sound.
    """

    segments: int = 0
    calls: int = 0
    rows: int = 0
    ground_truth_rows: int = 0
    chunks: int = 0
    bytes_checked: int = 0
    discarded_rows: int = 0
    attempts: list[int] = field(default_factory=list)
    missing_ranks: list[int] = field(default_factory=list)
    structure_checked: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems


def verify_trace(trace_dir: Path, progress: Callable[[int, int], object] | None = None) -> VerifyReport:
    """Check every segment of a trace, also while a tracer writes to it. Changes nothing.

    Checked: small files, lengths of data files, LMDB's pages (see above), the checksum and structure of every
    header, the CRC-32C of every chunk, counters against rows, numbers of segments, calls, rows and attempts.

    Args:
        trace_dir: Directory of the (model, version).
        progress: Called with (bytes looked at, bytes in all) of data files.

    Raises:
        NotFoundError: No trace there.
    """
    try:
        layout.read_version(trace_dir)
        problems = []
    except CorruptDataError as error:
        problems = [Problem(str(trace_dir), str(error))]
    verifier = _Verifier(VerifyReport(problems=problems), progress or (lambda done, total: None))
    verifier.run(trace_dir)
    return verifier.report


@dataclass
class _Rows:
    """Which rows the calls of one attempt number, to see that none is numbered twice."""

    calls: list[Array] = field(default_factory=list)

    def add(self, found: list[tuple[int, int, int]]) -> None:
        self.calls.append(np.array(found, np.int64).reshape(-1, 3))

    def overlaps(self) -> list[int]:
        """Calls whose rows belong to another call too."""
        calls = np.concatenate(self.calls)
        # A commit of unknown outcome was repeated: the same call stands in two segments.
        calls = np.unique(calls, axis=0)
        calls = calls[np.argsort(calls[:, 1], kind="stable")]
        ends = calls[:, 1] + calls[:, 2]
        return [int(call) for call in calls[1:][calls[1:, 1] < ends[:-1], 0]]


class _Verifier:
    def __init__(self, report: VerifyReport, progress: Callable[[int, int], object]) -> None:
        self.report = report
        self._progress = progress
        self._done_bytes = self._total_bytes = 0
        self._lmdb_verify = _offline_verifier()
        report.structure_checked = self._lmdb_verify is not None

    def run(self, trace_dir: Path) -> None:
        ranks = layout.rank_directories(trace_dir)
        for _, rank_dir in ranks:
            for partition in layout.partitions(rank_dir):
                self._total_bytes += sum(layout.data_bytes(path) for path in partition.path.glob("a*"))
        attempts: set[int] = set()
        for rank, rank_dir in ranks:
            attempts |= self._rank(rank, rank_dir)
        self.report.attempts = sorted(attempts)
        with contextlib.suppress(MlDebuggerError):  # a damaged attempts.json, which its rank has told of
            self.report.missing_ranks = missing_ranks(trace_dir)

    def _found(self, path: Path, problem: object) -> None:
        self.report.problems.append(Problem(str(path), str(problem)))

    def _rank(self, rank: int, rank_dir: Path) -> set[int]:
        rows: dict[int, _Rows] = {}
        for partition in layout.partitions(rank_dir):
            try:
                self._partition(rank, partition, is_writing(rank_dir), rows)
            except MlDebuggerError as error:
                if partition.path.exists():
                    self._found(partition.path, error)
        try:
            registered = layout.attempts(rank_dir)
            for attempt in sorted(rows.keys() - set(registered)):
                self._found(rank_dir, f"attempt {attempt} has rows and is not in attempts.json")
        except MlDebuggerError as error:
            self._found(rank_dir, error)
        for attempt, found in rows.items():
            for call in found.overlaps():
                self._found(rank_dir, f"call {call} of attempt {attempt} has row numbers of another call")
        return set(rows)

    def _partition(
        self, rank: int, partition: layout.Partition, writing: bool, rows: dict[int, _Rows]
    ) -> None:
        entries = layout.segments(partition.path)
        for attempt, group in itertools.groupby(entries, key=lambda entry: entry.attempt):
            numbers = {entry.sequence for entry in group if entry.path.is_dir()}
            for missing in sorted(set(range(max(numbers, default=0))) - numbers):
                self._found(partition.path, f"segment {missing} of attempt {attempt} is missing")
        for entry in entries:
            self.report.segments += 1
            self._done_bytes += layout.data_bytes(entry.path)
            try:
                self._segment(rank, partition.epoch, entry, writing, rows)
            except NotFoundError:  # dropped meanwhile, unless it is there
                if entry.path.exists():
                    self._found(entry.path, "its data file is missing")
            except MlDebuggerError as error:
                self._found(entry.path, error)
            self._progress(self._done_bytes, self._total_bytes)

    def _segment(
        self, rank: int, epoch: int, entry: layout.SegmentEntry, writing: bool, rows: dict[int, _Rows]
    ) -> None:
        name = layout.parse_slice_name(entry.path.name)
        if name is None and not self._may_open(rank, epoch, entry, writing):
            return
        decoder = HeaderDecoder(rank, epoch, entry.attempt, entry.sequence, holds_all_pieces=name is not None)
        reader = _SegmentReader(entry, decoder, self.report)
        found = _Counts()
        calls: list[tuple[int, int, int]] = []
        with reader:
            if isinstance(reader.handle, SliceFile):
                assert name is not None
                counted = {"rows": name.rows, "ground_truth_rows": name.ground_truth_rows}
            else:
                counted = read_meta(reader.handle, entry.path)
            for step in reader.steps():
                for header in step:
                    found.add(header)
                    if isinstance(header, Call):
                        calls.append((header.call, header.first_row, header.rows))
        rows.setdefault(entry.attempt, _Rows()).add(calls)
        self.report.calls += found.calls
        self.report.rows += found.rows
        self.report.ground_truth_rows += found.ground_truth_rows
        self.report.discarded_rows += found.discarded_rows
        if reader.is_whole:
            self._compare(entry, found, counted, grows=writing and not entry.sealed)

    def _may_open(self, rank: int, epoch: int, entry: layout.SegmentEntry, writing: bool) -> bool:
        description = layout.read_json(entry.path / layout.SEGMENT_FILE) or {}
        expected = {
            "rank": rank,
            "epoch": None if epoch == layout.NO_EPOCH else epoch,
            "attempt": entry.attempt,
            "sequence": entry.sequence,
        }
        for key, value in expected.items():
            if description.get(key) != value:
                self._found(
                    entry.path / layout.SEGMENT_FILE, f"{key} is {description.get(key)!r}, expected {value!r}"
                )
        if not entry.usable:
            self._found(
                entry.path, "it was being written when the machine lost power, and no reader opens it"
            )
            return False
        problems = list(_file_problems(entry.path / layout.DATA_FILE))
        at_rest = entry.sealed or not writing
        if not problems and at_rest and self._lmdb_verify is not None:
            try:
                problems = [str(problem) for problem in self._lmdb_verify.verify(str(entry.path))]
            except self._lmdb_verify.VerifyError as error:
                problems = [str(error)]
        for problem in problems:
            self._found(entry.path / layout.DATA_FILE, problem)
        return not problems

    def _compare(
        self, entry: layout.SegmentEntry, found: _Counts, counted: dict[str, int], *, grows: bool
    ) -> None:
        sources = {"its counters": counted}
        if entry.sealed and entry.path.is_dir():
            sealed = layout.read_json(entry.path / layout.SEALED_FILE) or {}
            sources[layout.SEALED_FILE] = sealed
        for source, numbers in sources.items():
            for name, value in vars(found).items():
                said = numbers.get(name, value)
                if type(said) is not int or value < said or (value != said and not grows):
                    self._found(entry.path, f"it holds {value} {name.replace('_', ' ')}, {source} say {said}")


@dataclass
class _Counts:
    """What the headers of a segment add up to; the names are those of its counters."""

    calls: int = 0
    rows: int = 0
    ground_truth_rows: int = 0
    discarded_rows: int = 0

    def add(self, header: Call | Gap) -> None:
        if isinstance(header, Gap):
            self.discarded_rows += header.rows
            return
        self.calls += 1
        self.rows += header.rows
        self.ground_truth_rows += header.ground_truth_rows


class _SegmentReader:
    """Reads all of one segment and notes what is damaged."""

    def __init__(self, entry: layout.SegmentEntry, decoder: HeaderDecoder, report: VerifyReport) -> None:
        self._entry = entry
        self._decoder = decoder
        self._report = report
        self._buffer = np.empty(_BATCH_BYTES, np.uint8)
        self._others: dict[int, _core.Segment | SliceFile] = {}
        self.is_whole = True
        self.handle = _opened(entry.path, entry.sealed)

    def __enter__(self) -> _SegmentReader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (self.handle, *self._others.values()):
            handle.close()

    def steps(self) -> Iterator[list[Call | Gap]]:
        """The headers that are sound, some at a time, after the bytes that they name were checked."""
        after: int | None = None
        while found := self._headers(after):
            headers = [header for key, value in found if (header := self._decoded(key, value)) is not None]
            self._check_chunks([header for header in headers if isinstance(header, Call)])
            yield headers
            after = found[-1][0]

    def _headers(self, after: int | None) -> list[tuple[int, bytes]]:
        try:
            return self.handle.headers(after, _HEADERS_A_STEP)
        except CorruptDataError:
            pass
        try:  # One by one, up to the damaged one.
            return self.handle.headers(after, 1)
        except CorruptDataError as error:
            self._damaged(f"{error.message}; what follows call {after} was not checked")
            return []

    def _decoded(self, key: int, value: bytes) -> Call | Gap | None:
        try:
            return self._decoder.decode(key, value)
        except CorruptDataError as error:
            self._damaged(error.message)
            return None

    def _damaged(self, problem: str) -> None:
        self.is_whole = False
        self._report.problems.append(Problem(str(self._entry.path), problem))

    def _check_chunks(self, calls: list[Call]) -> None:
        wanted: dict[int, list[tuple[Call, int, int, int]]] = {}
        for call in calls:
            for capture, sequence, key, length, crc in call.chunks:
                self._report.chunks += 1
                self._report.bytes_checked += length
                if sequence == INLINE:
                    if _core.crc32c(call.inline[key : key + length]) != crc:
                        self._damaged(f"capture {capture} of call {call.call} does not match its checksum")
                elif length:
                    wanted.setdefault(sequence, []).append((call, key, length, crc))
        for sequence, chunks in wanted.items():
            for batch in _batches(chunks):
                self._read(sequence, batch)

    def _read(self, sequence: int, chunks: list[tuple[Call, int, int, int]]) -> None:
        try:
            handle = self._handle(sequence)
            offsets = np.cumsum([0, *(length for _, _, length, _ in chunks)]).tolist()
            if offsets[-1] > self._buffer.size:
                self._buffer = np.empty(offsets[-1], np.uint8)
            requests = [
                (key, offset, length, crc)
                for (_, key, length, crc), offset in zip(chunks, offsets, strict=False)
            ]
            handle.read(requests, self._buffer.data)
        except (CorruptDataError, NotFoundError) as error:
            if len(chunks) > 1:
                for chunk in chunks:
                    self._read(sequence, [chunk])
                return
            call, key, _, _ = chunks[0]
            self._damaged(f"call {call.call}, chunk {key}: {error.message}")

    def _handle(self, sequence: int) -> _core.Segment | SliceFile:
        if sequence == self._entry.sequence:
            return self.handle
        if sequence not in self._others:
            path = self._entry.path.with_name(f"a{self._entry.attempt:05d}-s{sequence:05d}")
            sealed = (path / layout.SEALED_FILE).exists()
            if problems := list(_file_problems(path / layout.DATA_FILE)):
                raise CorruptDataError(f"{path}: {problems[0]}")
            self._others[sequence] = _core.Segment(str(path), sealed=sealed)
        return self._others[sequence]


def _batches(chunks: list[tuple[Call, int, int, int]]) -> Iterator[list[tuple[Call, int, int, int]]]:
    batch: list[tuple[Call, int, int, int]] = []
    size = 0
    for chunk in chunks:
        if batch and size + chunk[2] > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += chunk[2]
    if batch:
        yield batch


def _file_problems(path: Path) -> Iterator[str]:
    """What makes a data file dangerous to open: reading behind its end would kill the process."""
    try:
        with path.open("rb") as file:
            head = file.read(_META_PAGES * _PAGE_BYTES)
        size = os.stat(path).st_size
    except OSError as error:
        yield f"it cannot be read: {error.strerror}"
        return
    if len(head) < _META_PAGES * _PAGE_BYTES:
        yield f"it has {size} bytes, less than the two pages that every file begins with"
        return
    metas = [_META_PAGE.unpack_from(head, page * _PAGE_BYTES) for page in range(_META_PAGES)]
    if any(magic != _LMDB_MAGIC for magic, _, _ in metas):
        yield "it is no LMDB file"
        return
    last_page = max(metas, key=lambda meta: int(meta[2]))[1]
    if last_page >= _META_PAGES and size < (last_page + 1) * _PAGE_BYTES:
        yield f"it was cut: {size} bytes, where its pages need {(last_page + 1) * _PAGE_BYTES}"


def _opened(path: Path, sealed: bool) -> _core.Segment | SliceFile:
    return SliceFile(path) if path.is_file() else _core.Segment(str(path), sealed=sealed)


def _offline_verifier() -> Any:
    """The offline verifier of the package lmdb, from version 3 on; None without it."""
    try:
        return importlib.import_module("lmdb.verify")
    except ImportError:
        return None
