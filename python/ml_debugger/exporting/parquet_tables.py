"""Writing the tables of a trace as Parquet members: one file a table, a row group at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ml_debugger.exporting.manifest import column_entry, list_entry
from ml_debugger.exporting.npy_zip import MemberWriter, NpyZipWriter
from ml_debugger.exporting.progress import Progress
from ml_debugger.extras import require
from ml_debugger.trace.arrow import arrow_schema, read_batches
from ml_debugger.trace.header import TABLES
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.store_source import Choice, StoreSelection

if TYPE_CHECKING:
    import pyarrow

_ROW_GROUP_BYTES = 32 << 20
_ROW_GROUP_ROWS = 1 << 20
_VARIED_VALUE_BYTES = 16  # what a text, or a row of differing shape, counts in the progress


def require_parquet() -> Any:
    """pyarrow.parquet, or an InvalidInputError that says how to install it."""
    return require("pyarrow.parquet", "arrow", 'format="parquet"')


def write_parquet_tables(archive: NpyZipWriter, choice: Choice, progress: Progress) -> dict[str, Any]:
    """Write one member a table; returns the manifest's entries of the tables.

    Memory: one row group of 32 MiB, or of one call that is larger, and its encoded columns.

    Raises:
        StorageError: A column of several dtypes has no common one, or the disk refused.
        CorruptDataError: Stored bytes are not what was written.
        VanishedError: An epoch has been dropped.
    """
    schemas = {table: list(choice.known_columns(table).values()) for table in TABLES}
    progress.start(sum(choice.rows(table) * _row_bytes(columns) for table, columns in schemas.items()))
    tables = {}
    for table, columns in schemas.items():
        with archive.member(f"{table}.parquet") as member:
            _write_table(member, StoreSelection(choice, table), columns, progress)
        entries = {schema.name: _entry(schema) for schema in columns}
        tables[table] = {"rows": choice.rows(table), "columns": entries}
    return tables


def _write_table(
    member: MemberWriter, selection: StoreSelection, schemas: list[ColumnSchema], progress: Progress
) -> None:
    parquet = require_parquet()
    target = arrow_schema(schemas)
    # Numbers of a network repeat too seldom for a dictionary, and their extremes help no query.
    plain = [schema.name for schema in schemas if schema.is_list or not schema.row_shape]
    texts = [schema.name for schema in schemas if schema.is_text]
    row_bytes = _row_bytes(schemas)
    writer = parquet.ParquetWriter(
        _Sink(member),
        target,
        version="2.6",
        compression="zstd",
        use_dictionary=texts,
        write_statistics=plain,
    )
    with writer:
        for group in _row_groups(read_batches(selection, schemas, target, None), target):
            writer.write_table(group, row_group_size=max(group.num_rows, 1))
            progress.advance(group.num_rows * row_bytes)


def _row_groups(batches: Iterator[pyarrow.RecordBatch], target: pyarrow.Schema) -> Iterator[pyarrow.Table]:
    pa = require("pyarrow", "arrow", 'format="parquet"')
    kept: list[pyarrow.RecordBatch] = []
    size = rows = 0
    for batch in batches:
        kept.append(batch)
        size, rows = size + batch.nbytes, rows + batch.num_rows
        if size >= _ROW_GROUP_BYTES or rows >= _ROW_GROUP_ROWS:
            yield pa.Table.from_batches(kept, target)
            kept, size, rows = [], 0, 0
    if kept:
        yield pa.Table.from_batches(kept, target)


def _row_bytes(schemas: list[ColumnSchema]) -> int:
    return sum(
        math.prod(schema.row_shape) * schema.written.itemsize
        if schema.is_dense and not schema.is_list
        else _VARIED_VALUE_BYTES
        for schema in schemas
    )


def _entry(schema: ColumnSchema) -> dict[str, Any]:
    if schema.is_list:
        return list_entry(schema)
    return column_entry(schema, schema.written, one_shape=schema.is_dense)


class _Sink:
    """What pyarrow writes to: a member, front to back."""

    closed = False

    def __init__(self, member: MemberWriter) -> None:
        self._member = member

    def write(self, data: Any) -> int:
        # The checksum is computed beside the writing; pyarrow may use its buffer again meanwhile.
        self._member.write(bytes(data))
        return len(data)

    def tell(self) -> int:
        return self._member.length_bytes

    def flush(self) -> None:
        """Nothing is kept back."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """The archive closes the member."""
