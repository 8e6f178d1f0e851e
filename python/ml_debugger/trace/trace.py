"""The reading face: one class over a store and over an exported ZIP."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_debugger.errors import InvalidInputError
from ml_debugger.extras import require
from ml_debugger.path_argument import check_path
from ml_debugger.store import layout
from ml_debugger.trace.arguments import (
    Ids,
    check_batch_size,
    check_columns,
    check_integer,
    check_rows,
    check_table,
)
from ml_debugger.trace.arguments import check_epoch as check_epoch
from ml_debugger.trace.assemble import iterate_batches, read_arrays, read_tensors
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.segment_ref import retry_vanished
from ml_debugger.trace.source import Selection, Source
from ml_debugger.trace.store_source import StoreSource

if TYPE_CHECKING:
    import pandas
    import pyarrow
    import torch

    from ml_debugger.analysis import Analysis
    from ml_debugger.trace.dataset import TraceDataset


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
    * ``input_ids``: only rows of these samples, text or integers as in the call; None: all.

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

    @property
    def analysis(self) -> Analysis:
        """What the rows say, as DataFrames: accuracy, likely mislabelled samples, drift and more.

        Each access is a new look at what is committed. Needs pandas and scikit-learn:
        ``pip install "ml-debugger[report]"``. See `ml_debugger.analysis.Analysis`.

        Raises:
            InvalidInputError: A package is not installed; the message has the pip command.
        """
        from ml_debugger.analysis import Analysis

        return Analysis(self._source)

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table.

        Raises:
            InvalidInputError: Not one of the two tables.
        """
        return self._source.columns(check_table(table))

    def num_rows(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        *,
        dedupe: bool = False,
        input_ids: Ids | None = None,
    ) -> int:
        """Number of rows; 0 for a table or an epoch that the trace does not have.

        Raises:
            InvalidInputError: Not one of the two tables, or an ``n_epoch`` below -1.
            InvalidTypeError: An ``n_epoch`` that is not an int, or a ``dataset_type`` that is not text.
        """
        return self._select(table, n_epoch, dataset_type, dedupe, input_ids).rows

    def arrays(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
        input_ids: Ids | None = None,
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
            selection = self._select(table, n_epoch, dataset_type, dedupe, input_ids)
            schemas = selection.schemas(check_columns(columns), extents=True)
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
        input_ids: Ids | None = None,
    ) -> dict[str, torch.Tensor | list[Any]]:
        """Read columns as CPU tensors in the recorded dtype, by name.

        Text and ``bytes`` are lists; a column whose rows differ in shape is a list of tensors (None for a row
        that lacks it). A column of one shape but several dtypes takes numpy's common type.

        Raises:
            As `arrays`.
        """

        def read() -> dict[str, torch.Tensor | list[Any]]:
            selection = self._select(table, n_epoch, dataset_type, dedupe, input_ids)
            schemas = selection.schemas(check_columns(columns), extents=False)
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
        input_ids: Ids | None = None,
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
        rows_a_batch = check_batch_size(batch_size)
        selection = self._select(table, n_epoch, dataset_type, dedupe, input_ids)
        schemas = selection.schemas(check_columns(columns), extents=False)
        for schema in schemas:
            schema.check_written()  # here, not in mid-iteration
        return iterate_batches(selection, schemas, rows_a_batch)

    def to_arrow(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
        input_ids: Ids | None = None,
    ) -> pyarrow.Table:
        """Read columns as an Arrow table, in chunks as they are stored; memory: the table and one block.

        A column of tensors is a fixed-size list, nested for more dimensions (a plain list where a dimension
        is 0); text is string, ``bytes`` binary. bfloat16 and float8 are widened to float32, as in `arrays`.
        A column whose rows differ in shape is a flat list ``<name>`` and a list of int64 ``<name>.shapes``. A
        row that lacks a column is null. An element of a complex dtype is a pair (real, imaginary). The
        metadata of a field says what was recorded.

        Needs pyarrow: ``pip install "ml-debugger[arrow]"``. For a trace larger than memory there is
        `to_arrow_reader`.

        Raises:
            InvalidInputError: pyarrow is not installed; or as `arrays`.
            Otherwise as `arrays`.
        """
        from ml_debugger.trace.arrow import pyarrow_module

        pa = pyarrow_module()

        def read() -> pyarrow.Table:
            reader = self._batches(table, n_epoch, dataset_type, columns, dedupe, input_ids, None)
            return pa.Table.from_batches(list(reader), reader.schema)

        return retry_vanished(read)

    def to_arrow_reader(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        batch_size: int = 1024,
        dedupe: bool = False,
        input_ids: Ids | None = None,
    ) -> pyarrow.RecordBatchReader:
        """Stream columns as Arrow record batches of at most ``batch_size`` rows, typed as in `to_arrow`.

        polars, DuckDB and pyarrow consume such a reader without holding all of it. The rows are those that
        were committed when this method was called. Memory: one batch, one call and 8 MiB.

        Raises:
            InvalidInputError: pyarrow is not installed; or as `iter_batches`.
            NotFoundError: While reading: the epoch has been dropped.
            Otherwise as `iter_batches`.
        """
        return self._batches(
            table, n_epoch, dataset_type, columns, dedupe, input_ids, check_batch_size(batch_size)
        )

    def to_parquet(
        self,
        table: str,
        directory: str | os.PathLike[str],
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
        rows_a_file: int = 1 << 20,
    ) -> list[Path]:
        """Write a table as Parquet files that DuckDB, Spark, Ray Data and Dask read in parallel.

        ``<directory>/n_epoch=<n>/part-<k>.parquet`` (-1: rows without an epoch). ``n_epoch`` stands in the
        paths alone, as these engines expect (hive partitioning); otherwise columns and types are those of
        `to_arrow`, the same in all files. Blocks; memory: 8 MiB, or a call that is larger.

        Args:
            table: ``"extracted_feature"`` or ``"ground_truth"``.
            directory: A new directory, or an empty one; it appears when all of it is there.
            columns: The columns to write; None: all.
            dedupe: Only the newest row of each ``(dataset_type, n_epoch, input_id)``.
            rows_a_file: About how many rows a file gets.

        Returns:
            The files, sorted.

        Raises:
            InvalidInputError: The directory is not empty, or pyarrow is not installed; or as `arrays`.
            StorageError: It cannot be written.
            Otherwise as `arrays`.
        """
        from ml_debugger.trace.parquet_files import write_parquet_files

        rows = check_integer(rows_a_file, "rows_a_file", "an int, at least 1")
        if rows < 1:
            raise InvalidInputError(f"rows_a_file must be at least 1, got {rows}", "pass a positive int")
        place = Path(os.path.abspath(check_path(directory, "directory")))

        def write() -> list[Path]:
            schemas = self._select(table, None, None, False, None).schemas(
                check_columns(columns), extents=False
            )
            selections = ((epoch, self._select(table, epoch, None, dedupe, None)) for epoch in self.epochs)
            return write_parquet_files(selections, schemas, place, rows)

        return retry_vanished(write)

    def to_pandas(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
        input_ids: Ids | None = None,
    ) -> pandas.DataFrame:
        """Read columns as a DataFrame with one row a sample.

        Scalars and text have pandas' own types. A column of tensors holds one numpy array a row, ``bytes``
        and columns whose rows differ in shape are objects too; None stands for a row that lacks the column.
        Types that numpy cannot name are widened, as in `arrays`.

        Needs pandas: ``pip install "ml-debugger[pandas]"``. Takes the memory of the result; `iter_batches`
        and `to_arrow_reader` take a bounded one.

        Raises:
            InvalidInputError: pandas is not installed; or as `arrays`.
            Otherwise as `arrays`.
        """
        module = require("pandas", "pandas", "to_pandas")
        arrays = self.arrays(table, n_epoch, dataset_type, columns, dedupe=dedupe, input_ids=input_ids)
        # A list of views: one row of a tensor column is an array of its own.
        frame: pandas.DataFrame = module.DataFrame(
            {name: values if values.ndim == 1 else list(values) for name, values in arrays.items()},
            index=module.RangeIndex(len(next(iter(arrays.values()), ()))),
            columns=list(arrays),
        )
        return frame

    def dataset(
        self,
        table: str,
        n_epoch: int | None = None,
        dataset_type: str | None = None,
        columns: Sequence[str] | None = None,
        *,
        dedupe: bool = False,
        input_ids: Ids | None = None,
    ) -> TraceDataset:
        """A map-style torch Dataset over the rows that are committed now; see `TraceDataset`.

        Reads the headers, and with ``dedupe`` or ``input_ids`` the ids; values are read row by row. With a
        bounded memory, in any order, in DataLoader workers too.

        Raises:
            As `arrays`.
        """
        from ml_debugger.trace.dataset import TraceDataset

        def index() -> TraceDataset:
            selection = self._select(table, n_epoch, dataset_type, dedupe, input_ids)
            schemas = selection.schemas(check_columns(columns), extents=False)
            return TraceDataset(selection.row_index(schemas), schemas)

        return retry_vanished(index)

    def _batches(
        self,
        table: str,
        n_epoch: int | None,
        dataset_type: str | None,
        columns: Sequence[str] | None,
        dedupe: bool,
        input_ids: Ids | None,
        batch_size: int | None,
    ) -> pyarrow.RecordBatchReader:
        from ml_debugger.trace.arrow import arrow_schema, pyarrow_module, read_batches

        pa = pyarrow_module()
        selection = self._select(table, n_epoch, dataset_type, dedupe, input_ids)
        schemas = selection.schemas(check_columns(columns), extents=False)
        target = arrow_schema(schemas)
        return pa.RecordBatchReader.from_batches(target, read_batches(selection, schemas, target, batch_size))

    def _select(
        self, table: str, n_epoch: int | None, dataset_type: str | None, dedupe: bool, input_ids: Ids | None
    ) -> Selection:
        check_table(table)
        return self._source.select(table, check_rows(n_epoch, dataset_type, dedupe, input_ids))
