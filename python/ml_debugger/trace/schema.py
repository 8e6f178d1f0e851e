"""What the columns of a selection of rows consist of, collected call by call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ml_debugger.errors import StorageError
from ml_debugger.trace.dtypes import FIELD_DTYPES, common_written_dtype, recorded_dtype
from ml_debugger.trace.header import Call, CallDescription, ColumnDescription
from ml_debugger.trace.runs import CallRun

BASE_COLUMNS = ("row_id", "input_id", "dataset_type", "n_epoch")
MAX_TEXT_CHARACTERS = 256

_MAX_PENDING = 256


@dataclass
class TextExtent:
    """How wide the texts of a column are; ``ends_in_nul`` tells of texts that numpy's ``U`` would shorten."""

    characters: int = 0
    ends_in_nul: bool = False

    def add(self, values: list[str]) -> None:
        """Take in some values."""
        self.characters = max(self.characters, max(map(len, values), default=0))
        if not self.ends_in_nul and "\0" in "".join(values):
            self.ends_in_nul = any(value.endswith("\0") for value in values)

    @property
    def fits_numpy(self) -> bool:
        """Whether the values become a numpy ``U`` array, as the contract has it."""
        return self.characters <= MAX_TEXT_CHARACTERS and not self.ends_in_nul

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The ``U`` dtype of the widest value."""
        return np.dtype(f"<U{max(self.characters, 1)}")


@dataclass
class ColumnSchema:
    """One column of one table, over all rows of a selection.

    Attributes:
        name: Name of the column.
        table: Its table.
        recorded: Names of the recorded types, in the order of their first row; empty without rows.
        dtypes: Torch names of the element types; empty for text, bytes, and without rows.
        row_shapes: Distinct shapes of one row; stops growing at two. None stands for rows of differing shape.
        max_ndim: No row has more dimensions.
        rows: Rows that have the column.
        missing: Whether some rows lack the column.
        extent: Of text columns, once their values were seen.
    """

    name: str
    table: str
    recorded: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    row_shapes: list[tuple[int, ...] | None] = field(default_factory=list)
    max_ndim: int = 0
    rows: int = 0
    missing: bool = False
    extent: TextExtent = field(default_factory=TextExtent)

    @property
    def is_list(self) -> bool:
        """Whether rows are text or bytes."""
        return bool(self.recorded) and not self.dtypes

    @property
    def is_text(self) -> bool:
        """Whether rows are text."""
        return self.recorded == ["str"]

    @property
    def is_dense(self) -> bool:
        """Whether the rows make one array of numbers."""
        return (
            not self.is_list and len(self.row_shapes) < 2 and self.row_shapes != [None] and not self.missing
        )

    @property
    def fits_numpy_text(self) -> bool:
        """Whether the rows make one ``U`` array."""
        return self.is_text and not self.missing and self.extent.fits_numpy

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of a dense column."""
        return (self.row_shapes[0] if self.row_shapes else None) or ()

    @property
    def written(self) -> np.dtype[Any]:
        """Numpy dtype of the elements of a numeric column (float32 where there never was a row).

        Raises:
            StorageError: No numpy dtype holds them all.
        """
        return common_written_dtype(self.dtypes, self.name) if self.dtypes else np.dtype("<f4")

    def check_written(self) -> None:
        """Raise StorageError if no numpy dtype holds the elements of a numeric column."""
        if self.dtypes:
            common_written_dtype(self.dtypes, self.name)

    def add(self, column: ColumnDescription, rows: int) -> None:
        """Take in ``rows`` rows."""
        self.rows += rows
        self.max_ndim = max(self.max_ndim, len(column.row_shape or ()))
        if column.recorded not in self.recorded:
            self.recorded.append(column.recorded)
        if not column.is_list and column.dtype not in self.dtypes:
            self.dtypes.append(column.dtype)
        if not column.is_list and len(self.row_shapes) < 2 and column.row_shape not in self.row_shapes:
            self.row_shapes.append(column.row_shape)
        if len(self.recorded) > 1 and ("str" in self.recorded or "bytes" in self.recorded):
            raise StorageError(
                f"column {self.name!r} was recorded as {' and '.join(self.recorded)}, which no array holds",
                "read it by epoch or by dataset_type",
            )


def base_schema(name: str, table: str, rows: int) -> ColumnSchema:
    """Schema of ``row_id``, ``input_id``, ``dataset_type`` or ``n_epoch``, which every row has."""
    schema = ColumnSchema(name, table, rows=rows)
    if name in ("input_id", "dataset_type"):
        schema.recorded = ["str"]
    else:
        schema.recorded, schema.dtypes, schema.row_shapes = ["int64"], ["int64"], [()]
    return schema


class SchemaCollector:
    """Collects the schemas of both tables from calls, in any order."""

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], ColumnSchema] = {}
        self._rows: dict[str, int] = {}
        self._pending: dict[int, tuple[CallDescription, dict[str, int]]] = {}

    def add(self, call: Call | CallRun, rows: int) -> None:
        """Take in ``rows`` rows of a call (all of them, or those that were kept)."""
        # Calls share descriptions; so rows are only counted here. Keeping the description keeps its id
        # unique.
        pending = self._pending.get(id(call.description))
        if pending is None:
            if len(self._pending) >= _MAX_PENDING:
                self._flush()
            pending = self._pending[id(call.description)] = (call.description, {})
        if call.description.has_shapes and isinstance(call, Call):  # a run has no such rows
            self._add_shapes(call)
        counts = pending[1]
        counts["extracted_feature"] = counts.get("extracted_feature", 0) + rows
        if call.ground_truth_rows:
            counts["ground_truth"] = counts.get("ground_truth", 0) + rows

    def _add_shapes(self, call: Call) -> None:
        """Note how many dimensions rows of differing shape have, by the bytes of their shapes."""
        for column in call.description.columns:
            if column.shapes_capture is not None:
                key = column.table, column.name
                schema = self._columns.setdefault(key, ColumnSchema(column.name, column.table))
                samples = 1 if column.broadcast else call.rows
                schema.max_ndim = max(
                    schema.max_ndim, call.capture_bytes(column.shapes_capture) // (8 * max(samples, 1))
                )

    def rows(self, table: str) -> int:
        """Rows of a table."""
        self._flush()
        return self._rows.get(table, 0)

    def columns(self, table: str) -> dict[str, ColumnSchema]:
        """Schemas by name: the four that every table has, then the others in the order of their first row."""
        self._flush()
        rows = self.rows(table)
        schemas = {name: base_schema(name, table, rows) for name in BASE_COLUMNS}
        for (owner, name), schema in self._columns.items():
            if owner == table and name not in schemas:
                schema.missing = schema.rows < rows
                schemas[name] = schema
        return schemas

    def _flush(self) -> None:
        for description, counts in self._pending.values():
            for table, rows in counts.items():
                self._rows[table] = self._rows.get(table, 0) + rows
            for column in description.columns:
                rows = counts.get(column.table, 0)
                if rows:
                    key = column.table, column.name
                    schema = self._columns.setdefault(key, ColumnSchema(column.name, column.table))
                    schema.add(column, rows)
        self._pending.clear()


def recorded_label(schema: ColumnSchema) -> str | list[str] | None:
    """The recorded type in a manifest: a name, a list of names where it varies, None without rows."""
    if len(schema.recorded) == 1:
        return schema.recorded[0]
    return sorted(schema.recorded) or None


def element_dtype_names(recorded: list[str]) -> list[str]:
    """Torch names behind names of a manifest (``int`` is ``int64``); none for text and bytes."""
    names = [FIELD_DTYPES.get(name, name) for name in recorded if name not in ("str", "bytes")]
    return [recorded_dtype(name).name for name in names]
