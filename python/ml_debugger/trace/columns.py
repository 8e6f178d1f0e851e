"""Reading the columns of a block of calls: captures become arrays, texts, or rows of differing shape."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack
import numpy as np

from ml_debugger.errors import CorruptDataError
from ml_debugger.trace.braid import BraidedRun, interleave
from ml_debugger.trace.dtypes import Array, RecordedDtype, recorded_dtype, widen
from ml_debugger.trace.header import INLINE, Call, ColumnDescription, Piece
from ml_debugger.trace.newest import Mask
from ml_debugger.trace.runs import CallRun
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.segment_ref import SegmentLookup, SegmentRef
from ml_debugger.trace.slice_file import SliceFile

_UINT8 = RecordedDtype("uint8", np.dtype("u1"), np.dtype("u1"))
_DAMAGED = "restore the segment from a copy, or drop the epoch"


@dataclass(frozen=True, slots=True)
class RaggedRows:
    """Consecutive rows that need not agree in shape.

    Attributes:
        values: Elements of all rows, one after the other, flat.
        dtype: Their recorded dtype; ``values`` are raw elements, or widened ones where ``is_widened``.
        lengths: int64 (rows,): elements of each row.
        shapes: int64 (rows, ndim): shapes, shorter ones padded in front with -1; all -1 for a row that has no
            value.
        present: Whether these rows have the column at all.
    """

    values: Array
    dtype: RecordedDtype
    lengths: Array
    shapes: Array
    present: bool = True

    def select(self, keep: Mask | None) -> RaggedRows:
        """The rows that ``keep`` marks."""
        if keep is None:
            return self
        elements = np.repeat(keep, self.lengths)
        return RaggedRows(
            self.values[elements], self.dtype, self.lengths[keep], self.shapes[keep], self.present
        )

    def arrays(self) -> list[Array | None]:
        """One array a row, views of ``values``; None for rows without the column."""
        if not self.present:
            return [None] * len(self.lengths)
        ends = np.cumsum(self.lengths).tolist()
        rows: list[Array | None] = []
        for end, length, shape in zip(ends, self.lengths.tolist(), self.shapes.tolist(), strict=True):
            rows.append(self.values[end - length : end].reshape([size for size in shape if size >= 0]))
        return rows


# What a block holds of a column: an array (rows, *row_shape); a list of str or bytes (None: a row without a
# value); or a list of RaggedRows. The schema of the column tells which.
ColumnValues: TypeAlias = "Array | list[Any]"


@dataclass(frozen=True, slots=True)
class KeptCall:
    """A call, or a run of them, and which of its rows are wanted; None: all."""

    call: Call | CallRun
    keep: Mask | None
    rows: int


class PieceReader:
    """Collects which pieces go where, then reads them segment by segment, each one opened once."""

    def __init__(self, segments: SegmentLookup) -> None:
        self._segments = segments
        self._wanted: dict[SegmentRef, list[tuple[Array, list[tuple[int, int, int, int]]]]] = {}
        self._runs: dict[SegmentRef, dict[int, tuple[CallRun, list[tuple[int, Array]]]]] = {}
        self._strands: list[tuple[Array, Array, Array, Array]] = []

    def add(self, call: Call | CallRun, capture: int, out: Array, offset: int = 0) -> None:
        """Ask for a capture at ``offset`` of ``out``, which is uint8, contiguous, and filled by `run`."""
        if isinstance(call, BraidedRun):
            target = out[offset : offset + call.capture_bytes(capture)]
            for run, positions in call.strands if target.size else ():
                strand = np.empty(run.capture_bytes(capture), np.uint8)
                self.add(run, capture, strand)
                self._strands.append((target, call.lengths[:, capture], positions, strand))
            return
        if isinstance(call, CallRun):
            runs = self._runs.setdefault(self._segments.segment(call, call.sequence), {})
            _, targets = runs.setdefault(id(call), (call, []))
            targets.append((capture, out[offset : offset + call.capture_bytes(capture)]))
            return
        for piece in call.pieces(capture):
            if piece.segment == INLINE:
                stop = offset + piece.length_bytes
                out[offset:stop] = np.frombuffer(call.inline, np.uint8, piece.length_bytes, piece.key)
            elif piece.length_bytes:
                self.add_piece(self._segments.segment(call, piece.segment), piece, out, offset)
            offset += piece.length_bytes

    def add_piece(self, ref: SegmentRef, piece: Piece, out: Array, offset: int) -> None:
        """Ask for one piece at ``offset`` of ``out``."""
        reads = self._wanted.setdefault(ref, [])
        if not reads or reads[-1][0] is not out:
            reads.append((out, []))
        reads[-1][1].append((piece.key, offset, piece.length_bytes, piece.crc32c))

    def run(self) -> None:
        """Read everything asked for.

        Raises:
            VanishedError: A segment has been dropped.
            CorruptDataError: Wrong lengths or checksums.
        """
        for ref in dict.fromkeys([*self._wanted, *self._runs]):
            with ref.opened() as segment:
                for out, chunks in self._wanted.get(ref, ()):
                    segment.read(chunks, out.data)
                for run, targets in self._runs.get(ref, {}).values():
                    assert not isinstance(segment, SliceFile), "runs are found in segments only"
                    segment.gather(
                        run.keys.data, [(capture, out.data) for capture, out in targets if out.size]
                    )
        for strand in self._strands:
            interleave(*strand)
        self._wanted.clear()
        self._runs.clear()
        self._strands.clear()


def column_bytes(call: Call | CallRun, schema: ColumnSchema) -> int:
    """Bytes that reading a column of a call takes, about."""
    column = call.description.column(schema.table, schema.name)
    return call.capture_bytes(column.capture) if column is not None else 8 * call.rows


def as_bytes(values: Array) -> Array:
    """A contiguous array as flat uint8, sharing memory."""
    return values.reshape(-1).view(np.uint8)


def read_columns(
    segments: SegmentLookup,
    calls: list[KeptCall],
    schemas: list[ColumnSchema],
    *,
    raw: bool,
    out: dict[str, Array] | None = None,
) -> dict[str, ColumnValues]:
    """Read some columns of consecutive calls in one step.

    Args:
        segments: Where the pieces of the calls lie; a `Snapshot`.
        calls: The calls, with the rows that are wanted.
        schemas: The columns.
        raw: Give elements as they were stored where a column has one dtype, instead of widened.
        out: Arrays by column name that take the rows of dense columns; made where there is none.

    Raises:
        VanishedError: An epoch has been dropped.
        CorruptDataError: Stored bytes are not what was written.
        StorageError: A column of several dtypes has no common one.
    """
    reader = PieceReader(segments)
    finishes: dict[str, Callable[[], ColumnValues]] = {}
    for schema in schemas:
        if schema.name in _DERIVED:
            finishes[schema.name] = _derived(schema.name, calls, (out or {}).get(schema.name))
        elif schema.is_list:
            finishes[schema.name] = _lists(reader, calls, schema)
        elif schema.is_dense:
            finishes[schema.name] = _dense(reader, calls, schema, raw, (out or {}).get(schema.name))
        else:
            finishes[schema.name] = _ragged(reader, calls, schema, raw)
    reader.run()
    return {name: finish() for name, finish in finishes.items()}


def _derived(name: str, calls: list[KeptCall], out: Array | None) -> Callable[[], ColumnValues]:
    def finish() -> ColumnValues:
        if name == "dataset_type":
            return list(
                itertools.chain.from_iterable(
                    [kept.call.description.dataset_type] * kept.rows for kept in calls
                )
            )
        values = np.empty(sum(kept.rows for kept in calls), np.int64) if out is None else out
        row = 0
        for kept in calls:
            target = values[row : row + kept.rows]
            if name == "n_epoch":
                target[:] = kept.call.epoch
            else:
                numbers = kept.call.row_ids
                target[:] = numbers if kept.keep is None else numbers[kept.keep]
            row += kept.rows
        return values

    return finish


_DERIVED = ("row_id", "n_epoch", "dataset_type")


def dense_dtype(schema: ColumnSchema, raw: bool) -> np.dtype[Any]:
    """Dtype of the array of a dense column."""
    if raw and len(schema.dtypes) == 1:
        return recorded_dtype(schema.dtypes[0]).raw
    return schema.written


def _dense(
    reader: PieceReader, calls: list[KeptCall], schema: ColumnSchema, raw: bool, out: Array | None
) -> Callable[[], ColumnValues]:
    dtype = dense_dtype(schema, raw)
    values = np.empty((sum(kept.rows for kept in calls), *schema.row_shape), dtype) if out is None else out
    flat = as_bytes(values)
    row_bytes = math.prod(schema.row_shape) * dtype.itemsize
    later: list[tuple[Array, KeptCall, ColumnDescription, Array]] = []
    row = 0
    for kept in calls:
        column = _described(kept.call, schema)
        recorded = recorded_dtype(column.dtype)
        target = values[row : row + kept.rows]
        row += kept.rows
        stays = recorded.raw == dtype and (raw or recorded.is_native)
        if stays and kept.keep is None and not column.broadcast:
            reader.add(kept.call, column.capture, flat, (row - kept.rows) * row_bytes)
            continue
        stored = np.empty((_stored_samples(kept.call, column), *schema.row_shape), recorded.raw)
        reader.add(kept.call, column.capture, as_bytes(stored))
        later.append((target, kept, column, stored))

    def finish() -> ColumnValues:
        for target, kept, column, stored in later:
            recorded = recorded_dtype(column.dtype)
            if column.broadcast:
                stored = np.repeat(stored, _repeats(kept.call), axis=0)
            kept_rows = stored if kept.keep is None else stored[kept.keep]
            # Raw elements of one dtype travel as they are; everything else becomes numbers of the common
            # type.
            target[...] = kept_rows if stored.dtype == dtype and raw else widen(kept_rows, recorded)
        return values

    return finish


def _lists(reader: PieceReader, calls: list[KeptCall], schema: ColumnSchema) -> Callable[[], ColumnValues]:
    parts: list[tuple[KeptCall, ColumnDescription | None, Array]] = []
    for kept in calls:
        column = kept.call.description.column(schema.table, schema.name)
        buffer = np.empty(0 if column is None else kept.call.capture_bytes(column.capture), np.uint8)
        if column is not None:
            reader.add(kept.call, column.capture, buffer)
        parts.append((kept, column, buffer))

    def finish() -> ColumnValues:
        values: list[Any] = []
        for kept, column, buffer in parts:
            if column is None:
                values.extend([None] * kept.rows)
                continue
            found = _unpack_list(kept.call, column, buffer)
            values.extend(found if kept.keep is None else itertools.compress(found, kept.keep.tolist()))
        return values

    return finish


def _stored_samples(call: Call | CallRun, column: ColumnDescription) -> int:
    """How many samples a capture holds: one a row, or one a call."""
    return len(_repeats(call)) if column.broadcast else call.rows


def _repeats(call: Call | CallRun) -> Array:
    """Rows of each call."""
    return call.counts if isinstance(call, CallRun) else np.array([call.rows])


def _unpack_list(call: Call | CallRun, column: ColumnDescription, buffer: Array) -> list[Any]:
    if column.dtype:
        texts = list(map(str, buffer.view(recorded_dtype(column.dtype).raw).tolist()))
        return np.repeat(np.array(texts, object), _repeats(call)).tolist() if column.broadcast else texts
    expected = str if column.type == "str" else bytes
    unpacker = msgpack.Unpacker(max_buffer_size=max(buffer.size, 1))
    unpacker.feed(buffer.data)
    try:
        arrays = list(unpacker)  # one a call
        if unpacker.tell() != buffer.size:
            raise ValueError("an array is cut off")
    except (ValueError, msgpack.UnpackException) as error:
        raise _damaged(call, column, str(error)) from error
    counts = _repeats(call).tolist()
    samples = [1] * len(counts) if column.broadcast else counts
    if not set(map(type, arrays)) <= {list} or list(map(len, arrays)) != samples:
        raise _damaged(call, column, f"expected {sum(samples)} values in {len(counts)} arrays")
    if column.broadcast:
        arrays = [array * rows for array, rows in zip(arrays, counts, strict=True)]
    values = list(itertools.chain.from_iterable(arrays))
    if not set(map(type, values)) <= {expected}:
        raise _damaged(call, column, f"expected values of type {expected.__name__}")
    return values


def _ragged(
    reader: PieceReader, calls: list[KeptCall], schema: ColumnSchema, raw: bool
) -> Callable[[], ColumnValues]:
    # Rows that go to torch keep their own dtypes; rows that go to numpy take the common one.
    common = None if raw else schema.written
    parts: list[tuple[KeptCall, ColumnDescription | None, Array, Array]] = []
    for kept in calls:
        column = kept.call.description.column(schema.table, schema.name)
        stored, shapes = np.empty(0, np.uint8), np.empty(0, np.uint8)
        if column is not None:
            stored = np.empty(kept.call.capture_bytes(column.capture), np.uint8)
            reader.add(kept.call, column.capture, stored)
            if column.shapes_capture is not None:
                shapes = np.empty(kept.call.capture_bytes(column.shapes_capture), np.uint8)
                reader.add(kept.call, column.shapes_capture, shapes)
        parts.append((kept, column, stored, shapes))

    def finish() -> ColumnValues:
        runs: list[RaggedRows] = []
        for kept, column, stored, shapes in parts:
            if column is None:
                runs.append(_missing_rows(kept.rows))
                continue
            rows = _ragged_rows(kept.call, column, stored, shapes).select(kept.keep)
            if common is not None:
                values = widen(rows.values, rows.dtype).astype(common, copy=False)
                rows = RaggedRows(values, rows.dtype, rows.lengths, rows.shapes)
            runs.append(rows)
        return runs

    return finish


def _missing_rows(rows: int) -> RaggedRows:
    return RaggedRows(
        np.empty(0, np.uint8), _UINT8, np.zeros(rows, np.int64), np.empty((rows, 0), np.int64), present=False
    )


def _ragged_rows(call: Call | CallRun, column: ColumnDescription, stored: Array, shapes: Array) -> RaggedRows:
    dtype = recorded_dtype(column.dtype)
    if stored.size % dtype.raw.itemsize:
        raise _damaged(call, column, f"{stored.size} bytes are no whole number of {dtype.name}")
    values = stored.view(dtype.raw)
    rows_shapes = ragged_shapes(call, column, shapes)
    lengths = _lengths(call, column, rows_shapes)
    if column.broadcast:
        repeats = _repeats(call)
        values = np.repeat(values.reshape(len(repeats), -1), repeats, axis=0).reshape(-1)
        lengths, rows_shapes = np.repeat(lengths, repeats), np.repeat(rows_shapes, repeats, axis=0)
    if lengths.sum() != values.size:
        raise _damaged(call, column, f"its shapes name {lengths.sum()} elements, there are {values.size}")
    return RaggedRows(values, dtype, lengths, rows_shapes)


def ragged_shapes(call: Call | CallRun, column: ColumnDescription, shapes: Array) -> Array:
    """Shapes of the stored samples, int64 (samples, ndim), from the bytes of the shapes capture if any."""
    samples = _stored_samples(call, column)
    if column.row_shape is not None:
        return np.tile(np.array(column.row_shape, np.int64), (samples, 1)).reshape(
            samples, len(column.row_shape)
        )
    return shapes.view("<i8").reshape(samples, -1) if samples else np.empty((0, 0), np.int64)


def _lengths(call: Call | CallRun, column: ColumnDescription, shapes: Array) -> Array:
    padding = shapes == -1
    if (shapes < -1).any() or (padding[:, 1:] & ~padding[:, :-1]).any():
        raise _damaged(call, column, "its shapes are no shapes")
    sizes = np.where(padding, 1, shapes)
    if np.prod(sizes, axis=1, dtype=np.float64).max(initial=0) > 2**48:
        raise _damaged(call, column, "its shapes name more elements than any call holds")
    lengths: Array = np.prod(sizes, axis=1, dtype=np.int64)
    return lengths


def _described(call: Call | CallRun, schema: ColumnSchema) -> ColumnDescription:
    column = call.description.column(schema.table, schema.name)
    assert column is not None, "a dense column is in every call"
    return column


def _damaged(call: Call | CallRun, column: ColumnDescription, problem: str) -> CorruptDataError:
    where = f"rank {call.rank}"
    if isinstance(call, BraidedRun):
        where = "ranks " + ", ".join(str(run.rank) for run, _ in call.strands)
    return CorruptDataError(
        f"column {column.name!r} of call {call.call} ({where}, attempt {call.attempt}) is damaged: "
        + problem,
        _DAMAGED,
    )
