"""Recorded dtypes: how torch names map to stored bytes, to numpy and back to torch.

Types that numpy cannot name (bfloat16, float8, complex32) are held as unsigned integers of the same width,
*raw*, until somebody asks for numpy values: then they are widened, without loss, to float32 or complex64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ml_debugger.errors import CorruptDataError, StorageError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RecordedDtype:
    """One element type of the record format.

    Attributes:
        name: Torch name without ``torch.``.
        raw: Little-endian numpy dtype of the stored bytes; an unsigned integer where numpy has no such type.
        written: Numpy dtype that holds every value without loss; equal to ``raw`` where numpy has the type.
    """

    name: str
    raw: np.dtype[Any]
    written: np.dtype[Any]

    @property
    def is_native(self) -> bool:
        """Whether the stored bytes are numpy values as they stand."""
        return self.raw == self.written


def _table() -> dict[str, RecordedDtype]:
    native = {
        "bool": "?", "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
        "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8",
        "float16": "<f2", "float32": "<f4", "float64": "<f8", "complex64": "<c8", "complex128": "<c16",
    }  # fmt: skip
    widened = {"bfloat16": ("<u2", "<f4"), "complex32": ("<u4", "<c8")}
    float8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
    widened.update(dict.fromkeys(float8, ("u1", "<f4")))
    table = {name: RecordedDtype(name, np.dtype(code), np.dtype(code)) for name, code in native.items()}
    for name, (raw, written) in widened.items():
        table[name] = RecordedDtype(name, np.dtype(raw), np.dtype(written))
    return table


RECORDED_DTYPES = _table()

# Fields of these types are tensors of one dtype; their recorded name in a manifest is the field type.
FIELD_DTYPES = {"int": "int64", "float": "float64", "bool": "bool"}


def recorded_dtype(name: object) -> RecordedDtype:
    """Look a dtype up by its torch name.

    Raises:
        CorruptDataError: No dtype of the record format.
    """
    found = RECORDED_DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise CorruptDataError(
            f"a column has the unknown dtype {name!r}",
            "read it with the release of ml-debugger that wrote it",
        )
    return found


def widen(raw: Array, dtype: RecordedDtype) -> Array:
    """Numpy values of raw elements; ``raw`` itself for types that numpy has."""
    if dtype.is_native:
        return raw
    if dtype.name == "bfloat16":
        upper: Array = raw.astype("<u4") << np.uint32(16)
        return upper.view("<f4")
    if dtype.name == "complex32":
        halves = np.ascontiguousarray(raw).reshape(*raw.shape, 1).view("<f2")
        values: Array = halves.astype("<f4").view("<c8")[..., 0]
        return values
    widened: Array = _float8_values(dtype.name)[raw]
    return widened


@functools.cache
def _float8_values(name: str) -> Array:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    values: Array = codes.view(getattr(torch, name)).to(torch.float32).numpy()
    return values


def to_torch(raw: Array, dtype: RecordedDtype) -> torch.Tensor:
    """Torch tensor of the recorded dtype over raw elements; shares memory with ``raw``."""
    import torch

    if dtype.is_native:
        return torch.from_numpy(raw)
    recorded = getattr(torch, dtype.name)
    # uint32 became a torch dtype late and knows few operations; int32 has the same bytes.
    source = torch.from_numpy(raw.view("<i4")) if dtype.name == "complex32" else torch.from_numpy(raw)
    return source.view(recorded)


def narrow(written: Array, dtype: RecordedDtype) -> Array:
    """Raw elements behind widened values: the inverse of `widen`, down to the payloads of NaNs."""
    if dtype.is_native:
        return written
    bits = np.ascontiguousarray(written)
    if dtype.name == "bfloat16":
        upper: Array = bits.view("<u4") >> np.uint32(16)
        return upper.astype("<u2")
    if dtype.name == "complex32":
        halves = bits.reshape(*bits.shape, 1).view("<f4").astype("<f2")
        pairs: Array = halves.view("<u4")[..., 0]
        return pairs
    values = _float8_values(dtype.name).view("<u4")
    order = np.argsort(values, kind="stable").astype(np.uint8)
    found = np.searchsorted(values[order], bits.view("<u4"))
    codes: Array = order[np.minimum(found, order.size - 1)]
    return codes


def common_written_dtype(names: Iterable[str], column: str) -> np.dtype[Any]:
    """The numpy dtype that holds all values of a column recorded in several dtypes.

    Raises:
        StorageError: Numpy's common type would round some of them.
    """
    dtypes = [recorded_dtype(name) for name in names]
    common = functools.reduce(np.promote_types, (dtype.written for dtype in dtypes))
    if not all(_holds(common, dtype.written) for dtype in dtypes):
        listed = ", ".join(sorted({dtype.name for dtype in dtypes}))
        raise StorageError(
            f"column {column!r} was recorded in the dtypes {listed}, of which numpy's common type {common} "
            "rounds some values",
            "read it by epoch or by dataset_type, and record it in one dtype",
        )
    return common


def _holds(target: np.dtype[Any], source: np.dtype[Any]) -> bool:
    if target == source:
        return True
    if source.kind in "iu" and target.kind in "fc":
        # numpy calls int64 -> float64 safe, although the mantissa has 53 bits.
        digits = np.finfo(target).nmant + 1
        return source.itemsize * 8 - int(source.kind == "i") <= int(digits)
    return bool(np.can_cast(source, target, "safe"))
