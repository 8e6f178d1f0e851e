"""Writing the tables of a trace as npy members."""

from __future__ import annotations

import math
from typing import Any

from ml_debugger.exporting.manifest import column_entry
from ml_debugger.exporting.npy_zip import NpyZipWriter
from ml_debugger.exporting.progress import Progress
from ml_debugger.exporting.spool import DenseSpool, SpoolPlace, VariedSpool
from ml_debugger.exporting.streams import dense_stream
from ml_debugger.trace.columns import KeptCall, read_columns
from ml_debugger.trace.header import FEATURES, GROUND_TRUTH, TABLES
from ml_debugger.trace.schema import BASE_COLUMNS, ColumnSchema
from ml_debugger.trace.store_source import Choice, call_blocks

# A pass over the headers costs time by the call, a spool by the byte: columns with few bytes a call share one
# pass.
_SPOOLED_BYTES_A_CALL = 1 << 10
_SPOOLED_BYTES = 4 << 20


class TablesWriter:
    """Writes the columns of both tables; every column of a table has one row order."""

    def __init__(self, archive: NpyZipWriter, choice: Choice, place: SpoolPlace) -> None:
        """``place`` takes temporary files of small columns and of columns whose rows differ in shape."""
        self._archive = archive
        self._choice = choice
        self._schemas = {table: list(choice.known_columns(table).values()) for table in TABLES}
        self._spools: dict[tuple[str, str], DenseSpool | VariedSpool] = {}
        for schema in _both(self._schemas):
            if not schema.is_dense:
                self._spools[schema.table, schema.name] = VariedSpool(schema, place)
            elif not self._streams(schema):
                self._spools[schema.table, schema.name] = DenseSpool(schema, place)

    def write(self, progress: Progress) -> dict[str, Any]:
        """Write all members; returns the manifest's entries of the tables.

        Raises:
            StorageError: A column of several dtypes has no common one, or the disk refused.
            CorruptDataError: Stored bytes are not what was written.
            VanishedError: An epoch has been dropped.
        """
        self._fill_spools()
        planned = sum(spool.planned_bytes for spool in self._spools.values())
        streamed = [schema for schema in _both(self._schemas) if self._streams(schema)]
        progress.start(planned + sum(self._array_bytes(schema) for schema in streamed))
        tables = {}
        for table in TABLES:
            columns = {schema.name: self._write_column(schema, progress) for schema in self._schemas[table]}
            tables[table] = {"rows": self._choice.rows(table), "columns": columns}
        return tables

    def _streams(self, schema: ColumnSchema) -> bool:
        """Whether a column goes straight into its member, in a pass of its own."""
        if not schema.is_dense or schema.name in BASE_COLUMNS:
            return False
        return self._array_bytes(schema) > max(
            _SPOOLED_BYTES, _SPOOLED_BYTES_A_CALL * self._choice.snapshot.num_calls
        )

    def _array_bytes(self, schema: ColumnSchema) -> int:
        return self._choice.rows(schema.table) * math.prod(schema.row_shape) * schema.written.itemsize

    def _fill_spools(self) -> None:
        spooled = {
            table: [schema for schema in self._schemas[table] if (table, schema.name) in self._spools]
            for table in TABLES
        }
        for block in call_blocks(
            self._choice.kept_calls(FEATURES), [*spooled[FEATURES], *spooled[GROUND_TRUTH]]
        ):
            self._spool(block, spooled[FEATURES])
            self._spool([kept for kept in block if kept.call.ground_truth_rows], spooled[GROUND_TRUTH])

    def _spool(self, block: list[KeptCall], schemas: list[ColumnSchema]) -> None:
        if not block:
            return
        values = read_columns(self._choice.snapshot, block, schemas, raw=False)
        for schema in schemas:
            self._spools[schema.table, schema.name].add(values[schema.name])

    def _write_column(self, schema: ColumnSchema, progress: Progress) -> dict[str, Any]:
        name = f"{schema.table}/{schema.name}"
        spool = self._spools.pop((schema.table, schema.name), None)
        if spool is not None:
            return spool.write(self._archive, name, progress)
        with self._archive.member(f"{name}.npy") as member:
            member.write_npy_header(schema.written, (self._choice.rows(schema.table), *schema.row_shape))
            header_bytes = member.length_bytes
            for part in dense_stream(self._choice, schema):
                member.write(part)
                progress.advance(part.nbytes)
            assert member.length_bytes - header_bytes == self._array_bytes(schema)
        return column_entry(schema, schema.written, one_shape=True)


def _both(schemas: dict[str, list[ColumnSchema]]) -> list[ColumnSchema]:
    return [schema for table in TABLES for schema in schemas[table]]
