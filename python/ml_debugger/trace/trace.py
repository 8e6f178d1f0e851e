"""The reading face: one class over a store and over an exported ZIP."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.store import layout
from ml_debugger.trace.assemble import iterate_batches, read_arrays, read_tensors
from ml_debugger.trace.catalog import retry_vanished
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.header import TABLES
from ml_debugger.trace.source import Selection, Source
from ml_debugger.trace.store_source import StoreSource

if TYPE_CHECKING:
    import torch


def open_trace(model_name: str, version_name: str, data_dir: str | os.PathLike[str] | None = None) -> Trace:
    """Open a recorded trace for reading, also while a tracer writes to it. Creates nothing on disk.

    Args:
        model_name: As given to the tracer.
        version_name: As given to the tracer.
        data_dir: Where traces live; None: ``MLD_DATA_DIR``, else ``./mld_data``. The address of an endpoint
            works too (``s3://bucket/traces``, ``https://collector.example``): what it holds is fetched first,
            once, into ``~/.cache/ml_debugger``; the key is that of ``MLD_API_KEY``.

    Raises:
        NotFoundError: No such trace.
        InvalidTypeError: A name that is not text.
        InvalidInputError: An empty name.
        CorruptDataError: The trace's `version.json` is damaged or of a newer format.
        UploadError: An endpoint cannot be read.
    """
    model = layout.check_name(model_name, "model_name")
    version = layout.check_name(version_name, "version_name")
    if isinstance(data_dir, str) and "://" in data_dir:
        from ml_debugger.uploading.mirror import mirror_endpoint

        data_dir = mirror_endpoint(data_dir, model, version)
    return Trace(StoreSource(layout.trace_directory(layout.resolve_data_dir(data_dir), model, version)))


class Trace:
    """Recorded rows of one (model, version).

    All columns of a table have one row order: by (epoch, attempt, call, rank, position in the call). Every
    method sees what is committed when it is called. The two tables are ``"extracted_feature"`` and
    ``"ground_truth"``; a ground-truth row has the ``row_id`` of its feature row. Common arguments:

    * ``n_epoch``: the epoch; None: all; -1: rows without one. An epoch that is not there has no rows.
    * ``dataset_type``: only rows recorded with this ``dataset_type``; None: all.
    * ``columns``: names of columns; None: all.
    * ``dedupe``: of the rows that have an epoch, only the newest for each (dataset_type, n_epoch, input_id).

    Made by `open_trace` and `load_export`.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __repr__(self) -> str:
        return f"Trace({self.model_name!r}, {self.version_name!r})"

    @property
    def model_name(self) -> str:
        """Name of the model."""
        return self._source.model_name

    @property
    def version_name(self) -> str:
        """Name of the version."""
        return self._source.version_name

    @property
    def fingerprint(self) -> str:
        """Hex digest of the recorded architecture."""
        return self._source.fingerprint

    @property
    def epochs(self) -> list[int]:
        """Epochs that hold rows, rising; -1 first if there are rows without one."""
        return self._source.epochs()

    @property
    def attempts(self) -> list[int]:
        """Numbers of the attempts (constructions of a tracer), rising."""
        return self._source.attempts()

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table.

        Raises:
            InvalidInputError: Not one of the two tables.
        """
        return self._source.columns(_check_table(table))

    def num_rows(
        self, table: str, n_epoch: int | None = None, dataset_type: str | None = None, *, dedupe: bool = False
    ) -> int:
        """Number of rows; 0 for a table or an epoch that the trace does not have.

        Raises:
            InvalidInputError: Not one of the two tables, or an ``n_epoch`` below -1.
            InvalidTypeError: An ``n_epoch`` that is not an int, or a ``dataset_type`` that is not text.
        """
        return self._select(table, n_epoch, dataset_type, dedupe).rows

    def arrays(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
    ) -> dict[str, Array]:
        """Read columns as numpy arrays, by name; each has one row a sample along dimension 0.

        Types that numpy cannot name are widened without loss (bfloat16 and float8 to float32, complex32 to
        complex64). Text is numpy ``U``, or an object array of str if some text is wider than 256 characters
        or ends in NUL. ``bytes`` and columns whose rows differ in shape are object arrays; there, None stands
        for a row that lacks the column.

        Raises:
            InvalidInputError: An unknown table or column, or an ``n_epoch`` below -1.
            InvalidTypeError: An argument of another type.
            NotFoundError: The rows were dropped while they were read.
            CorruptDataError: Stored bytes are not what was written.
            StorageError: A column of several dtypes that no numpy type holds without loss; the message names
                them.
        """

        def read() -> dict[str, Array]:
            selection = self._select(table, n_epoch, dataset_type, dedupe)
            schemas = selection.schemas(_check_columns(columns), extents=True)
            return read_arrays(selection, schemas)

        return retry_vanished(read)

    def tensors(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
    ) -> dict[str, torch.Tensor | list[Any]]:
        """Read columns as CPU tensors in the recorded dtype, by name.

        Text and ``bytes`` are lists; a column whose rows differ in shape is a list of tensors (None for a row
        that lacks it). A column of one shape but several dtypes takes numpy's common type.

        Raises:
            As `arrays`.
        """

        def read() -> dict[str, torch.Tensor | list[Any]]:
            selection = self._select(table, n_epoch, dataset_type, dedupe)
            schemas = selection.schemas(_check_columns(columns), extents=False)
            return read_tensors(selection, schemas)

        return retry_vanished(read)

    def iter_batches(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        batch_size: int = 1024,
        dedupe: bool = False,
    ) -> Iterator[dict[str, Array]]:
        """Iterate over dicts of numpy arrays by column, like `arrays`, with ``batch_size`` rows each.

        The last batch may have fewer. The rows are those that were committed when this method was called.
        Memory: one batch, one call and 8 MiB. No storage stays open between two batches.

        Raises:
            InvalidInputError: As `arrays`, or a ``batch_size`` below 1.
            InvalidTypeError: An argument of another type.
            NotFoundError: While iterating: the epoch has been dropped.
            CorruptDataError: While iterating: stored bytes are not what was written.
        """
        rows_a_batch = _check_integer(batch_size, "batch_size", "a positive int")
        if rows_a_batch < 1:
            raise InvalidInputError(f"batch_size must be at least 1, got {batch_size}", "pass a positive int")
        selection = self._select(table, n_epoch, dataset_type, dedupe)
        schemas = selection.schemas(_check_columns(columns), extents=False)
        for schema in schemas:
            schema.check_written()  # here, not in mid-iteration
        return iterate_batches(selection, schemas, rows_a_batch)

    def _select(self, table: str, n_epoch: int | None, dataset_type: str | None, dedupe: bool) -> Selection:
        _check_table(table)
        epoch = check_epoch(n_epoch)
        if dataset_type is not None and not isinstance(dataset_type, str):
            raise InvalidTypeError(
                f"dataset_type must be a str or None, got {type(dataset_type).__name__}",
                "pass the text given to the call",
            )
        return self._source.select(table, epoch, dataset_type, bool(dedupe))


def check_epoch(n_epoch: object) -> int | None:
    """Return the epoch that is asked for: None (all), -1 (rows without one), or one that is >= 0.

    Raises:
        InvalidTypeError: Not an int; a bool is none.
        InvalidInputError: Below -1.
    """
    if n_epoch is None:
        return None
    epoch = _check_integer(n_epoch, "n_epoch", "an int, -1 for the rows without an epoch, or None for all")
    if epoch < layout.NO_EPOCH:
        raise InvalidInputError(
            f"n_epoch must be at least -1, got {epoch}", "pass -1 for the rows without an epoch"
        )
    return epoch


def _check_integer(value: object, name: str, expected: str) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InvalidTypeError(f"{name} must be an int, got {type(value).__name__}", f"pass {expected}")
    return operator.index(value)


def _check_table(table: str) -> str:
    if not isinstance(table, str) or table not in TABLES:
        raise InvalidInputError(f"there is no table {table!r}", f"name one of {', '.join(map(repr, TABLES))}")
    return table


def _check_columns(columns: Sequence[str] | None) -> Sequence[str] | None:
    if columns is None:
        return None
    if isinstance(columns, str):
        raise InvalidTypeError(
            f"columns must be a list of names, got the str {columns!r}", f"pass [{columns!r}]"
        )
    try:
        names = list(columns)
    except TypeError as error:
        raise InvalidTypeError(
            f"columns must be a list of names, got {type(columns).__name__}", "pass a list of str"
        ) from error
    if not all(isinstance(name, str) for name in names):
        raise InvalidTypeError(f"columns must be a list of names, got {names!r}", "pass a list of str")
    return names
