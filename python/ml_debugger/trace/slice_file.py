"""A slice: some calls of a partition in one file, as uploads send them and endpoints keep them.

A ZIP in the layout of an export (npy members, stored uncompressed, and a ``manifest.json``), which holds
headers and chunks as a segment does (`docs/record_format.md`), so that nothing of what was recorded is
converted: dtypes, row numbers, attempts and gaps are those of the trace. Readers use it in place of
    `_core.Segment`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgpack
import numpy as np

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError, NotFoundError, StorageError
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.npy_member import MANIFEST_NAME, npy_header

KEYS, HEADER_ENDS, HEADERS, CHUNKS = "keys.npy", "header_ends.npy", "headers.npy", "chunks.npy"

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_MAX_NPY_HEADER_BYTES = 4096
_CHECKSUM_BYTES = 5
_CACHED_INDEXES = 256
# What reading a file gives that is something else, or bytes of which have changed.
_DAMAGE = (
    zipfile.BadZipFile, struct.error, msgpack.PackException, ValueError, KeyError, TypeError, IndexError,
    EOFError, NotImplementedError, OverflowError, OSError, RecursionError,
)  # fmt: skip
_REMEDY = "upload the slice again with force=True, or remove the file"


@dataclass(frozen=True)
class _Index:
    """Where things lie in a slice; ``header_ends`` count from ``headers_at``."""

    keys: Array
    header_ends: Array
    headers_at: int
    chunks_at: int
    chunks_bytes: int
    meta: bytes


class SliceFile:
    """Read access to one slice, with the methods of `_core.Segment`.

    Raises:
        NotFoundError: No such file.
        CorruptDataError: Not a slice.
        StorageError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFoundError(f"the slice {path} is gone", "list the trace again") from error
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
        try:
            self._index = _index_of(path, self._descriptor)
        except BaseException:
            self.close()
            raise

    def meta(self) -> bytes:
        """The slice's counters, msgpack, as a segment has them."""
        return self._index.meta

    @property
    def keys(self) -> list[int]:
        """Keys of all headers, rising."""
        found: list[int] = self._index.keys.tolist()
        return found

    def headers(self, after: int | None = None, limit: int = 1024) -> list[tuple[int, bytes]]:
        """(key, value) of up to ``limit`` headers behind key ``after``, in key order, checksums verified."""
        index = self._index
        first = 0 if after is None else int(np.searchsorted(index.keys, np.uint64(after), side="right"))
        last = min(first + limit, len(index.keys))
        if first >= last:
            return []
        start = int(index.header_ends[first - 1]) if first else 0
        block = self._pread(index.headers_at + start, int(index.header_ends[last - 1]) - start)
        found = []
        position = 0
        for row in range(first, last):
            end = int(index.header_ends[row]) - start
            found.append((int(index.keys[row]), self._sound(block[position:end])))
            position = end
        return found

    def read(self, chunks: Sequence[tuple[int, int, int, int]], out: Any) -> None:
        """Copy chunks (key, offset in ``out``, bytes, crc32c) to ``out``; a key is an offset in `CHUNKS`."""
        target = memoryview(out).cast("B")
        for key, offset, length, crc in chunks:
            if key + length > self._index.chunks_bytes:
                raise self._damaged(f"chunk {key} lies outside of it")
            data = self._pread(self._index.chunks_at + key, length)
            if _core.crc32c(data) != crc:
                raise self._damaged(f"chunk {key} does not match its checksum")
            target[offset : offset + length] = data

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _pread(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        while len(data) < length:
            more = os.pread(self._descriptor, length - len(data), offset + len(data))
            if not more:
                raise self._damaged("it ends too early")
            data += more
        return data

    def _sound(self, value: bytes) -> bytes:
        if value[-_CHECKSUM_BYTES:] != b"\xce" + _core.crc32c(value[:-_CHECKSUM_BYTES]).to_bytes(4, "big"):
            raise self._damaged("a header does not match its checksum")
        return value

    def _damaged(self, problem: str) -> CorruptDataError:
        return _damaged(self._path, problem)


def _damaged(path: Path, problem: str) -> CorruptDataError:
    return CorruptDataError(f"{path} is not an intact slice: {problem}", _REMEDY)


# Readers open a slice once a step; its index is read once.
_indexes: dict[tuple[Path, int, int, int], _Index] = {}


def _index_of(path: Path, descriptor: int) -> _Index:
    status = os.fstat(descriptor)
    identity = path, status.st_ino, status.st_size, status.st_mtime_ns
    found = _indexes.get(identity)
    if found is None:
        found = _read_index(path, descriptor, status.st_size)
        if len(_indexes) >= _CACHED_INDEXES:
            _indexes.clear()
        _indexes[identity] = found
    return found


def _read_index(path: Path, descriptor: int, size_bytes: int) -> _Index:
    try:
        with open(descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
            if any(info.file_size > size_bytes for info in archive.infolist()):
                raise ValueError("a member is longer than the file")
            arrays = {
                name: _locate(archive.getinfo(name), file) for name in (KEYS, HEADER_ENDS, HEADERS, CHUNKS)
            }
            keys, ends = (_load(file, *arrays[name]) for name in (KEYS, HEADER_ENDS))
            meta = msgpack.packb(json.loads(archive.read(MANIFEST_NAME))["meta"])
    except _DAMAGE as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    (headers_dtype, headers_bytes, headers_at), (chunks_dtype, chunks_bytes, chunks_at) = (
        arrays[HEADERS],
        arrays[CHUNKS],
    )
    is_sound = (
        keys.dtype == np.uint64
        and ends.dtype == np.int64
        and headers_dtype == chunks_dtype == np.uint8
        and len(keys) == len(ends)
        and bool((keys[1:] > keys[:-1]).all())
        and bool((np.diff(ends, prepend=0) > _CHECKSUM_BYTES).all())
        and (int(ends[-1]) if len(ends) else 0) == headers_bytes
        and max(headers_at + headers_bytes, chunks_at + chunks_bytes) <= size_bytes
    )
    if not is_sound:
        raise _damaged(path, "its members contradict each other")
    return _Index(keys, ends, headers_at, chunks_at, chunks_bytes, meta)


def _locate(info: zipfile.ZipInfo, file: IO[bytes]) -> tuple[np.dtype[Any], int, int]:
    """(dtype, elements, offset of the first one) of a one-dimensional npy member."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"member {info.filename!r} is compressed or encrypted")
    file.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
    file.seek(start)
    head = io.BytesIO(file.read(min(_MAX_NPY_HEADER_BYTES, info.file_size)))
    shape, fortran_order, dtype = npy_header(head)
    if len(shape) != 1 or fortran_order or dtype.hasobject:
        raise ValueError(f"member {info.filename!r} has the shape {shape} of {dtype}")
    if shape[0] * dtype.itemsize != info.file_size - head.tell():
        raise ValueError(f"member {info.filename!r} has {info.file_size} bytes for shape {shape} of {dtype}")
    return dtype, shape[0], start + head.tell()


def _load(file: IO[bytes], dtype: np.dtype[Any], count: int, offset: int) -> Array:
    file.seek(offset)
    return np.frombuffer(file.read(count * dtype.itemsize), dtype)
