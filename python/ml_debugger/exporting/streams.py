"""Columns as streams of bytes, in bounded memory: what goes into the npy members of an export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ml_debugger.trace.catalog import Snapshot
from ml_debugger.trace.columns import KeptCall, PieceReader, read_columns
from ml_debugger.trace.dtypes import Array, RecordedDtype, recorded_dtype, widen
from ml_debugger.trace.header import INLINE, Call, Piece
from ml_debugger.trace.runs import CallRun
from ml_debugger.trace.schema import ColumnSchema
from ml_debugger.trace.segment_ref import SegmentRef
from ml_debugger.trace.store_source import BLOCK_BYTES, Choice


@dataclass
class _PieceBlock:
    """Pieces of one dtype that fill a buffer one after the other."""

    dtype: RecordedDtype
    pieces: list[tuple[Call, Piece]] = field(default_factory=list)
    length_bytes: int = 0

    def read(self, snapshot: Snapshot, buffer: Array, written: np.dtype[Any]) -> Array:
        """The elements as numpy values; a view of ``buffer`` where nothing has to be converted."""
        out = (
            buffer[: self.length_bytes]
            if self.length_bytes <= buffer.size
            else np.empty(self.length_bytes, np.uint8)
        )
        reader = PieceReader(snapshot)
        offset = 0
        for call, piece in self.pieces:
            if piece.segment == INLINE:
                inline = np.frombuffer(call.inline, np.uint8, piece.length_bytes, piece.key)
                out[offset : offset + piece.length_bytes] = inline
            elif piece.length_bytes:
                ref: SegmentRef = snapshot.segment(call, piece.segment)
                reader.add_piece(ref, piece, out, offset)
            offset += piece.length_bytes
        reader.run()
        return widen(out.view(self.dtype.raw), self.dtype).astype(written, copy=False)


def dense_stream(choice: Choice, schema: ColumnSchema) -> Iterator[Array]:
    """The rows of a recorded dense column, as flat arrays of its written dtype.

    Works piece by piece, so that a huge call takes no more memory than a small one. An array is valid until
    the second next one is asked for.
    """
    buffers = [np.empty(BLOCK_BYTES, np.uint8), np.empty(BLOCK_BYTES, np.uint8)]
    written = schema.written
    block: _PieceBlock | None = None

    def read(full: _PieceBlock) -> Array:
        buffers.reverse()
        return full.read(choice.snapshot, buffers[0], written)

    for kept in choice.kept_calls(schema.table):
        pieces = _whole_pieces(kept, schema)
        if pieces is None:
            if block is not None:
                yield read(block)
                block = None
            values = read_columns(choice.snapshot, [kept], [schema], raw=False)[schema.name]
            assert isinstance(values, np.ndarray)
            yield values.reshape(-1)
            continue
        dtype, found = pieces
        assert isinstance(kept.call, Call)
        for piece in found:
            full = block is not None and (
                block.length_bytes + piece.length_bytes > BLOCK_BYTES or block.dtype != dtype
            )
            if block is not None and full:
                yield read(block)
                block = None
            block = block or _PieceBlock(dtype)
            block.pieces.append((kept.call, piece))
            block.length_bytes += piece.length_bytes
    if block is not None:
        yield read(block)


def _whole_pieces(kept: KeptCall, schema: ColumnSchema) -> tuple[RecordedDtype, list[Piece]] | None:
    """Pieces that hold all rows, element by element; None where rows have to be picked or repeated."""
    column = kept.call.description.column(schema.table, schema.name)
    if column is None or column.broadcast or kept.keep is not None or isinstance(kept.call, CallRun):
        return None
    dtype = recorded_dtype(column.dtype)
    pieces = kept.call.pieces(column.capture)
    if any(piece.length_bytes % dtype.raw.itemsize for piece in pieces):
        return None
    return dtype, pieces
