"""What is left of one attempt in one partition, and the saving of its calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ml_debugger import _core
from ml_debugger.errors import (
    CorruptDataError,
    MlDebuggerError,
)
from ml_debugger.store import layout
from ml_debugger.trace.header import INLINE, Call, Gap, HeaderDecoder
from ml_debugger.trace.losses import AttemptLosses, Damage
from ml_debugger.trace.recovered_trace import RecoveredTrace
from ml_debugger.trace.salvage import SegmentSalvage, SliceSalvage
from ml_debugger.uploading.slices import Origin, SliceDraft

_READ_BYTES = 8 << 20
_MAX_NUMBER = 1 << 62  # of calls and epochs; no tracer comes near

Source = SegmentSalvage | SliceSalvage


@dataclass
class PartitionRemains:
    """Segments and slices of one attempt in one partition, by sequence."""

    rank: int
    epoch: int
    attempt: int
    sources: list[Source]

    @property
    def path(self) -> Path:
        """The directory that they should be in."""
        return self.sources[0].path.parent

    def headers(self, source: Source) -> Iterator[tuple[int, tuple[bytes, Call | Gap] | None]]:
        """The headers of a source by rising key, each with its first value that can be decoded, if any."""
        decoder = HeaderDecoder(self.rank, self.epoch, self.attempt, source.sequence)
        for key, values in source.headers():
            yield key, _decoded(source, decoder, key, values)


def remains_of(trace_dir: Path, tag: str | None) -> Iterator[PartitionRemains]:
    """All that the directories of a trace hold; of slices those of the version ``tag``, None: of any."""
    for rank, rank_dir in layout.rank_directories(trace_dir):
        for partition in layout.partitions(rank_dir):
            found: list[Source] = [
                SegmentSalvage(rank, partition.epoch, attempt, sequence, path)
                for attempt, sequence, path in layout.segment_directories(partition.path)
                if path.is_dir()
            ]
            found += [
                SliceSalvage(rank, partition.epoch, name.attempt, layout.FIRST_SLICE_SEQUENCE + number, path)
                for number, (name, path) in enumerate(layout.slice_files(partition.path))
                if tag in (None, name.version_tag)
            ]
            found.sort(key=lambda source: (source.attempt, source.sequence))
            for attempt, sources in itertools.groupby(found, key=lambda source: source.attempt):
                yield PartitionRemains(rank, partition.epoch, attempt, list(sources))


def _decoded(
    source: Source, decoder: HeaderDecoder, key: int, values: list[bytes]
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


class PartitionRecovery:
    """Saves the calls of one attempt in one partition."""

    def __init__(self, trace: RecoveredTrace, group: PartitionRemains, losses: AttemptLosses) -> None:
        self._trace = trace
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

    def run(self, looked_at: Callable[[Source], None]) -> None:
        """Save all of them, and note what is lost; ``looked_at`` is called behind each segment or slice."""
        group = self._group
        for source in group.sources:
            source.load()
        numbers = self._segments.keys()
        for missing in sorted(set(range(max(numbers, default=-1) + 1)) - numbers):
            path = group.path / f"a{group.attempt:05d}-s{missing:05d}"
            self._trace.note(path, "the segment is missing")
            self._losses.damages.append(Damage(group.epoch, str(path), "the segment is missing"))
        for source in group.sources:
            self._save(source)
            looked_at(source)
        for key, (call, problem) in sorted(self._broken.items()):
            self._losses.add_broken(call, str(group.path), problem)
            self._unread.pop(key, None)
        for key, path in sorted(self._unread.items()):
            if key not in self._saved and key not in self._gaps:
                self._losses.add_unread(group.epoch, key, str(path))

    def _save(self, source: Source) -> None:
        """One segment: what it holds and no other one has given yet."""
        group = self._group
        draft = SliceDraft(source, self._segments)
        calls = rows = 0
        for key, found in group.headers(source):
            if found is None:
                self._unread[key] = source.path
                continue
            value, header = found
            if isinstance(header, Gap):
                if key not in self._gaps:
                    self._gaps.add(key)
                    draft.add(key, value, header)
                    self._trace.note_gap(header)
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
                self._trace.write(draft)
                draft = SliceDraft(source, self._segments)
        if draft.headers:
            self._trace.write(draft)
        self._account(source, calls, rows)

    def _account(self, source: Source, calls: int, rows: int) -> None:
        """Compare what was read with what the segment's counters say."""
        for problem in dict.fromkeys(source.problems + list(_small_file_problems(source))):
            self._trace.note(source.path, problem)
        said_calls, said_rows = source.counters.get("calls"), source.counters.get("rows")
        if said_rows is not None and rows < said_rows:
            missing = max(said_calls - calls, 0) if said_calls is not None else None
            problem = f"{said_rows - rows} of its {said_rows} rows have no sound header"
            self._trace.note(source.path, problem)
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
            if length > layout.data_bytes(home.path):
                return f"chunk {key} is longer than its file"
            if length > self._buffer.size:
                self._buffer = np.empty(max(length, _READ_BYTES), np.uint8)
            try:
                with home.opened() as opened:
                    opened.read([(key, 0, length, crc)], self._buffer.data)
            except MlDebuggerError as error:
                return error.message
        return None


def _small_file_problems(source: Source) -> Iterator[str]:
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
