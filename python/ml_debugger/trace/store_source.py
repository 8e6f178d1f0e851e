"""A trace in a store: selections over its committed calls."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ml_debugger.store import layout
from ml_debugger.trace.arguments import RowFilter
from ml_debugger.trace.braid import BraidedRun
from ml_debugger.trace.catalog import Snapshot, list_epochs
from ml_debugger.trace.columns import KeptCall, column_bytes, read_columns
from ml_debugger.trace.dtypes import FIELD_DTYPES
from ml_debugger.trace.header import FEATURES, GROUND_TRUTH, Call
from ml_debugger.trace.newest import Mask, NewestRows
from ml_debugger.trace.runs import CallRun
from ml_debugger.trace.schema import ColumnSchema, SchemaCollector, TextExtent, base_schema
from ml_debugger.trace.segment_ref import retry_vanished
from ml_debugger.trace.source import RowBlock, Targets, pick_schemas
from ml_debugger.trace.store_rows import StoreRows

BLOCK_BYTES = 8 << 20
_MAX_CALLS_A_BLOCK = 512


class Choice:
    """The rows of both tables that a reader asked for: a snapshot, and which rows of it are kept."""

    def __init__(
        self,
        trace_dir: Path,
        n_epoch: int | None,
        dataset_type: str | None,
        dedupe: bool,
        input_ids: frozenset[str] | None = None,
    ) -> None:
        """Read every header once, and every ``input_id`` if ``dedupe`` or ``input_ids`` ask for it.

        Raises:
            VanishedError: An epoch was dropped meanwhile; use `retry_vanished`.
        """
        self._collector = SchemaCollector()
        self._trace_dir = trace_dir
        self._rows_by_epoch: Counter[int] = Counter()

        def accept(call: Call | CallRun) -> bool:
            if dataset_type is not None and call.description.dataset_type != dataset_type:
                return False
            self._rows_by_epoch[call.epoch] += call.rows
            self._collector.add(call, call.rows)
            return True

        self.snapshot = Snapshot(trace_dir, n_epoch, accept)
        self._keep: Mask | None = None
        if dedupe:
            self._keep = self._newest()
        if input_ids is not None:
            having = self._having(input_ids)
            self._keep = having if self._keep is None else self._keep & having
        if self._keep is not None and not self._keep.all():
            self._collect_kept()

    @property
    def recorded_rows(self) -> int:
        """Rows of ``extracted_feature`` before those that others repeat are left out."""
        return self._rows_by_epoch.total()

    @property
    def kept_rows(self) -> int:
        """Rows of ``extracted_feature`` that are kept."""
        return self._collector.rows(FEATURES)

    def rows(self, table: str) -> int:
        """Rows of a table that are kept."""
        return self._collector.rows(table)

    def kept_calls(self, table: str, *, in_runs: bool = True) -> Iterator[KeptCall]:
        """Calls that have kept rows in a table, in row order; ``in_runs``: those that are alike together."""
        first = 0
        for call in self.snapshot.runs() if in_runs else self.snapshot.calls():
            keep = None if self._keep is None else self._keep[first : first + call.rows]
            first += call.rows
            if table == GROUND_TRUTH and not call.ground_truth_rows:
                continue
            rows = call.rows if keep is None else int(np.count_nonzero(keep))
            if rows:
                yield KeptCall(call, None if rows == call.rows else keep, rows)

    def known_columns(self, table: str) -> dict[str, ColumnSchema]:
        """Schemas by name; a column that the trace has, but not these rows, has one too."""
        schemas = self._collector.columns(table)
        if not self._collector.rows(table):
            for name, schema in trace_schemas(self._trace_dir, table).items():
                schemas.setdefault(name, schema)
        return schemas

    def _calls_with_ids(self) -> Iterator[tuple[Call | CallRun, list[str]]]:
        """Every call or run of the snapshot in row order, with the ids of all its rows."""
        schema = base_schema("input_id", FEATURES, 0)
        whole = (KeptCall(call, None, call.rows) for call in self.snapshot.runs())
        for block in call_blocks(whole, [schema]):
            ids = list(read_columns(self.snapshot, block, [schema], raw=True)["input_id"])
            position = 0
            for kept in block:
                yield kept.call, ids[position : position + kept.rows]
                position += kept.rows

    def _newest(self) -> Mask:
        keep = np.ones(self.recorded_rows, np.bool_)
        first = start = 0
        epoch = layout.NO_EPOCH
        newest = NewestRows(0)
        for call, ids in self._calls_with_ids():
            if call.epoch != epoch:
                _fill_mask(keep, start, newest)
                start, epoch = first, call.epoch
                newest = NewestRows(0 if epoch == layout.NO_EPOCH else self._rows_by_epoch[epoch])
            if epoch != layout.NO_EPOCH:
                newest.add(call.description.dataset_type, ids)
            first += call.rows
        _fill_mask(keep, start, newest)
        return keep

    def _having(self, input_ids: frozenset[str]) -> Mask:
        keep = np.zeros(self.recorded_rows, np.bool_)
        first = 0
        for call, ids in self._calls_with_ids():
            keep[first : first + call.rows] = np.fromiter(
                map(input_ids.__contains__, ids), np.bool_, call.rows
            )
            first += call.rows
        return keep

    def _collect_kept(self) -> None:
        collector = SchemaCollector()
        for kept in self.kept_calls(FEATURES):
            collector.add(kept.call, kept.rows)
        self._collector = collector


def _fill_mask(keep: Mask, start: int, newest: NewestRows) -> None:
    mask = newest.mask()
    keep[start : start + mask.size] = mask


def call_blocks(
    calls: Iterable[KeptCall], schemas: Sequence[ColumnSchema], max_rows: int | None = None
) -> Iterator[list[KeptCall]]:
    """Group calls so that these columns of a group take about `BLOCK_BYTES`; at least one call."""
    block: list[KeptCall] = []
    size = rows = 0
    for kept in calls:
        block.append(kept)
        size += sum(column_bytes(kept.call, schema) for schema in schemas)
        rows += kept.rows
        if (
            size >= BLOCK_BYTES
            or len(block) >= _MAX_CALLS_A_BLOCK
            or (max_rows is not None and rows >= max_rows)
        ):
            yield block
            block, size, rows = [], 0, 0
    if block:
        yield block


class StoreSelection:
    """Rows of one table of a store; see `ml_debugger.trace.source.Selection`."""

    def __init__(self, choice: Choice, table: str) -> None:
        self._choice = choice
        self._table = table

    @property
    def rows(self) -> int:
        """How many rows."""
        return self._choice.rows(self._table)

    def schemas(self, columns: Sequence[str] | None, *, extents: bool) -> list[ColumnSchema]:
        """Schemas of some columns; see `Selection.schemas`."""
        schemas = pick_schemas(self._choice.known_columns(self._table), columns, self._table)
        if extents and self.rows:
            self._measure([schema for schema in schemas if schema.is_text])
        return schemas

    def blocks(
        self,
        schemas: Sequence[ColumnSchema],
        *,
        raw: bool,
        out: Targets | None = None,
        max_rows: int | None = None,
    ) -> Iterator[RowBlock]:
        """Read all rows, block by block; see `Selection.blocks`."""
        snapshot = self._choice.snapshot
        for block in call_blocks(self._choice.kept_calls(self._table), schemas, max_rows):
            rows = sum(kept.rows for kept in block)
            targets = None if out is None else out(rows)
            yield RowBlock(
                rows,
                read_columns(snapshot, block, list(schemas), raw=raw, out=targets),
                _existence(snapshot, block),
            )

    def row_index(self, schemas: Sequence[ColumnSchema]) -> StoreRows:
        """The same rows by number; see `Selection.row_index`."""
        return StoreRows(self._choice.snapshot, self._choice.kept_calls(self._table, in_runs=False), schemas)

    def _measure(self, schemas: list[ColumnSchema]) -> None:
        """Find out how wide the texts of some columns are."""
        for schema in schemas:
            schema.extent = TextExtent()
        read = [schema for schema in schemas if schema.name != "dataset_type"]
        if len(read) < len(schemas):
            extent = next(schema.extent for schema in schemas if schema.name == "dataset_type")
            for kept in self._choice.kept_calls(self._table):
                extent.add([kept.call.description.dataset_type])
        for block in self.blocks(read, raw=True) if read else ():
            for schema in read:
                schema.extent.add([value for value in block.values[schema.name] if value is not None])


def _existence(snapshot: Snapshot, block: list[KeptCall]) -> Callable[[], None]:
    one_a_segment = {
        (call.rank, call.epoch, call.attempt, call.sequence): call
        for kept in block
        for call in (
            [run for run, _ in kept.call.strands] if isinstance(kept.call, BraidedRun) else [kept.call]
        )
    }

    def check() -> None:
        for call in one_a_segment.values():
            snapshot.check_exists(call)

    return check


def trace_schemas(trace_dir: Path, table: str) -> dict[str, ColumnSchema]:
    """What a table consists of, by its calls or, where it has none, by `version.json`; without rows."""
    collector = SchemaCollector()

    def accept(call: Call | CallRun) -> bool:
        collector.add(call, call.rows)
        return False

    retry_vanished(lambda: Snapshot(trace_dir, None, accept))
    schemas = collector.columns(table)
    for schema in schemas.values():
        schema.rows, schema.missing = 0, False
    if not collector.rows(table):
        for declared in _declared(layout.read_version(trace_dir), table):
            schemas.setdefault(declared.name, declared)
    return schemas


def _declared(info: layout.VersionInfo, table: str) -> list[ColumnSchema]:
    if table == FEATURES:
        names, fields = [*info.aliases, "logits"], info.additional_fields
    else:
        names, fields = ["label"], info.additional_label_fields
    schemas = [ColumnSchema(name, table) for name in names]
    for specification in fields:
        schema = ColumnSchema(str(specification["name"]), table)
        kind = str(specification["type"])
        if kind != "tensor":
            schema.recorded = [kind]
        if kind in FIELD_DTYPES:
            schema.dtypes, schema.row_shapes = [FIELD_DTYPES[kind]], [()]
        schemas.append(schema)
    return schemas


class StoreSource:
    """A trace on disk; see `ml_debugger.trace.source.Source`."""

    def __init__(self, trace_dir: Path) -> None:
        """Read `version.json` only.

        Raises:
            NotFoundError: No trace there.
        """
        self._trace_dir = trace_dir
        info = layout.read_version(trace_dir)
        self.model_name = info.model_name
        self.version_name = info.version_name
        self.fingerprint = info.fingerprint

    def epochs(self) -> list[int]:
        """Epochs that hold rows, -1 for the rows without one."""
        return list_epochs(self._trace_dir)

    def attempts(self) -> list[int]:
        """Numbers of the attempts of all ranks."""
        ranks = layout.rank_directories(self._trace_dir)
        return sorted(set(itertools.chain.from_iterable(layout.attempts(rank_dir) for _, rank_dir in ranks)))

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table."""
        return list(trace_schemas(self._trace_dir, table))

    def select(self, table: str, wanted: RowFilter) -> StoreSelection:
        """Rows of a table, as committed now."""
        return StoreSelection(self._choose(wanted), table)

    def select_tables(self, wanted: RowFilter) -> tuple[StoreSelection, StoreSelection]:
        """Rows of both tables, as committed now; see `Source.select_tables`."""
        choice = self._choose(wanted)
        return StoreSelection(choice, FEATURES), StoreSelection(choice, GROUND_TRUTH)

    def health(self) -> dict[str, Any]:
        """What is known of the recording itself; see `Source.health`."""
        from ml_debugger.analysis.capture import store_health

        return retry_vanished(lambda: store_health(self._trace_dir))

    def _choose(self, wanted: RowFilter) -> Choice:
        return retry_vanished(
            lambda: Choice(
                self._trace_dir, wanted.n_epoch, wanted.dataset_type, wanted.dedupe, wanted.input_ids
            )
        )
