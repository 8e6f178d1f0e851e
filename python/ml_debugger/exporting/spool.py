"""Columns that are gathered in temporary files before they become members.

One pass over the calls feeds all spools; what a column turns out to be (how wide its text is, how many
elements it has) is known when its members are written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ml_debugger.exporting.manifest import column_entry
from ml_debugger.exporting.npy_zip import NpyZipWriter
from ml_debugger.exporting.progress import Progress
from ml_debugger.trace.columns import ColumnValues, RaggedRows
from ml_debugger.trace.dtypes import Array, recorded_dtype
from ml_debugger.trace.schema import ColumnSchema, TextExtent

_IN_MEMORY_BYTES = 1 << 20
_COPY_BYTES = 4 << 20
_COPY_ROWS = 1 << 15
_UINT8 = recorded_dtype("uint8")


class SpoolPlace(contextlib.ExitStack):
    """Where spools lie; they are gone when the context ends."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def open(self) -> IO[bytes]:
        """A new temporary file, in memory as long as it is small."""
        return self.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=str(self._directory)))


class _Spool:
    """A temporary file that is written first and read once afterwards."""

    def __init__(self, place: SpoolPlace) -> None:
        self._file: IO[bytes] = place.open()
        self.length_bytes = 0

    def add(self, values: Array) -> None:
        self.length_bytes += self._file.write(np.ascontiguousarray(values).tobytes())

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, length_bytes: int) -> bytes:
        return self._file.read(length_bytes)

    def parts(self) -> Iterator[bytes]:
        """Everything, and then nothing is left."""
        self.rewind()
        while part := self._file.read(_COPY_BYTES):
            yield part
        self._file.close()


class DenseSpool:
    """The rows of a column that makes one array of numbers."""

    def __init__(self, schema: ColumnSchema, place: SpoolPlace) -> None:
        self._schema = schema
        self._values = _Spool(place)
        self._rows = 0

    def add(self, values: ColumnValues) -> None:
        """Append rows."""
        assert isinstance(values, np.ndarray)
        self._rows += len(values)
        self._values.add(values)

    @property
    def planned_bytes(self) -> int:
        """Bytes that `write` will write, without headers."""
        return self._values.length_bytes

    def write(self, archive: NpyZipWriter, name: str, progress: Progress) -> dict[str, Any]:
        """Write the member; returns the column's entry of the manifest."""
        dtype = self._schema.written
        with archive.member(f"{name}.npy") as member:
            member.write_npy_header(dtype, (self._rows, *self._schema.row_shape))
            for part in self._values.parts():
                member.write(part)
                progress.advance(len(part))
        return column_entry(self._schema, dtype, one_shape=True)


class VariedSpool:
    """The rows of a column of text, bytes, or differing shapes: elements, lengths and shapes apart."""

    def __init__(self, schema: ColumnSchema, place: SpoolPlace) -> None:
        self._schema = schema
        self._dtype = np.dtype(np.uint8) if schema.is_list else schema.written
        self._values, self._lengths, self._shapes = (_Spool(place) for _ in range(3))
        self._ndim_bound = 1 if schema.is_list else schema.max_ndim
        self._ndim = 1 if schema.is_list else 0
        self._rows = 0
        schema.extent = TextExtent()

    def add(self, values: ColumnValues) -> None:
        """Append rows."""
        if self._schema.is_list:
            self._add_run(self._encoded(list(values)))
            return
        for run in values:
            assert isinstance(run, RaggedRows)
            self._add_run(run)

    @property
    def planned_bytes(self) -> int:
        """Bytes that `write` will write, without headers."""
        if self._schema.fits_numpy_text:
            return self._rows * self._schema.extent.numpy_dtype.itemsize
        return self._values.length_bytes + 8 * (self._rows + 1) + 8 * self._rows * self._ndim

    def write(self, archive: NpyZipWriter, name: str, progress: Progress) -> dict[str, Any]:
        """Write the members; returns the column's entry of the manifest."""
        if self._schema.fits_numpy_text:
            return self._write_text(archive, name, progress)
        with archive.member(f"{name}.values.npy") as member:
            member.write_npy_header(self._dtype, (self._values.length_bytes // self._dtype.itemsize,))
            for part in self._values.parts():
                member.write(part)
                progress.advance(len(part))
        with archive.member(f"{name}.offsets.npy") as member:
            member.write_npy_header(np.dtype("<i8"), (self._rows + 1,))
            member.write(np.zeros(1, "<i8"))
            progress.advance(8)
            end = 0
            for lengths in self._parts_of(self._lengths, 1):
                ends = end + np.cumsum(lengths[:, 0])
                end = int(ends[-1])
                member.write(ends)
                progress.advance(ends.nbytes)
        with archive.member(f"{name}.shapes.npy") as member:
            member.write_npy_header(np.dtype("<i8"), (self._rows, self._ndim))
            for shapes in self._parts_of(self._shapes, self._ndim_bound):
                # Dimensions that only rows had that were left out are not there.
                shapes = np.ascontiguousarray(shapes[:, self._ndim_bound - self._ndim :])
                member.write(shapes)
                progress.advance(shapes.nbytes)
        return column_entry(self._schema, self._dtype, one_shape=False)

    def _encoded(self, values: list[Any]) -> RaggedRows:
        """Text and bytes as rows of uint8; None has no shape."""
        encoded = values
        if self._schema.is_text:
            texts = [value for value in values if value is not None] if self._schema.missing else values
            self._schema.extent.add(texts)
            if not self._schema.missing and (whole := "".join(texts)).isascii():
                lengths = np.fromiter(map(len, texts), "<i8", len(texts))
                return RaggedRows(
                    np.frombuffer(whole.encode(), np.uint8), _UINT8, lengths, lengths.reshape(-1, 1)
                )
            encoded = [None if value is None else value.encode() for value in values]
        shapes = None
        if self._schema.missing:
            shapes = np.array([[-1 if value is None else len(value)] for value in encoded], "<i8").reshape(
                -1, 1
            )
            encoded = [value or b"" for value in encoded]
        lengths = np.fromiter(map(len, encoded), "<i8", len(encoded))
        joined = np.frombuffer(b"".join(encoded), np.uint8)
        return RaggedRows(joined, _UINT8, lengths, lengths.reshape(-1, 1) if shapes is None else shapes)

    def _add_run(self, run: RaggedRows) -> None:
        rows, found = run.shapes.shape
        self._rows += rows
        self._values.add(run.values)
        self._lengths.add(run.lengths.astype("<i8", copy=False))
        padded = np.full((rows, self._ndim_bound), -1, "<i8")
        padded[:, self._ndim_bound - found :] = run.shapes
        used = np.flatnonzero((padded >= 0).any(axis=0))
        self._ndim = max(self._ndim, self._ndim_bound - int(used[0]) if used.size else 0)
        self._shapes.add(padded)

    def _parts_of(self, spool: _Spool, width: int) -> Iterator[Array]:
        """int64 rows of a spool, some at a time."""
        spool.rewind()
        while width and (part := spool.read(8 * width * _COPY_ROWS)):
            yield np.frombuffer(part, "<i8").reshape(-1, width)

    def _write_text(self, archive: NpyZipWriter, name: str, progress: Progress) -> dict[str, Any]:
        dtype = self._schema.extent.numpy_dtype
        self._values.rewind()
        with archive.member(f"{name}.npy") as member:
            member.write_npy_header(dtype, (self._rows,))
            for lengths in self._parts_of(self._lengths, 1):
                ends = np.cumsum(lengths[:, 0]).tolist()
                encoded = self._values.read(ends[-1])
                if encoded.isascii():
                    part = _ascii_texts(encoded, lengths, dtype)
                else:
                    bounds = zip([0, *ends], ends, strict=False)
                    part = np.array([encoded[start:end].decode() for start, end in bounds], dtype)
                member.write(part)
                progress.advance(part.nbytes)
        return column_entry(self._schema, dtype, one_shape=True)


def _ascii_texts(encoded: bytes, lengths: Array, dtype: np.dtype[Any]) -> Array:
    """ASCII texts, one after the other, as numpy text: one character a code point, padded with NUL."""
    width = dtype.itemsize // 4
    codes = np.zeros((len(lengths), width), "<u4")
    codes[np.arange(width) < lengths] = np.frombuffer(encoded, np.uint8)
    return codes.view(dtype)[:, 0]
