"""Writing one table of a trace as npy members."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ml_debugger.exporting.manifest import column_entry
from ml_debugger.exporting.npy_zip import MemberWriter, NpyZipWriter
from ml_debugger.exporting.progress import Progress
from ml_debugger.exporting.streams import block_stream, dense_stream, ragged_stream
from ml_debugger.trace.assemble import read_arrays
from ml_debugger.trace.columns import RaggedRows
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.schema import BASE_COLUMNS, ColumnSchema
from ml_debugger.trace.store_source import Choice, StoreSelection

# Small columns are read together, in one pass over the headers; larger ones stream, one pass each.
_SMALL_COLUMN_BYTES = 4 << 20
_SMALL_COLUMNS_BYTES = 32 << 20
_COPY_BYTES = 4 << 20


class TableWriter:
    """Writes the columns of one table; every column has one row order."""

    def __init__(self, archive: NpyZipWriter, choice: Choice, table: str, spool_dir: Path) -> None:
        """``spool_dir`` takes temporary files while columns of differing shapes are written."""
        self._archive = archive
        self._choice = choice
        self._table = table
        self._spool_dir = spool_dir
        self._selection = StoreSelection(choice, table)
        self._schemas = self._selection.schemas(None, extents=True)

    @property
    def planned_bytes(self) -> int:
        """Bytes that will be written, without columns of differing shapes, whose size nobody knows yet."""
        return sum(self._array_bytes(schema) for schema in self._schemas if _makes_one_array(schema))

    def write(self, progress: Progress) -> dict[str, Any]:
        """Write all members; returns the table's entry of the manifest.

        Raises:
            StorageError: A column of several dtypes has no common one, or the disk refused.
            CorruptDataError: Stored bytes are not what was written.
            VanishedError: An epoch has been dropped.
        """
        small = read_arrays(self._selection, self._small())
        columns = {}
        for schema in self._schemas:
            columns[schema.name] = self._write_column(schema, small.pop(schema.name, None), progress)
        return {"rows": self._selection.rows, "columns": columns}

    def _small(self) -> list[ColumnSchema]:
        chosen, left = [], _SMALL_COLUMNS_BYTES
        for schema in self._schemas:
            if _makes_one_array(schema) and (size := self._array_bytes(schema)) <= min(_SMALL_COLUMN_BYTES, left):
                chosen.append(schema)
                left -= size
        return chosen

    def _array_bytes(self, schema: ColumnSchema) -> int:
        return self._selection.rows * math.prod(schema.row_shape) * _written_dtype(schema).itemsize

    def _write_column(self, schema: ColumnSchema, values: Array | None, progress: Progress) -> dict[str, Any]:
        name = f"{self._table}/{schema.name}"
        if not _makes_one_array(schema):
            return column_entry(schema, self._write_ragged(name, schema, progress), one_shape=False)
        dtype = _written_dtype(schema)
        with self._archive.member(f"{name}.npy") as member:
            member.write_npy_header(dtype, (self._selection.rows, *schema.row_shape))
            header_bytes = member.length_bytes
            for part in self._parts(schema, dtype) if values is None else (values,):
                member.write(part)
                progress.advance(part.nbytes)
            assert member.length_bytes - header_bytes == self._array_bytes(schema)
        return column_entry(schema, dtype, one_shape=True)

    def _parts(self, schema: ColumnSchema, dtype: np.dtype[Any]) -> Iterator[Array]:
        if schema.is_list or schema.name in BASE_COLUMNS:
            return block_stream(self._selection, schema, dtype)
        return dense_stream(self._choice, schema)

    def _write_ragged(self, name: str, schema: ColumnSchema, progress: Progress) -> np.dtype[Any]:
        """Write the three members of a column whose rows differ in shape; returns the dtype of its elements."""
        dtype = np.dtype(np.uint8) if schema.is_list else schema.written
        elements, ndim = self._measure(schema)
        rows = self._selection.rows
        with (
            tempfile.TemporaryFile(dir=self._spool_dir) as offsets,
            tempfile.TemporaryFile(dir=self._spool_dir) as shapes,
        ):
            with self._archive.member(f"{name}.values.npy") as member:
                member.write_npy_header(dtype, (elements,))
                self._write_values(member, schema, ndim, (offsets, shapes), progress)
            for suffix, spooled, shape in (("offsets", offsets, (rows + 1,)), ("shapes", shapes, (rows, ndim))):
                with self._archive.member(f"{name}.{suffix}.npy") as member:
                    member.write_npy_header(np.dtype("<i8"), shape)
                    _copy(spooled, member)
        return dtype

    def _measure(self, schema: ColumnSchema) -> tuple[int, int]:
        """(elements, largest number of dimensions) of a column."""
        elements, ndim = 0, 1 if schema.is_list else 0
        for run in ragged_stream(self._selection, schema):
            elements += int(run.lengths.sum())
            # Rows padded from a wider neighbour that was left out do not count.
            used = np.flatnonzero((run.shapes >= 0).any(axis=0))
            ndim = max(ndim, run.shapes.shape[1] - int(used[0]) if used.size else 0)
        return elements, ndim

    def _write_values(
        self,
        member: MemberWriter,
        schema: ColumnSchema,
        ndim: int,
        spools: tuple[IO[bytes], IO[bytes]],
        progress: Progress,
    ) -> None:
        offsets, shapes = spools
        end = 0
        offsets.write(np.zeros(1, "<i8").tobytes())
        for run in ragged_stream(self._selection, schema):
            member.write(np.ascontiguousarray(run.values))
            ends = end + np.cumsum(run.lengths, dtype="<i8")
            end = int(ends[-1]) if ends.size else end
            offsets.write(ends.tobytes())
            shapes.write(_padded(run, ndim).tobytes())
            progress.advance(run.values.nbytes)


def _padded(run: RaggedRows, ndim: int) -> Array:
    """Shapes with exactly ``ndim`` columns: -1 in front added, or cut off where no row needs it."""
    rows, found = run.shapes.shape
    padded = np.full((rows, ndim), -1, "<i8")
    common = min(ndim, found)
    if common:
        padded[:, ndim - common :] = run.shapes[:, found - common :]
    return padded


def _copy(spooled: IO[bytes], member: MemberWriter) -> None:
    spooled.seek(0)
    while part := spooled.read(_COPY_BYTES):
        member.write(part)


def _makes_one_array(schema: ColumnSchema) -> bool:
    return schema.is_dense or schema.fits_numpy_text


def _written_dtype(schema: ColumnSchema) -> np.dtype[Any]:
    return schema.extent.numpy_dtype if schema.is_text else schema.written
