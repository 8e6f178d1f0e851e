"""Additional columns: their specifications and the values that calls bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.integers import is_integer
from ml_debugger.tracer.names import check_column_name
from ml_debugger.tracer.outputs import (
    dtype_name,
    plain_tensor,
    select_rows,
    stack_tensors,
    tensor_of_array,
)

FIELD_TYPES = ("int", "float", "bool", "str", "bytes", "tensor")

_KEYS = ("name", "type", "default", "dtype", "shape")
_MAX_EXACT_FLOAT = 1 << 53  # every int up to it is a float
_MIN_INT64, _MAX_INT64 = -(1 << 63), (1 << 63) - 1
_NUMBERS = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}
_NUMPY_KINDS = {"int": "iu", "float": "fiu", "bool": "b", "str": "UT", "bytes": ""}
_SPEC_HINT = 'describe a field as {"name": "camera", "type": "str"}'

Payload = bytes | torch.Tensor


class FieldValue(NamedTuple):
    """Values of one field in one call, in the form in which they are copied.

    Attributes:
        payload: Tensor, or packed text or bytes.
        dtype: Name of the dtype; None for text and bytes.
        shape: Shape, samples first (1 when broadcast); None for text, bytes and samples that differ in shape.
        broadcast: One value stands for all samples.
        shapes: int64 (samples, ndim) when the samples differ in shape.
    """

    payload: Payload
    dtype: str | None
    shape: tuple[int, ...] | None
    broadcast: bool
    shapes: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Field:
    """One additional column.

    Attributes:
        name: Column and keyword.
        type: One of `FIELD_TYPES`.
        dtype: Fixed dtype of a tensor field, or None.
        shape: Fixed shape of one sample of a tensor field, or None.
        default: What stands for a missing value, ready to be copied, or None: then a missing value is an
            error.
    """

    name: str
    type: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    default: FieldValue | None

    @property
    def specification(self) -> dict[str, Any]:
        """As recorded in `version.json`: without the default, which may change between runs."""
        recorded: dict[str, Any] = {"name": self.name, "type": self.type}
        if self.dtype is not None:
            recorded["dtype"] = dtype_name(self.dtype)
        if self.shape is not None:
            recorded["shape"] = list(self.shape)
        return recorded

    def parse(self, value: Any, batch_size: int, rows: list[int] | None) -> FieldValue:
        """Check what a call brings for this field.

        Numbers in a tensor are cast on their device. This waits for them only where their values matter: a
        uint64 for an ``int`` field, and a list of tensors that `stack_tensors` leaves alone.

        Args:
            value: One value for the batch, or one a sample.
            batch_size: Samples in the call.
            rows: Samples to keep; None keeps all.

        Raises:
            InvalidTypeError: A value is not of this field's type; nothing is converted.
            InvalidInputError: Wrong length or shape, or out of range.
        """
        if self.type == "tensor":
            return self._parse_tensor(value, batch_size, rows)
        if _is_other_sequence(value):
            value = list(value)
        if isinstance(value, (list, tuple)):
            stacked = stack_tensors(value)
            value = value if stacked is None or stacked.ndim != 1 else stacked
        if isinstance(value, torch.Tensor):
            value = plain_tensor(value, f"field {self.name!r}")
        if isinstance(value, (torch.Tensor, np.ndarray)):
            kind = self._check_array(value)
            if kind not in "UOT":
                return self._number_value(self._numbers(value), batch_size, rows)
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            return self._scalar_value(self._scalars([value]), broadcast=True)
        self._check_length(len(value), batch_size)
        scalars = self._scalars(value)
        return self._scalar_value(
            scalars if rows is None else [scalars[row] for row in rows], broadcast=False
        )

    # Scalars

    def _check_array(self, value: torch.Tensor | np.ndarray[Any, Any]) -> str:
        """Refuse an array of another type, or of more than one number a sample; returns numpy's kind."""
        if isinstance(value, np.ndarray):
            kind: str = value.dtype.kind
        else:
            kind = "c" if value.is_complex() else "f" if value.is_floating_point() else "i"
            kind = "b" if value.dtype == torch.bool else kind
        if kind == "O":
            return kind
        if kind not in _NUMPY_KINDS[self.type]:
            raise self._wrong_type(value, f"{type(value).__name__} of {value.dtype}")
        if value.ndim > 1:
            raise InvalidInputError(
                f"field {self.name!r} has values of shape {tuple(value.shape)}, expected one a sample",
                "pass one dimension, or declare the field as a tensor",
            )
        return kind

    def _check_length(self, length: int, batch_size: int) -> None:
        if length != batch_size:
            raise InvalidInputError(
                f"field {self.name!r} has {length} values, expected one for the batch or {batch_size}",
                "pass one value a sample",
            )

    def _numbers(self, value: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
        """The numbers in the dtype of the field, on their device."""
        wanted = _NUMBERS[self.type]
        if isinstance(value, np.ndarray):
            is_wide = value.dtype.kind == "u" and value.size and int(value.max()) > _MAX_INT64
            numbers = tensor_of_array(value, dtype_name(wanted))
        else:
            is_wide = value.dtype == torch.uint64 and bool((value.view(torch.int64) < 0).any())
            numbers = value.to(wanted)
        if is_wide and self.type == "int":
            raise self._too_wide()
        return numbers

    def _number_value(self, numbers: torch.Tensor, batch_size: int, rows: list[int] | None) -> FieldValue:
        broadcast = numbers.ndim == 0
        if broadcast:
            numbers = numbers.reshape(1)
        else:
            self._check_length(len(numbers), batch_size)
            numbers = select_rows(numbers, rows)
        return FieldValue(numbers, dtype_name(numbers.dtype), tuple(numbers.shape), broadcast)

    def _scalars(self, values: Sequence[Any]) -> Sequence[Any]:
        if not set(map(type, values)) <= _PLAIN_TYPES[self.type]:
            values = [self._scalar(value) for value in values]
        self._check_range(values)
        return values

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
            value = value.item()
        scalar = _SCALAR_CHECKS[self.type](value)
        if scalar is None:
            raise self._wrong_type(value, f"{type(value).__name__} {value!r}"[:200])
        return scalar

    def _check_range(self, values: Sequence[Any]) -> None:
        if self.type == "int" and values and not _MIN_INT64 <= min(values) <= max(values) <= _MAX_INT64:
            raise self._too_wide()
        if self.type == "str":
            try:
                "".join(values).encode("utf-8")
            except UnicodeEncodeError:
                raise InvalidInputError(
                    f"field {self.name!r} holds a lone surrogate", "pass proper text"
                ) from None

    def _scalar_value(self, scalars: Sequence[Any], *, broadcast: bool) -> FieldValue:
        if self.type in ("str", "bytes"):
            return FieldValue(msgpack.packb(scalars), None, None, broadcast)
        try:
            array = np.array(scalars, dtype_name(_NUMBERS[self.type]))
            if self.type == "float" and (np.abs(array) >= _MAX_EXACT_FLOAT).any():
                _check_exact(scalars)
        except OverflowError:
            raise InvalidInputError(
                f"field {self.name!r} holds an int too large for a float", "use an int or a str field"
            ) from None
        return FieldValue(torch.from_numpy(array), array.dtype.name, array.shape, broadcast)

    def _too_wide(self) -> InvalidInputError:
        return InvalidInputError(f"field {self.name!r} holds an int wider than 64 bits", "use a str field")

    def _wrong_type(self, value: Any, found: str) -> InvalidTypeError:
        return InvalidTypeError(
            f"field {self.name!r} has the type {self.type!r}, got {found}",
            f"convert the value to {self.type}",
        )

    # Tensors

    def _parse_tensor(self, value: Any, batch_size: int, rows: list[int] | None) -> FieldValue:
        if isinstance(value, (list, tuple)):
            return self._parse_samples(value, batch_size, rows)
        tensor = self._as_tensor(value)
        shape = tuple(tensor.shape)
        if self.shape is not None and shape == self.shape:
            return FieldValue(tensor.unsqueeze(0), dtype_name(tensor.dtype), (1, *shape), True)
        if not shape or shape[0] != batch_size or (self.shape is not None and shape[1:] != self.shape):
            wanted = (
                f"({batch_size}, ...)"
                if self.shape is None
                else f"{(batch_size, *self.shape)} or {self.shape}"
            )
            raise InvalidInputError(
                f"field {self.name!r} has a tensor of shape {shape}, expected {wanted}",
                "put the samples in front",
            )
        tensor = select_rows(tensor, rows)
        return FieldValue(tensor, dtype_name(tensor.dtype), tuple(tensor.shape), False)

    def _parse_samples(self, values: Sequence[Any], batch_size: int, rows: list[int] | None) -> FieldValue:
        samples = [self._as_tensor(value) for value in values]
        if len(samples) != batch_size:
            raise InvalidInputError(
                f"field {self.name!r} has {len(samples)} tensors, expected {batch_size}",
                "pass one tensor a sample",
            )
        for sample in samples:
            if self.shape is not None and tuple(sample.shape) != self.shape:
                raise InvalidInputError(
                    f"field {self.name!r} has a sample of shape {tuple(sample.shape)}, expected {self.shape}",
                    "pass the fixed shape",
                )
        if rows is not None:
            samples = [samples[row] for row in rows]
        dtypes = {sample.dtype for sample in samples}
        if len(dtypes) > 1:
            names = ", ".join(sorted(map(dtype_name, dtypes)))
            raise InvalidInputError(
                f"field {self.name!r} mixes the dtypes {names} in one call", "use one dtype"
            )
        device = samples[0].device
        samples = [sample.to(device) for sample in samples]
        return _joined(samples)

    def _as_tensor(self, value: Any) -> torch.Tensor:
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc" or value.dtype.char in "gG":  # torch has no long double
                raise self._wrong_type(value, f"an array of {value.dtype}")
            native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")).reshape(value.shape)
            value = torch.from_numpy(native if native.flags.writeable else native.copy())
        if not isinstance(value, torch.Tensor):
            raise self._wrong_type(value, type(value).__name__)
        if self.dtype is not None and value.dtype != self.dtype:
            raise InvalidTypeError(
                f"field {self.name!r} has the dtype {dtype_name(self.dtype)}, got {dtype_name(value.dtype)}",
                f"convert the tensor to {dtype_name(self.dtype)}",
            )
        return plain_tensor(value, f"field {self.name!r}")


def _check_exact(values: Sequence[Any]) -> None:
    """Raise OverflowError for an int that a float would round."""
    for value in values:
        if is_integer(value) and int(float(value)) != int(value):
            raise OverflowError


def _is_other_sequence(value: Any) -> bool:
    """Whether it is a sequence of values, of a type of its own."""
    if isinstance(value, (int, float, str, bytes, list, tuple, torch.Tensor)):
        return False
    return isinstance(value, Sequence) and not isinstance(value, (bytearray, memoryview))


def _joined(samples: list[torch.Tensor]) -> FieldValue:
    """One tensor where the samples agree in shape, else their elements in a row with a table of shapes."""
    shapes = {tuple(sample.shape) for sample in samples}
    name = dtype_name(samples[0].dtype)
    if len(shapes) == 1:
        stacked = _concatenate([sample.unsqueeze(0) for sample in samples])
        return FieldValue(stacked, name, tuple(stacked.shape), False)
    ndim = max(map(len, shapes))
    table = np.full((len(samples), ndim), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        if sample.ndim:
            table[row, ndim - sample.ndim :] = sample.shape
    return FieldValue(_concatenate([sample.reshape(-1) for sample in samples]), name, None, False, table)


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    dtype = parts[0].dtype
    if dtype.itemsize == 1:  # float8 has no concatenation kernel everywhere
        return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)
    return torch.cat(parts)


def _int(value: Any) -> int | None:
    return int(value) if is_integer(value) else None


def _float(value: Any) -> float | int | None:
    if is_integer(value):
        return int(value)
    return float(value) if isinstance(value, (float, np.floating)) else None


def _bool(value: Any) -> bool | None:
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def _str(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _bytes(value: Any) -> bytes | None:
    return bytes(value) if isinstance(value, (bytes, bytearray)) else None


# Values of these types need no check and no conversion.
_PLAIN_TYPES: dict[str, set[type]] = {
    "int": {int},
    "float": {float, int},
    "bool": {bool},
    "str": {str},
    "bytes": {bytes},
}

_SCALAR_CHECKS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "str": _str,
    "bytes": _bytes,
}


def parse_fields(specifications: Any, parameter: str) -> list[Field]:
    """Read ``additional_fields`` or ``additional_label_fields``.

    Raises:
        InvalidTypeError: Not a list of mappings, or an entry of the wrong type.
        InvalidInputError: Unknown keys or types, or a name that a field may not have.
    """
    if specifications is None:
        return []
    if not isinstance(specifications, (list, tuple)):
        raise InvalidTypeError(f"{parameter} must be a list, got {type(specifications).__name__}", _SPEC_HINT)
    return [_parse_field(specification, parameter) for specification in specifications]


def _parse_field(specification: Any, parameter: str) -> Field:
    if not isinstance(specification, Mapping):
        raise InvalidTypeError(f"{parameter} holds {specification!r}, expected a mapping", _SPEC_HINT)
    unknown = [key for key in specification if key not in _KEYS]
    if unknown:
        raise InvalidInputError(
            f"{parameter} has the unknown key {unknown[0]!r}, expected {_KEYS}", _SPEC_HINT
        )
    for key in ("name", "type"):
        if key not in specification:
            raise InvalidInputError(f"{parameter} lacks {key!r} in {dict(specification)!r}", _SPEC_HINT)
    name = check_column_name(specification["name"], f"a name in {parameter}")
    kind = specification["type"]
    if not isinstance(kind, str):
        raise InvalidTypeError(
            f"the type of field {name!r} must be a str, got {kind!r}", f"use one of {FIELD_TYPES}"
        )
    if kind not in FIELD_TYPES:
        raise InvalidInputError(f"field {name!r} has the unknown type {kind!r}", f"use one of {FIELD_TYPES}")
    if kind != "tensor" and ("dtype" in specification or "shape" in specification):
        raise InvalidInputError(
            f"field {name!r} of type {kind!r} has a dtype or shape", "fix them for tensor fields only"
        )
    field = Field(name, kind, _parse_dtype(name, specification), _parse_shape(name, specification), None)
    if "default" not in specification:
        return field
    return Field(name, kind, field.dtype, field.shape, _parse_default(field, specification["default"]))


def _parse_dtype(name: str, specification: Mapping[str, Any]) -> torch.dtype | None:
    given = specification.get("dtype")
    if given is None or isinstance(given, torch.dtype):
        return given
    if not isinstance(given, str):
        raise InvalidTypeError(
            f"the dtype of field {name!r} must be text or a torch.dtype, got {given!r}", _SPEC_HINT
        )
    dtype = getattr(torch, given.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidInputError(
            f"field {name!r} has the unknown dtype {given!r}", 'name a torch dtype such as "float32"'
        )
    return dtype


def _parse_shape(name: str, specification: Mapping[str, Any]) -> tuple[int, ...] | None:
    given = specification.get("shape")
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise InvalidTypeError(
            f"the shape of field {name!r} must be a list of ints, got {given!r}", _SPEC_HINT
        )
    shape = tuple(_int(size) for size in given)
    if any(size is None for size in shape):
        raise InvalidTypeError(
            f"the shape of field {name!r} must hold ints, got {given!r}", "fix every dimension"
        )
    sizes = tuple(size for size in shape if size is not None)
    if any(size < 0 for size in sizes):
        raise InvalidInputError(
            f"the shape of field {name!r} must not be negative, got {given!r}", "fix every dimension"
        )
    return sizes


def _parse_default(field: Field, default: Any) -> FieldValue:
    if field.type != "tensor":
        if isinstance(default, (list, tuple, np.ndarray, torch.Tensor)):
            raise InvalidTypeError(
                f"the default of field {field.name!r} must be one value, got {default!r}", _SPEC_HINT
            )
        return field.parse(default, 1, None)
    if isinstance(default, (list, tuple)):
        raise InvalidTypeError(
            f"the default of field {field.name!r} must be a tensor, got {default!r}", _SPEC_HINT
        )
    tensor = field._as_tensor(default)
    if field.shape is not None and tuple(tensor.shape) != field.shape:
        raise InvalidInputError(
            f"the default of field {field.name!r} has shape {tuple(tensor.shape)}, expected {field.shape}",
            "give the fixed shape",
        )
    copied = tensor.clone()
    return FieldValue(copied.unsqueeze(0), dtype_name(copied.dtype), (1, *copied.shape), True)
