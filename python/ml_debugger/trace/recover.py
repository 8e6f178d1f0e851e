"""Saving what is sound of a damaged trace into a new one, and saying what is missing.

Whatever can be read is read with every number and every checksum verified (`ml_debugger.trace.salvage`); the
damaged trace is never changed and never opened with LMDB. What is saved is written as slices, which keep row
numbers, attempts and gaps. What is lost is found by row numbers and by the counters of segments
(`ml_debugger.trace.losses`); where the number of its rows is known it becomes a gap of cause ``damaged``.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ml_debugger import _core
from ml_debugger.errors import (
    CorruptDataError,
    InvalidInputError,
    MlDebuggerError,
    NotFoundError,
    StorageError,
    TraceInUseError,
)
from ml_debugger.store import layout
from ml_debugger.store.status import is_writing
from ml_debugger.trace.header import FEATURES, INLINE, Call, Gap, HeaderDecoder
from ml_debugger.trace.losses import AttemptLosses, Damage, LostCalls
from ml_debugger.trace.salvage import SegmentSalvage, SliceSalvage
from ml_debugger.trace.verify import Problem
from ml_debugger.uploading.slices import Origin, SliceDraft, cut_slice

_FIRST_SLICE_SEQUENCE = 1 << 32
_READ_BYTES = 8 << 20
_MAX_NUMBER = 1 << 62  # of calls and epochs; no tracer comes near

_Source = SegmentSalvage | SliceSalvage


@dataclass
class RecoverReport:
    """What was saved, and what was not.

    Attributes:
        directory: Where the new trace lies.
        segments: Segments and slices looked at.
        calls: Calls that were saved.
        rows: Their rows.
        ground_truth_rows: Those of them that have labels.
        discarded_rows: Rows of gaps that were saved: lost while recording.
        attempts: Attempts of the new trace.
        problems: All damage that was met, also such that has cost nothing.
        lost: Calls that could not be saved; empty if everything was.
    """

    directory: Path
    segments: int = 0
    calls: int = 0
    rows: int = 0
    ground_truth_rows: int = 0
    discarded_rows: int = 0
    attempts: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lost: list[LostCalls] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is missing."""
        return not self.lost


def recover_trace(
    data_dir: Path,
    model_name: str,
    version_name: str,
    output: Path,
    progress: Callable[[int, int], object] | None = None,
) -> RecoverReport:
    """Write all sound calls of a trace into a new data directory; changes nothing of the trace.

    A call is sound if the checksums of its header and of all its chunks are right and its description can be
    decoded. An interrupted run leaves files in ``output`` that are no trace yet.

    Args:
        data_dir: Where the damaged trace lies.
        model_name: Name of the model.
        version_name: Name of the version.
        output: The new ``data_dir``; missing or empty.
        progress: Called with (bytes looked at, bytes in all) of data files.

    Raises:
        NotFoundError: No such trace.
        TraceInUseError: A process records there.
        InvalidInputError: ``output`` is not empty, or lies within the trace.
        StorageError: ``output`` cannot be written to.
    """
    trace_dir = layout.trace_directory(data_dir, model_name, version_name)
    _check_places(trace_dir, output)
    target = layout.trace_directory(output, model_name, version_name)
    report = RecoverReport(target)
    try:
        info = layout.read_version(trace_dir)
    except (NotFoundError, CorruptDataError) as error:
        if _is_newer(trace_dir) or not layout.rank_directories(trace_dir):
            raise
        report.problems.append(
            Problem(str(trace_dir), f"{error.message}; made again from the calls, without a fingerprint")
        )
        info = _rebuilt_version(trace_dir, model_name, version_name)
    try:
        layout.make_directory(target)
        recovery = _Recovery(trace_dir, target, info, report, progress or (lambda done, total: None))
        recovery.run()
        _check_idle(trace_dir)
        layout.write_version(target, info)  # last: until now this is no trace
    except OSError as error:
        if isinstance(error, MlDebuggerError):
            raise
        raise StorageError(
            f"cannot write to {output}: {error.strerror or error}", "choose another output with enough space"
        ) from error
    return report


def _check_places(trace_dir: Path, output: Path) -> None:
    if not trace_dir.is_dir():
        raise NotFoundError(f"no trace at {trace_dir}", "check data_dir, model name and version name")
    _check_idle(trace_dir)
    if output.resolve().is_relative_to(trace_dir.resolve()):
        raise InvalidInputError(f"the output {output} lies within the trace", "name a directory elsewhere")
    try:
        is_used = output.exists() and any(output.iterdir())
    except OSError as error:
        raise StorageError(f"cannot list {output}: {error.strerror}", "name an empty directory") from error
    if is_used:
        raise InvalidInputError(
            f"the output {output} is not empty", "name a directory that is empty or does not exist yet"
        )


def _check_idle(trace_dir: Path) -> None:
    for _, rank_dir in layout.rank_directories(trace_dir):
        if is_writing(rank_dir):
            raise TraceInUseError(
                f"a process is recording to {rank_dir}", "end it, or wait until it has ended, and run again"
            )


def _is_newer(trace_dir: Path) -> bool:
    """Whether `version.json` is sound and of a format that this package does not know."""
    try:
        document = layout.read_version_document(trace_dir) or {}
    except CorruptDataError:
        return False
    version = document.get("format_version")
    return type(version) is int and version > layout.FORMAT_VERSION


@dataclass
class _Group:
    """Segments and slices of one attempt in one partition, by sequence."""

    rank: int
    epoch: int
    attempt: int
    sources: list[_Source]

    @property
    def path(self) -> Path:
        return self.sources[0].path.parent


def _groups(trace_dir: Path, tag: str | None) -> Iterator[_Group]:
    """All that the directories of a trace hold; of slices those of the version ``tag``, None: of any."""
    for rank, rank_dir in layout.rank_directories(trace_dir):
        for partition in layout.partitions(rank_dir):
            found: list[_Source] = [
                SegmentSalvage(rank, partition.epoch, attempt, sequence, path)
                for attempt, sequence, path in layout.segment_directories(partition.path)
                if path.is_dir()
            ]
            found += [
                SliceSalvage(rank, partition.epoch, name.attempt, _FIRST_SLICE_SEQUENCE + number, path)
                for number, (name, path) in enumerate(layout.slice_files(partition.path))
                if tag in (None, name.version_tag)
            ]
            found.sort(key=lambda source: (source.attempt, source.sequence))
            for attempt, sources in itertools.groupby(found, key=lambda source: source.attempt):
                yield _Group(rank, partition.epoch, attempt, list(sources))


def _decoded(
    source: _Source, decoder: HeaderDecoder, key: int, values: list[bytes]
) -> tuple[bytes, Call | Gap] | None:
    if max(key, source.epoch) > _MAX_NUMBER:
        source.problems.append(f"call {key} of epoch {source.epoch} cannot be")
        return None
    for value in values:
        try:
            return value, decoder.decode(key, value)
        except CorruptDataError as error:
            source.problems.append(error.message)
    return None


def _rebuilt_version(trace_dir: Path, model_name: str, version_name: str) -> layout.VersionInfo:
    """What `version.json` said, as far as the columns of the calls tell."""
    columns: dict[tuple[str, str], str] = {}
    for group in _groups(trace_dir, None):
        decoder = HeaderDecoder(group.rank, group.epoch, group.attempt, 0)
        for source in group.sources:
            source.load()
            for key, values in source.headers():
                found = _decoded(source, decoder, key, values)
                if found is not None and isinstance(found[1], Call):
                    for column in found[1].description.columns:
                        columns.setdefault((column.table, column.name), column.type)
    own = {"input_id", "logits", "label"}
    fields = {key: kind for key, kind in columns.items() if key[1] not in own}
    is_alias = {key: key[0] == FEATURES and kind == "tensor" for key, kind in fields.items()}
    specifications: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (table, name), kind in fields.items():
        if not is_alias[table, name]:
            specifications[table == FEATURES].append({"name": name, "type": kind})
    return layout.VersionInfo(
        model_name,
        version_name,
        "",
        {key[1]: None for key in fields if is_alias[key]},
        specifications[True],
        specifications[False],
    )


class _Recovery:
    """One run over all ranks."""

    def __init__(
        self,
        trace_dir: Path,
        target: Path,
        info: layout.VersionInfo,
        report: RecoverReport,
        progress: Callable[[int, int], object],
    ) -> None:
        self._trace_dir = trace_dir
        self._target = target
        self._info = info
        self._report = report
        self._progress = progress
        self._done_bytes = self._total_bytes = 0
        self._entries: dict[int, dict[int, dict[str, Any]]] = {}

    def run(self) -> None:
        """Save every rank."""
        tag = layout.version_tag(self._info) if self._info.fingerprint else None
        groups = list(_groups(self._trace_dir, tag))
        self._total_bytes = sum(_size(source) for group in groups for source in group.sources)
        self._register(groups)
        by_attempt = sorted(groups, key=lambda group: (group.rank, group.attempt))
        for (rank, attempt), held in itertools.groupby(
            by_attempt, key=lambda group: (group.rank, group.attempt)
        ):
            losses = AttemptLosses(rank, attempt)
            for group in held:
                _GroupRecovery(self, group, losses).run()
            self._save_losses(rank, attempt, losses)
        self._report.attempts = sorted({attempt for entries in self._entries.values() for attempt in entries})

    def write(self, draft: SliceDraft) -> None:
        """Store a slice."""
        entry = self._entries[draft.ref.rank][draft.ref.attempt]
        partition = layout.partition_directory(
            layout.rank_directory(self._target, draft.ref.rank), draft.ref.epoch
        )
        layout.make_directory(partition)
        piece = cut_slice(draft, self._info, entry, partition)
        try:
            piece.file.seek(0)
            temporary = partition / f".{piece.name}.tmp"
            with temporary.open("xb") as file:
                shutil.copyfileobj(piece.file, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, partition / str(piece.name))
            layout.sync_directory(partition)
        finally:
            piece.close()
        self._report.calls += draft.calls
        self._report.rows += draft.rows
        self._report.ground_truth_rows += draft.ground_truth_rows

    def found(self, path: Path, problem: str) -> None:
        """Note damage."""
        self._report.problems.append(Problem(str(path), problem))

    def looked_at(self, source: _Source) -> None:
        """Count a segment."""
        self._report.segments += 1
        self._done_bytes += _size(source)
        self._progress(self._done_bytes, self._total_bytes)

    def saved_gap(self, gap: Gap) -> None:
        """Count rows that were lost while recording."""
        self._report.discarded_rows += gap.rows

    def _register(self, groups: list[_Group]) -> None:
        """Write `attempts.json` of every rank: what it said, and every attempt that has segments."""
        for rank, rank_dir in layout.rank_directories(self._trace_dir):
            entries: dict[int, dict[str, Any]] = {}
            try:
                for entry in layout.attempt_entries(rank_dir):
                    number = entry["attempt"]
                    if type(number) is not int or not 0 <= number < layout.MAX_ATTEMPTS:
                        raise CorruptDataError(f"{rank_dir}: attempt {number!r} cannot be", "")
                    entries[number] = entry
            except MlDebuggerError as error:
                self.found(rank_dir, error.message)
            for group in groups:
                if group.rank == rank and group.attempt not in entries:
                    self.found(rank_dir, f"attempt {group.attempt} was not in attempts.json")
                    entries[group.attempt] = {"attempt": group.attempt, "started_unix_s": 0.0, "pid": 0}
            self._entries[rank] = entries
            target = layout.rank_directory(self._target, rank)
            layout.make_directory(target)
            layout.write_attempts(target, [entries[number] for number in sorted(entries)])

    def _save_losses(self, rank: int, attempt: int, losses: AttemptLosses) -> None:
        lost = losses.resolve()
        self._report.lost += lost
        free = losses.first_free_call
        drafts: dict[int, SliceDraft] = {}
        for entry in sorted(lost, key=lambda entry: (entry.first_call is None, entry.first_call or 0)):
            if entry.epoch is None or not entry.rows:
                continue
            first, last = entry.first_call, entry.last_call
            if first is None or last is None:  # lost at the end, so behind all that is known
                first, last = free, free + max(entry.calls or 1, 1) - 1
                free = last + 1
            draft = drafts.get(entry.epoch)
            if draft is None:
                origin = SegmentSalvage(rank, entry.epoch, attempt, 0, self._trace_dir)
                draft = drafts[entry.epoch] = SliceDraft(origin, {})
            draft.add(first, _gap_header(first, last, entry.rows), Gap(first, entry.rows, "damaged"))
        for draft in drafts.values():
            self.write(draft)


def _gap_header(first_call: int, last_call: int, rows: int) -> bytes:
    core = {"first_call": first_call, "last_call": last_call, "rows": rows, "bytes": 0, "cause": "damaged"}
    body = b"\x95" + b"".join(msgpack.packb(part) for part in (1, core, None, b""))
    return body + b"\xce" + _core.crc32c(body).to_bytes(4, "big")


class _GroupRecovery:
    """Saves the calls of one attempt in one partition."""

    def __init__(self, recovery: _Recovery, group: _Group, losses: AttemptLosses) -> None:
        self._recovery = recovery
        self._group = group
        self._losses = losses
        self._segments: dict[int, Origin] = {
            source.sequence: source for source in group.sources if isinstance(source, SegmentSalvage)
        }
        self._saved: set[int] = set()
        self._gaps: set[int] = set()
        self._broken: dict[int, tuple[Call, str]] = {}
        self._unread: dict[int, Path] = {}
        self._buffer = np.empty(0, np.uint8)

    def run(self) -> None:
        """Save all of them, and note what is lost."""
        group = self._group
        for source in group.sources:
            source.load()
        numbers = self._segments.keys()
        for missing in sorted(set(range(max(numbers, default=-1) + 1)) - numbers):
            path = group.path / f"a{group.attempt:05d}-s{missing:05d}"
            self._recovery.found(path, "the segment is missing")
            self._losses.damages.append(Damage(group.epoch, str(path), "the segment is missing"))
        for source in group.sources:
            self._source(source)
            self._recovery.looked_at(source)
        for key, (call, problem) in sorted(self._broken.items()):
            self._losses.add_broken(call, str(group.path), problem)
            self._unread.pop(key, None)
        for key, path in sorted(self._unread.items()):
            if key not in self._saved and key not in self._gaps:
                self._losses.add_unread(group.epoch, key, str(path))

    def _source(self, source: _Source) -> None:
        """One segment: what it holds and no other one has given yet."""
        group = self._group
        decoder = HeaderDecoder(group.rank, group.epoch, group.attempt, source.sequence)
        draft = SliceDraft(source, self._segments)
        calls = rows = 0
        for key, values in source.headers():
            found = _decoded(source, decoder, key, values)
            if found is None:
                self._unread[key] = source.path
                continue
            value, header = found
            if isinstance(header, Gap):
                if key not in self._gaps:
                    self._gaps.add(key)
                    draft.add(key, value, header)
                    self._recovery.saved_gap(header)
                    self._losses.add_gap(key)
                continue
            calls, rows = calls + 1, rows + header.rows
            if key in self._saved:
                continue
            if isinstance(source, SliceSalvage):  # every chunk of its calls lies in it
                draft.segments = {chunk[1]: source for chunk in header.chunks} | dict(draft.segments)
            problem = self._chunk_problem(draft, header)
            if problem is not None:
                self._broken[key] = header, problem
                continue
            self._broken.pop(key, None)
            self._saved.add(key)
            self._losses.add_call(header)
            draft.add(key, value, header)
            if draft.is_full:
                self._recovery.write(draft)
                draft = SliceDraft(source, self._segments)
        if draft.headers:
            self._recovery.write(draft)
        self._account(source, calls, rows)

    def _account(self, source: _Source, calls: int, rows: int) -> None:
        """Compare what was read with what the segment's counters say."""
        for problem in dict.fromkeys(source.problems + list(_small_file_problems(source))):
            self._recovery.found(source.path, problem)
        said_calls, said_rows = source.counters.get("calls"), source.counters.get("rows")
        if said_rows is not None and rows < said_rows:
            missing = max(said_calls - calls, 0) if said_calls is not None else None
            problem = f"{said_rows - rows} of its {said_rows} rows have no sound header"
            self._recovery.found(source.path, problem)
            self._losses.damages.append(
                Damage(self._group.epoch, str(source.path), problem, missing, said_rows - rows)
            )
        elif source.damaged_keys or (not source.is_whole and said_rows is None):
            problem = (source.problems or ["headers of it cannot be read"])[0]
            self._losses.damages.append(Damage(self._group.epoch, str(source.path), problem))

    def _chunk_problem(self, draft: SliceDraft, call: Call) -> str | None:
        """What is wrong with the bytes of a call; None if all checksums are right."""
        for capture, sequence, key, length, crc in call.chunks:
            if sequence == INLINE:
                if _core.crc32c(call.inline[key : key + length]) != crc:
                    return f"capture {capture} does not match its checksum"
                continue
            home = draft.segments.get(sequence)
            if home is None:
                return f"segment {sequence}, which holds bytes of it, is missing"
            if length > _size(home):
                return f"chunk {key} is longer than its file"
            if length > self._buffer.size:
                self._buffer = np.empty(max(length, _READ_BYTES), np.uint8)
            try:
                with home.opened() as opened:
                    opened.read([(key, 0, length, crc)], self._buffer.data)
            except MlDebuggerError as error:
                return error.message
        return None


def _small_file_problems(source: _Source) -> Iterator[str]:
    """What is wrong with a segment apart from its data, which costs nothing here."""
    if isinstance(source, SliceSalvage):
        return
    try:
        description = layout.read_json(source.path / layout.SEGMENT_FILE)
    except MlDebuggerError as error:
        yield error.message
        return
    if description is None:
        yield f"{layout.SEGMENT_FILE} is missing"
    elif not (source.path / layout.SEALED_FILE).exists() and layout.is_torn(description):
        yield "it was being written when the machine lost power; what had not reached the disk is not in it"


def _size(source: Origin) -> int:
    path = source.path / layout.DATA_FILE if source.path.is_dir() else source.path
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
