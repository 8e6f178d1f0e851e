"""Where rows come from: what `Trace` needs from a store on disk and from an exported ZIP alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ml_debugger.errors import InvalidInputError
from ml_debugger.trace.arguments import RowFilter
from ml_debugger.trace.columns import ColumnValues
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.schema import ColumnSchema

# Arrays by dense column, where the next rows, as many as the argument says, are to be read to; a column that
# it does not name gets an array of its own.
Targets: TypeAlias = Callable[[int], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive rows of a selection.

    Attributes:
        rows: How many.
        values: What was read, by column.
        check_exists: Raises NotFoundError if the rows have been dropped since.
    """

    rows: int
    values: dict[str, ColumnValues]
    check_exists: Callable[[], None]


class RowIndex(Protocol):
    """Random access to the rows of a selection, block by block; can be pickled, and holds nothing open."""

    def __len__(self) -> int:
        """How many rows."""

    def locate(self, row: int) -> tuple[int, int]:
        """Which block holds a row, and at which position."""

    def read(self, block: int) -> dict[str, ColumnValues]:
        """Read a block, raw where a column has one dtype.

        Raises:
            NotFoundError: It has been dropped.
        """


class Selection(Protocol):
    """Some rows of one table, in row order, as they were when the selection was made."""

    @property
    def rows(self) -> int:
        """How many rows."""

    def schemas(self, columns: Sequence[str] | None, *, extents: bool) -> list[ColumnSchema]:
        """Schemas of some columns (None: all); ``extents`` also looks how wide texts are, which reads them.

        Raises:
            InvalidInputError: An unknown column.
        """

    def blocks(
        self,
        schemas: Sequence[ColumnSchema],
        *,
        raw: bool,
        out: Targets | None = None,
        max_rows: int | None = None,
    ) -> Iterator[RowBlock]:
        """Read all rows, block by block.

        Args:
            schemas: The columns to read.
            raw: Stored elements instead of widened ones, where a column has one dtype.
            out: Gives arrays for a block before it is read; None: they are made.
            max_rows: End a block when it has so many rows (or a whole call more); None: by size alone.
        """

    def row_index(self, schemas: Sequence[ColumnSchema]) -> RowIndex:
        """The same rows by number."""


class Source(Protocol):
    """A trace on disk or in an export."""

    @property
    def model_name(self) -> str:
        """Name of the model."""

    @property
    def version_name(self) -> str:
        """Name of the version."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the architecture."""

    def epochs(self) -> list[int]:
        """Epochs that hold rows, -1 for the rows without one."""

    def attempts(self) -> list[int]:
        """Numbers of the attempts."""

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table."""

    def select(self, table: str, wanted: RowFilter) -> Selection:
        """Rows of a table."""

    def select_tables(self, wanted: RowFilter) -> tuple[Selection, Selection]:
        """Rows of ``extracted_feature`` and of ``ground_truth`` by one look, so that they belong together."""

    def health(self) -> dict[str, Any]:
        """What is known of the recording itself; see `ml_debugger.analysis.capture`."""


def pick_schemas(
    known: dict[str, ColumnSchema], columns: Sequence[str] | None, table: str
) -> list[ColumnSchema]:
    """Schemas by name, in the order asked for.

    Raises:
        InvalidInputError: An unknown column.
    """
    if columns is None:
        return list(known.values())
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise InvalidInputError(
            f"table {table!r} has no column {unknown[0]!r}; it has {', '.join(map(repr, known))}",
            "name some of these in columns",
        )
    return [known[name] for name in dict.fromkeys(columns)]
