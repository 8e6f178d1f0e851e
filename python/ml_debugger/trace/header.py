"""Decoding of call headers (`docs/record_format.md`), which may come from an untrusted store.

Every number that is later used as a size, an offset or a key is checked here, so that the rest of the package
can rely on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np

from ml_debugger.errors import CorruptDataError
from ml_debugger.trace.dtypes import FIELD_DTYPES, Array, recorded_dtype

TABLES = ("extracted_feature", "ground_truth")
FEATURES, GROUND_TRUTH = TABLES
INLINE = -1

_MAX_INT64 = (1 << 63) - 1
_MAX_NDIM = 31
_MAX_ELEMENTS = 1 << 48
_MAX_CACHED_DESCRIPTIONS = 256
_MAX_CACHED_BYTES = 1 << 16
_COLUMN_TYPES = ("tensor", "int", "float", "bool", "str", "bytes")


class Piece(NamedTuple):
    """Where bytes of a capture lie: under ``key`` of a segment's chunks, or (-1) inline at ``key``."""

    segment: int
    key: int
    length_bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class ColumnDescription:
    """One column of one call.

    Attributes:
        table: ``extracted_feature`` or ``ground_truth``.
        name: Name of the column.
        type: ``tensor``, ``int``, ``float``, ``bool``, ``str`` or ``bytes``.
        dtype: Torch name; empty for ``bytes`` and ``str``, except text that is stored as integers.
        row_shape: Shape of one sample; None where there is no dtype, and where samples differ.
        capture: Number of the capture that holds the values.
        shapes_capture: Number of the capture that holds the samples' shapes, where they differ.
        broadcast: Whether the one stored sample stands for all of the call.
    """

    table: str
    name: str
    type: str
    dtype: str
    row_shape: tuple[int, ...] | None
    capture: int
    shapes_capture: int | None
    broadcast: bool

    @property
    def recorded(self) -> str:
        """Name of the type in a manifest: a torch dtype, or the type of a field."""
        return self.dtype if self.type == "tensor" else self.type

    @property
    def is_list(self) -> bool:
        """Whether rows are text or bytes."""
        return self.type in ("str", "bytes")


@dataclass(frozen=True, slots=True)
class CallDescription:
    """What the calls of one kind have in common; shared by all calls whose header says the same."""

    dataset_type: str
    columns: tuple[ColumnDescription, ...]
    samples: int
    has_shapes: bool

    def column(self, table: str, name: str) -> ColumnDescription | None:
        """The description of a column, or None where these calls lack it."""
        if name == "input_id":
            table = FEATURES
        for column in self.columns:
            if column.name == name and column.table == table:
                return column
        return None


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded call; ``chunks`` are lists of (capture, segment, key, bytes, crc32c)."""

    rank: int
    attempt: int
    call: int
    epoch: int
    rows: int
    ground_truth_rows: int
    first_row: int
    sequence: int
    chunks: list[list[int]]
    inline: bytes
    description: CallDescription

    @property
    def chunk_bytes(self) -> int:
        """Bytes that lie outside of the header."""
        return sum(chunk[3] for chunk in self.chunks if chunk[1] != INLINE)

    @property
    def row_ids(self) -> Array:
        """``row_id`` of every row."""
        return np.arange(self.first_row, self.first_row + self.rows)

    def pieces(self, capture: int) -> list[Piece]:
        """The pieces of a capture, in order."""
        return [Piece(*chunk[1:]) for chunk in self.chunks if chunk[0] == capture]

    def capture_bytes(self, capture: int) -> int:
        """Length of a capture."""
        return sum(chunk[3] for chunk in self.chunks if chunk[0] == capture)


class Gap(NamedTuple):
    """Rows that were handed over and are not in the store."""

    first_call: int
    rows: int
    cause: str


class HeaderDecoder:
    """Decodes the headers of one segment; descriptions that repeat are decoded once and shared."""

    def __init__(
        self, rank: int, epoch: int, attempt: int, sequence: int, *, holds_all_pieces: bool = False
    ) -> None:
        """The arguments say whose headers are expected here; a slice ``holds_all_pieces`` of its calls."""
        self._identity = (rank, epoch, attempt)
        self._sequence = sequence
        self._holds_all_pieces = holds_all_pieces
        self._descriptions: dict[bytes, CallDescription] = {}

    @property
    def identity(self) -> tuple[int, int, int]:
        """(rank, epoch, attempt) of the calls that are expected."""
        return self._identity

    @property
    def sequence(self) -> int:
        """Number of the segment."""
        return self._sequence

    def describe(self, encoded: bytes, rows: int) -> CallDescription:
        """Decode the description of a call with so many rows; raises as msgpack and lookups do."""
        return self._description(encoded, rows)

    def decode(self, key: int, value: bytes, *, is_checked: bool = False) -> Call | Gap:
        """Decode one header; ``is_checked``: it was decoded before, so its numbers need not be checked again.

        Raises:
            CorruptDataError: Not a header of this segment.
        """
        try:
            return self._decode(key, value, is_checked)
        except CorruptDataError:
            raise
        # KeyError, TypeError, AttributeError: another structure; UnpackException and ValueError: no msgpack.
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            msgpack.UnpackException,
        ) as error:
            raise CorruptDataError(
                f"the header of call {key} cannot be decoded ({type(error).__name__}: {error})",
                "restore the segment from a copy, or drop its epoch",
            ) from error

    def _decode(self, key: int, value: bytes, is_checked: bool) -> Call | Gap:
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(value), 1))
        unpacker.feed(value)
        if unpacker.read_array_header() != 5:
            raise ValueError("expected an array of 5")
        kind = unpacker.unpack()
        core = unpacker.unpack()
        if kind == 1:
            return Gap(_natural(core["first_call"]), _natural(core["rows"]), _text(core["cause"]))
        if kind != 0:
            raise ValueError(f"kind {kind!r} is unknown")
        start = unpacker.tell()
        unpacker.skip()
        encoded = value[start : unpacker.tell()]
        inline = unpacker.unpack()
        if not isinstance(inline, bytes):
            raise ValueError("inline is not binary")
        rank, epoch, attempt = self._identity
        chunks = core["chunks"]
        if self._holds_all_pieces:
            for chunk in chunks:
                chunk[1] = INLINE if chunk[1] == INLINE else self._sequence
        call = Call(
            rank, attempt, key, epoch, core["rows"], core["ground_truth_rows"], core["first_row"],
            self._sequence, chunks, inline, self._description(encoded, core["rows"]),
        )  # fmt: skip
        if not is_checked:
            self._check(key, core, len(inline))
            _check_sizes(call)
        return call

    def _check(self, key: int, core: dict[str, Any], inline_bytes: int) -> None:
        rank, epoch, attempt = self._identity
        recorded_epoch = -1 if core["epoch"] is None else _natural(core["epoch"])
        if (core["rank"], recorded_epoch, core["attempt"], core["call"]) != (rank, epoch, attempt, key):
            raise ValueError("it belongs to another segment or key")
        rows = _natural(core["rows"])
        ground_truth_rows = _natural(core["ground_truth_rows"])
        first_row = _natural(core["first_row"])
        if ground_truth_rows not in (0, rows) or first_row + rows > _MAX_INT64:
            raise ValueError("its numbers of rows contradict each other")
        for capture, segment, offset, length, crc in core["chunks"]:
            for number in (capture, offset, length, crc):
                _natural(number)
            if segment != INLINE:
                _natural(segment)
            elif offset + length > inline_bytes:
                raise ValueError("a piece lies outside its inline bytes")

    def _description(self, encoded: bytes, rows: int) -> CallDescription:
        cached = self._descriptions.get(encoded)
        if cached is None:
            cached = _decode_description(msgpack.unpackb(encoded), rows)
            # A store with ever new descriptions must not grow the cache without bound.
            if len(self._descriptions) >= _MAX_CACHED_DESCRIPTIONS:
                self._descriptions.clear()
            if len(encoded) <= _MAX_CACHED_BYTES:
                self._descriptions[encoded] = cached
        if cached.samples not in (rows, -1):
            raise ValueError(f"it has {rows} rows, but columns of {cached.samples} samples")
        return cached


def _decode_description(document: dict[str, Any], rows: int) -> CallDescription:
    columns = tuple(_decode_column(entry) for entry in document["columns"])
    names = {(column.table, column.name) for column in columns}
    if len(names) != len(columns):
        raise ValueError("a column is described twice")
    if (FEATURES, "input_id") not in names:
        raise ValueError("it describes no input_id")
    samples = {
        _natural(entry["shape"][0])
        for entry, column in zip(document["columns"], columns, strict=True)
        if column.row_shape is not None and not column.broadcast
    }
    if len(samples) > 1:
        raise ValueError("its columns differ in their number of samples")
    has_shapes = any(column.shapes_capture is not None for column in columns)
    return CallDescription(
        _text(document["dataset_type"]), columns, samples.pop() if samples else -1, has_shapes
    )


def _decode_column(entry: dict[str, Any]) -> ColumnDescription:
    table, name, kind = entry["table"], _text(entry["name"]), entry["type"]
    if table not in TABLES or kind not in _COLUMN_TYPES:
        raise ValueError(f"column {name!r} has table {table!r} and type {kind!r}")
    if kind == "bytes" or (kind == "str" and "dtype" not in entry):
        return ColumnDescription(
            table, name, kind, "", None, _natural(entry["capture"]), None, bool(entry.get("broadcast"))
        )
    dtype = recorded_dtype(entry["dtype"]).name
    if FIELD_DTYPES.get(kind, dtype) != dtype:
        raise ValueError(f"column {name!r} has type {kind!r} and dtype {dtype!r}")
    if kind == "str" and (entry["shape"] is None or len(entry["shape"]) != 1 or not _is_integer(dtype)):
        raise ValueError(f"column {name!r} is text stored as {dtype!r} of shape {entry['shape']}")
    row_shape, shapes_capture = None, None
    if entry["shape"] is None:
        shapes_capture = _natural(entry["shapes"])
    else:
        row_shape = tuple(_natural(size) for size in entry["shape"])[1:]
        # The product without zeros: numpy refuses shapes whose nonzero sizes overflow, even of empty arrays.
        if (
            not entry["shape"]
            or len(row_shape) > _MAX_NDIM
            or math.prod(filter(None, row_shape)) > _MAX_ELEMENTS
        ):
            raise ValueError(f"column {name!r} has the shape {entry['shape']}")
    return ColumnDescription(
        table,
        name,
        kind,
        dtype,
        row_shape,
        _natural(entry["capture"]),
        shapes_capture,
        bool(entry.get("broadcast")),
    )


def _is_integer(dtype: str) -> bool:
    recorded = recorded_dtype(dtype)
    return recorded.is_native and recorded.raw.kind in "iu"


def _check_sizes(call: Call) -> None:
    """Refuse a header whose shapes do not agree with its bytes: shapes are what memory is allocated by."""
    captured: dict[int, int] = {}
    for number, _, _, length, _ in call.chunks:
        captured[number] = captured.get(number, 0) + length
    for column in call.description.columns:
        length = captured.get(column.capture, 0)
        samples = 1 if column.broadcast else call.rows
        if column.row_shape is not None:
            expected = samples * math.prod(column.row_shape) * recorded_dtype(column.dtype).raw.itemsize
            if length != expected:
                raise ValueError(
                    f"column {column.name!r} has {length} bytes where its shape needs {expected}"
                )
        elif column.is_list and length < samples:
            # One byte a value is the least that msgpack takes; so rows are bounded by bytes that are there.
            raise ValueError(f"column {column.name!r} has {length} bytes for {samples} values")
        elif column.shapes_capture is not None:
            _check_shapes_bytes(column, captured.get(column.shapes_capture, 0), samples)


def _check_shapes_bytes(column: ColumnDescription, length: int, samples: int) -> None:
    if length % (8 * samples) if samples else length:
        raise ValueError(f"the shapes of column {column.name!r} have {length} bytes for {samples} samples")


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value <= (1 << 64) - 1:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value
