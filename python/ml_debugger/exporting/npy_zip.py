"""A ZIP of npy members that is written once, front to back, with the SHA-256 of every member.

Members are stored uncompressed and start at multiples of 64 bytes, so that readers can map them. Nothing in
the file depends on when or where it was written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from ml_debugger.trace.dtypes import Array

_ALIGNMENT_BYTES = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PADDING_ID = 0xD935  # the id that zipalign uses for padding
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)
_UNIX = 3


class MemberWriter:
    """One open member. Its SHA-256, if it gets one, is computed beside the writing, on another thread."""

    def __init__(self, member: IO[bytes], hasher: ThreadPoolExecutor | None) -> None:
        self._member = member
        self._hasher = hasher
        self._sha256 = hashlib.sha256()
        self._hashed: Future[None] | None = None
        self.length_bytes = 0

    def write_npy_header(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        """Write the header of an array in C order."""
        buffer = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, header)
        self.write(buffer.getvalue())

    def write(self, data: bytes | Array) -> None:
        """Append bytes or a contiguous array, which must not change until the next `write` has returned."""
        view = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
        if not view.size:
            return
        if self._hasher is not None:
            self._wait()
            self._hashed = self._hasher.submit(self._sha256.update, view.data)
        self._member.write(view.data)
        self.length_bytes += view.nbytes

    def sha256(self) -> str:
        """Hex digest of everything written."""
        self._wait()
        return self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._hashed is not None:
            self._hashed.result()
            self._hashed = None


class NpyZipWriter:
    """Writes the members of an archive; use as a context manager, its end writes the directory.

    Args:
        file: Open for writing, seekable and empty.
        hashes: Whether members are hashed; if not, ``members`` stays empty.
    """

    def __init__(self, file: IO[bytes], *, hashes: bool = True) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._hasher = ThreadPoolExecutor(1, "ml-debugger-sha256") if hashes else None
        self.members: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> NpyZipWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._hasher is not None:
            self._hasher.shutdown()
        if error is None:
            self._zip.close()
            return
        # The owner throws a failed archive away; what fails here too must not hide why.
        with contextlib.suppress(OSError, ValueError):
            self._zip.close()

    @contextlib.contextmanager
    def member(self, name: str) -> Iterator[MemberWriter]:
        """Append a member; its length and SHA-256 are in ``members`` afterwards."""
        with self._zip.open(self._info(name), "w", force_zip64=True) as stream:
            writer = MemberWriter(stream, self._hasher)
            yield writer
            digest = writer.sha256()
        if self._hasher is not None:
            self.members[name] = {"sha256": digest, "bytes": writer.length_bytes}

    def write_array(self, name: str, array: Array) -> None:
        """Append an array as one npy member."""
        with self.member(name) as writer:
            writer.write_npy_header(array.dtype, array.shape)
            writer.write(np.ascontiguousarray(array))

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(name, _EPOCH_OF_ZIP)
        info.create_system = _UNIX
        info.external_attr = 0o644 << 16
        start = self._file.tell() + _LOCAL_HEADER_BYTES + len(name.encode()) + _ZIP64_EXTRA_BYTES + 4
        padding = -start % _ALIGNMENT_BYTES
        info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        return info
