"""Rows of a trace with their labels beside them, batch by batch: what every pass goes through."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.trace.arguments import RowFilter
from ml_debugger.trace.assemble import iterate_batches
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.schema import ColumnSchema

if TYPE_CHECKING:
    from ml_debugger.trace.source import Selection, Source

LABEL = "label"
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 8192
_RAGGED_BATCH_ROWS = 256
_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Consecutive rows of one epoch.

    Attributes:
        input_ids: One text a row.
        dataset_types: One text a row.
        columns: The other columns that were asked for, by name; (rows, ...) or objects.
        truths: Columns of ``ground_truth`` by name; what stands in rows without a label means nothing.
        labelled: Which rows have a row in ``ground_truth``.
    """

    input_ids: list[str]
    dataset_types: list[str]
    columns: dict[str, Array]
    truths: dict[str, Array]
    labelled: Mask

    def groups(self) -> list[tuple[str, Array]]:
        """Positions of the rows of each ``dataset_type``."""
        return positions(self.dataset_types)


class LabelledRows:
    """Reads a trace epoch by epoch; of rows that repeat a sample of an epoch only the newest."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def batches(
        self, n_epoch: int, columns: Sequence[str], truths: Sequence[str] = (LABEL,)
    ) -> Iterator[LabelledBatch]:
        """Rows of an epoch (-1: those without one) in row order. Memory: two batches, two calls and 16 MiB.

        Columns that the epoch's rows do not have are left out.

        Raises:
            VanishedError: The epoch was dropped.
        """
        # Both tables by one look: rows that are committed meanwhile are in neither.
        features, labels = self._source.select_tables(RowFilter(n_epoch, dedupe=True))
        if not features.rows:
            return
        wanted = ["row_id", "input_id", "dataset_type", *_known(features, columns)]
        schemas = features.schemas(wanted, extents=False)
        batch_rows = _batch_rows(schemas)
        known = _known(labels, truths) if labels.rows else []
        pending = _Pending(labels, known, batch_rows)
        for batch in iterate_batches(features, schemas, batch_rows):
            labelled, found = pending.take(batch.pop("row_id"))
            yield LabelledBatch(
                batch.pop("input_id").tolist(), batch.pop("dataset_type").tolist(), batch, found, labelled
            )


def _known(selection: Selection, columns: Sequence[str]) -> list[str]:
    """Of some columns those that rows of the selection have."""
    known = {schema.name for schema in selection.schemas(None, extents=False) if schema.recorded}
    return [name for name in columns if name in known]


def _batch_rows(schemas: Sequence[ColumnSchema]) -> int:
    if any(schema.row_shapes == [None] or len(schema.row_shapes) > 1 for schema in schemas):
        return _RAGGED_BATCH_ROWS
    row_bytes = sum(8 * math.prod(schema.row_shape) for schema in schemas)
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)))


class _Pending:
    """Rows of ``ground_truth`` that were read and not taken yet: they come in the order of their features."""

    def __init__(self, selection: Selection, columns: Sequence[str], batch_rows: int) -> None:
        self._columns = list(columns)
        self._batches: Iterator[dict[str, Array]] = iter(())
        if self._columns:
            schemas = selection.schemas(["row_id", *self._columns], extents=False)
            self._batches = iterate_batches(selection, schemas, batch_rows)
        self._ids: Array = np.empty(0, np.int64)
        self._values: dict[str, Array] = {}
        self._fetch()

    def take(self, row_ids: Array) -> tuple[Mask, dict[str, Array]]:
        """Which of some rows have a label, and the values in their places."""
        order = np.argsort(row_ids, kind="stable")
        labelled = np.zeros(len(row_ids), np.bool_)
        found: dict[str, Array] = {}
        while self._ids.size:
            places = np.searchsorted(row_ids, self._ids, sorter=order)
            places = order[np.minimum(places, len(order) - 1)]
            matched = row_ids[places] == self._ids
            count = int(matched.size if matched.all() else matched.argmin())  # they come first
            targets = places[:count]
            labelled[targets] = True
            for name, values in self._values.items():
                if name not in found:
                    found[name] = np.zeros((len(row_ids), *values.shape[1:]), values.dtype)
                elif found[name].dtype != values.dtype:  # text of another width
                    found[name] = found[name].astype(np.result_type(found[name], values))
                found[name][targets] = values[:count]
            self._ids = self._ids[count:]
            self._values = {name: values[count:] for name, values in self._values.items()}
            if self._ids.size:
                break
            self._fetch()
        return labelled, found

    def _fetch(self) -> None:
        batch = next(self._batches, None)
        if batch is not None:
            self._ids = batch.pop("row_id")
            self._values = batch


def positions(names: Sequence[str]) -> list[tuple[str, Array]]:
    """Where each name stands, rising; in the order of their first."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        found.setdefault(name, []).append(place)
    return [(name, np.array(places, np.int64)) for name, places in found.items()]


def kept_by_hash(input_ids: Sequence[str], share: float) -> Mask:
    """Which ids belong to a share of all of them, chosen by a hash: the same ones in every epoch and run."""
    if share >= 1:
        return np.ones(len(input_ids), np.bool_)
    threshold = int(share * (1 << (8 * _HASH_BYTES)))

    def number(input_id: str) -> int:
        # Another hash than that of ``sample_fraction``, whose share would be all that is there.
        digest = hashlib.blake2b(input_id.encode("utf-8"), digest_size=_HASH_BYTES, person=b"analysis")
        return int.from_bytes(digest.digest(), "big")

    return np.fromiter((number(input_id) < threshold for input_id in input_ids), np.bool_, len(input_ids))


def layer_names(source: Source) -> list[str]:
    """Columns that hold features: tensors of numbers other than the logits, fields of tensors among them."""
    selection, _ = source.select_tables(RowFilter())
    names = []
    for schema in selection.schemas(None, extents=False):
        if schema.name == "logits" or schema.is_list or not schema.dtypes:
            continue
        if any(shape is None or len(shape) > 0 for shape in schema.row_shapes):
            names.append(schema.name)
    return names


def is_numeric(values: Array) -> bool:
    """Whether an array is one of real numbers."""
    return values.dtype != object and values.dtype.kind in "biuf"


def describe_shape(values: Array) -> str:
    """Shape of one row, for a sentence."""
    shape: tuple[Any, ...] = values.shape[1:]
    return f"({', '.join(map(str, shape))})" if shape else "()"
