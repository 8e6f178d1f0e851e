"""Cutting slices: some committed calls of a segment become one file, the same bytes each time.

A slice holds what `ml_debugger.trace.slice_file` reads. Headers are those of the store; only the places of
chunks are written anew (offsets in the slice), and the number of the attempt where the endpoint knows it by
another one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import msgpack
import numpy as np

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError
from ml_debugger.exporting import manifest
from ml_debugger.exporting.npy_zip import NpyZipWriter
from ml_debugger.store import layout
from ml_debugger.trace.catalog import SegmentRef
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.header import INLINE, Call, Gap, HeaderDecoder
from ml_debugger.trace.slice_file import CHUNKS, HEADER_ENDS, HEADERS, KEYS
from ml_debugger.uploading.slice_memory import MemoryFile, SliceMemory

SLICE_BYTES = 32 << 20
MAX_CALLS = 1 << 14
_STEP_BYTES = 8 << 20
_IN_MEMORY_BYTES = 96 << 20
# Beside headers and chunks: keys, ends, the ZIP's own headers, the manifest. A longer one makes it grow.
_AROUND_BYTES = 16 * MAX_CALLS + (64 << 10)
_ATTEMPT_SHIFT = 36
_HASH_STEP_BYTES = 1 << 20


class ChunkReader(Protocol):
    """Gives chunks, as `_core.Segment` does."""

    def read(self, chunks: Sequence[tuple[int, int, int, int]], out: Any) -> None:
        """Copy chunks (key, offset in ``out``, bytes, crc32c) to ``out``."""


class Origin(Protocol):
    """What a slice is cut from: a segment, or what is left of one."""

    @property
    def rank(self) -> int:
        """Whose calls it holds."""

    @property
    def epoch(self) -> int:
        """Their epoch; -1: none."""

    @property
    def attempt(self) -> int:
        """Their attempt."""

    @property
    def sequence(self) -> int:
        """Number of the segment."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def opened(self) -> AbstractContextManager[ChunkReader]:
        """Its chunks, for one bounded step."""

    def check_exists(self) -> None:
        """Raise NotFoundError if it is gone."""


@dataclass
class SliceDraft:
    """Calls and gaps that one slice is to hold, all of one segment, by rising key.

    Attributes:
        ref: The segment that holds the headers.
        segments: Segments of the same partition and attempt by sequence: chunks may lie in an earlier one.
        headers: (key, value) of each.
        payload_bytes: What the slice will take, about.
        rows: Rows of ``extracted_feature``.
        ground_truth_rows: Rows of ``ground_truth``.
        calls: How many of the headers are calls; the others are gaps.
        discarded_rows: Rows that the gaps stand for.
    """

    ref: Origin
    segments: Mapping[int, Origin]
    headers: list[tuple[int, bytes]] = field(default_factory=list)
    payload_bytes: int = 0
    rows: int = 0
    ground_truth_rows: int = 0
    calls: int = 0
    discarded_rows: int = 0

    @property
    def keys(self) -> list[int]:
        """Keys of the headers, rising."""
        return [key for key, _ in self.headers]

    @property
    def is_full(self) -> bool:
        """Whether the next call goes into another slice."""
        return self.payload_bytes >= SLICE_BYTES or len(self.headers) >= MAX_CALLS

    def add(self, key: int, value: bytes, header: Call | Gap) -> None:
        """Take in a header that follows those that are there."""
        self.headers.append((key, value))
        self.payload_bytes += len(value)
        if isinstance(header, Gap):
            self.discarded_rows += header.rows
        else:
            self.calls += 1
            self.rows += header.rows
            self.ground_truth_rows += header.ground_truth_rows
            self.payload_bytes += sum(chunk[3] for chunk in header.chunks if chunk[1] != INLINE)


@dataclass(frozen=True)
class Slice:
    """A finished slice: an open file that is gone when it is closed."""

    file: IO[bytes]
    name: layout.SliceName
    length_bytes: int

    def close(self) -> None:
        """Give memory or disk space back."""
        self.file.close()


def decoder_of(ref: SegmentRef) -> HeaderDecoder:
    """A decoder for the headers of a segment."""
    return HeaderDecoder(ref.rank, ref.epoch, ref.attempt, ref.sequence)


def cut_slice(
    draft: SliceDraft,
    info: layout.VersionInfo,
    attempt: dict[str, Any],
    spool_dir: Path,
    memory: SliceMemory | None = None,
) -> Slice:
    """Write a slice.

    Memory: the slice, up to 96 MiB; a larger one (of one huge call) goes through a file in ``spool_dir``.

    Args:
        draft: What it holds.
        info: The version that it belongs to.
        attempt: The entry of the attempt in the endpoint's `attempts.json`; the headers get its number.
        spool_dir: An existing directory.
        memory: Where slices before it were cut; None: memory of its own.

    Raises:
        VanishedError: The rows have been dropped.
        CorruptDataError: Stored bytes are not what was written.
        OSError: ``spool_dir`` cannot be written to.
    """
    memory = SliceMemory() if memory is None else memory
    keys, headers, reads, chunk_bytes = _relocate(draft, int(attempt["attempt"]))
    size = chunk_bytes + sum(map(len, headers)) + _AROUND_BYTES
    file = memory.file(size) if size <= _IN_MEMORY_BYTES else _disk_file(spool_dir)
    try:
        # The file's name holds its SHA-256, and each chunk has a checksum: members need none of their own.
        with NpyZipWriter(file, hashes=False) as archive:
            archive.write_array(KEYS, np.array(keys, np.uint64))
            archive.write_array(HEADER_ENDS, np.cumsum([len(header) for header in headers], dtype=np.int64))
            archive.write_array(HEADERS, np.frombuffer(b"".join(headers), np.uint8))
            with archive.member(CHUNKS) as member:
                member.write_npy_header(np.dtype(np.uint8), (chunk_bytes,))
                for block in _blocks(reads, file):
                    member.write(block)
            with archive.member(manifest.MANIFEST_NAME) as member:
                member.write(manifest.encode(_manifest(draft, info, attempt)))
        length = file.seek(0, os.SEEK_END)
        name = layout.SliceName(
            int(attempt["attempt"]),
            keys[0],
            draft.rows,
            draft.ground_truth_rows,
            layout.version_tag(info),
            _sha256(file),
        )
        return Slice(file, name, length)
    except BaseException:
        file.close()
        raise


def _disk_file(directory: Path) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (the slice closes it)
    return file


@dataclass(frozen=True, slots=True)
class _Read:
    """A chunk that goes to the end of the chunks so far."""

    ref: Origin
    key: int
    length_bytes: int
    crc32c: int


def _relocate(draft: SliceDraft, attempt: int) -> tuple[list[int], list[bytes], list[_Read], int]:
    keys, headers, reads = [], [], []
    offset = 0
    for key, value in draft.headers:
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(value), 1))
        unpacker.feed(value)
        unpacker.read_array_header()
        kind, core = unpacker.unpack(), unpacker.unpack()
        rest_at = unpacker.tell()
        if kind == 0:
            shift = (attempt - core["attempt"]) << _ATTEMPT_SHIFT
            core |= {"attempt": attempt, "first_row": core["first_row"] + shift}
            for chunk in core["chunks"]:
                _, sequence, chunk_key, length, crc = chunk
                if sequence == INLINE:
                    continue
                reads.append(_Read(_segment(draft, key, sequence), chunk_key, length, crc))
                chunk[1:3] = 0, offset
                offset += length
            # The description and the inline bytes stay as they are; the last five bytes are the checksum.
            body = b"\x95" + msgpack.packb(kind) + msgpack.packb(core) + value[rest_at:-5]
            value = body + b"\xce" + _core.crc32c(body).to_bytes(4, "big")
        keys.append(key)
        headers.append(value)
    return keys, headers, reads, offset


def _segment(draft: SliceDraft, call: int, sequence: int) -> Origin:
    found = draft.segments.get(sequence)
    if found is None:
        draft.ref.check_exists()
        raise CorruptDataError(
            f"call {call} in {draft.ref.path} has bytes in segment {sequence}, which is not there",
            "restore the segment from a copy, or drop the epoch",
        )
    return found


def _blocks(reads: list[_Read], file: IO[bytes]) -> Iterator[Array]:
    """The chunks in order, each block where ``file`` has it next, if that is a file in memory.

    Segments are open for one step of some MiB only, so that a drop is not held up.
    """
    step: list[_Read] = []
    size = 0
    for read in reads:
        if step and size + read.length_bytes > _STEP_BYTES:
            yield _read_step(step, size, file)
            step, size = [], 0
        step.append(read)
        size += read.length_bytes
    if step:
        yield _read_step(step, size, file)


def _read_step(step: list[_Read], size: int, file: IO[bytes]) -> Array:
    out = file.reserve(size) if isinstance(file, MemoryFile) else np.empty(size, np.uint8)
    by_segment: dict[Origin, list[tuple[int, int, int, int]]] = {}
    offset = 0
    for read in step:
        by_segment.setdefault(read.ref, []).append((read.key, offset, read.length_bytes, read.crc32c))
        offset += read.length_bytes
    for ref, chunks in by_segment.items():
        with ref.opened() as segment:
            segment.read(chunks, out.data)
    return out


def _manifest(draft: SliceDraft, info: layout.VersionInfo, attempt: dict[str, Any]) -> dict[str, Any]:
    # Enough to rebuild the trace's small files from slices alone, where an endpoint cannot keep those.
    return {
        "format_version": manifest.FORMAT_VERSION,
        "kind": "slice",
        "version": layout.version_document(info),
        "rank": draft.ref.rank,
        "epoch": None if draft.ref.epoch == layout.NO_EPOCH else draft.ref.epoch,
        "attempt": attempt,
        "calls": [draft.headers[0][0], draft.headers[-1][0]],
        "meta": {
            "format_version": layout.FORMAT_VERSION,
            "rows": draft.rows,
            "ground_truth_rows": draft.ground_truth_rows,
            "calls": draft.calls,
            "payload_bytes": draft.payload_bytes,
            "discarded_rows": draft.discarded_rows,
        },
    }


def _sha256(file: IO[bytes]) -> str:
    if isinstance(file, MemoryFile):
        with file.view() as view:
            return hashlib.sha256(view).hexdigest()
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(_HASH_STEP_BYTES):
        digest.update(block)
    return digest.hexdigest()
