"""`Trace.to_parquet`: a table as many Parquet files, by epoch, for engines that read them in parallel."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_debugger.errors import InvalidInputError, StorageError
from ml_debugger.extras import require
from ml_debugger.trace.arrow import arrow_schema, read_batches
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.source import Selection

if TYPE_CHECKING:
    pass

# What a path says already: engines take the column from there, and some refuse it twice.
_PARTITION_COLUMN = "n_epoch"
_GROUP_ROWS = 1 << 16


def write_parquet_files(
    selections: Iterator[tuple[int, Selection]],
    schemas: Sequence[ColumnSchema],
    directory: Path,
    rows_a_file: int,
) -> list[Path]:
    """Write ``n_epoch=<n>/part-<k>.parquet`` for each epoch; all files have the same columns and types.

    The directory appears whole, by a rename; what an interrupted run leaves beside it begins with a dot.

    Raises:
        InvalidInputError: The directory exists and is not empty; pyarrow is not installed.
        StorageError: It cannot be written.
    """
    parquet = require("pyarrow.parquet", "arrow", "to_parquet")
    temporary = directory.with_name(f".{directory.name[:100]}-{secrets.token_hex(4)}")
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InvalidInputError(f"{directory} exists and is not empty", "name a new directory")
        temporary.mkdir(parents=True)
        for epoch, selection in selections:
            place = temporary / f"{_PARTITION_COLUMN}={epoch}"
            place.mkdir()
            _write_epoch(
                parquet, selection, [s for s in schemas if s.name != _PARTITION_COLUMN], place, rows_a_file
            )
        os.replace(temporary, directory)
    except OSError as error:
        raise StorageError(
            f"cannot write {directory}: {error.strerror or error}", "check that it is writable and has space"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(directory.glob("*/*.parquet"))


def _write_epoch(
    parquet: Any, selection: Selection, schemas: list[ColumnSchema], place: Path, rows_a_file: int
) -> None:
    target = arrow_schema(schemas)
    group_rows = min(rows_a_file, _GROUP_ROWS)
    rows, number, writer = 0, 0, None
    try:
        for batch in read_batches(selection, schemas, target, group_rows):
            if writer is None:
                path = place / f"part-{number:05d}.parquet"
                writer = parquet.ParquetWriter(path, target, version="2.6", compression="zstd")
            writer.write_batch(batch)
            rows += batch.num_rows
            if rows >= rows_a_file:
                writer.close()
                rows, number, writer = 0, number + 1, None
    finally:
        if writer is not None:
            writer.close()
