"""Checks of what a call is given: ids, labels, dataset type, epoch. All of it runs before the forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.tracer.outputs import dtype_name, plain_tensor

_MAX_INT64 = (1 << 63) - 1
_IDS_HINT = "pass a sequence of str or int, a numpy array or an integer tensor, one id a sample"
_LABELS_HINT = "pass a tensor, an array or a list, hard (B,) or soft (B, C), or None"


class Labels(NamedTuple):
    """Ground truth of one call in the form in which it is copied: a tensor, or a C-contiguous numpy array."""

    values: torch.Tensor | np.ndarray[Any, Any]
    dtype: str
    shape: tuple[int, ...]


def parse_ids(input_ids: Any) -> list[str]:
    """Return the ids of a call as text.

    Args:
        input_ids: List or tuple of str or int, numpy array of text or integers, or integer tensor on any
            device (a copy from a device waits for it); one dimension.

    Raises:
        InvalidTypeError: Another type, or an id that is neither text nor an integer.
        InvalidInputError: Not one-dimensional, or text that holds a lone surrogate or NUL.
    """
    ids = input_ids if isinstance(input_ids, (list, tuple)) else _ids_of_array(input_ids)
    try:
        text = "".join(ids)  # the fastest check that all are text
    except TypeError:
        ids = [_id_text(value) for value in ids]
        text = "".join(ids)
    if "\0" in text:
        raise InvalidInputError("input_ids hold a NUL character", "use ids without NUL")
    if not text.isascii():
        _check_encodable(ids)
    return list(ids)  # the forward may change the caller's


def _ids_of_array(input_ids: Any) -> list[Any]:
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dtype.is_floating_point or input_ids.dtype.is_complex or input_ids.dtype == torch.bool:
            raise InvalidTypeError(
                f"input_ids must be text or integers, got a tensor of {input_ids.dtype}", _IDS_HINT
            )
    elif isinstance(input_ids, np.ndarray):
        if input_ids.dtype.kind not in "iuUO":
            raise InvalidTypeError(
                f"input_ids must be text or integers, got an array of {input_ids.dtype}", _IDS_HINT
            )
    elif isinstance(input_ids, range):
        return list(input_ids)
    elif not isinstance(input_ids, (str, bytes, bytearray, dict, set)) and hasattr(input_ids, "__array__"):
        return _ids_of_array(np.asarray(input_ids))
    else:
        raise InvalidTypeError(
            f"input_ids must be a sequence of ids, got {type(input_ids).__name__}", _IDS_HINT
        )
    if input_ids.ndim != 1:
        raise InvalidInputError(
            f"input_ids must have one dimension, got shape {tuple(input_ids.shape)}", "pass one id a sample"
        )
    values: list[Any] = input_ids.tolist()
    return values


def _id_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            return _id_text(_ids_of_array(value.reshape(1))[0])
        raise InvalidTypeError(
            f"an input id must be a str or an int, got {type(value).__name__} {value!r}", _IDS_HINT
        )
    return str(int(value))


def _check_encodable(ids: Any) -> None:
    for value in ids:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidInputError(
                f"the input id {value!r} holds a lone surrogate and has no UTF-8 form",
                "decode the id properly",
            ) from None


def check_dataset_type(dataset_type: Any) -> str:
    """Return ``dataset_type`` if it is text that UTF-8 can hold."""
    if not isinstance(dataset_type, str):
        raise InvalidTypeError(
            f"dataset_type must be a str, got {type(dataset_type).__name__} {dataset_type!r}",
            'pass text such as "train"',
        )
    if not dataset_type.isascii():
        try:
            dataset_type.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidInputError(
                f"dataset_type {dataset_type!r} holds a lone surrogate", "pass proper text"
            ) from None
    return dataset_type if type(dataset_type) is str else str(dataset_type)


def check_epoch(n_epoch: Any) -> int:
    """Return the epoch of a call as the core counts it: -1 for None."""
    if n_epoch is None:
        return -1
    return require_epoch(n_epoch)


def require_epoch(n_epoch: Any, *, parameter: str = "n_epoch") -> int:
    """Return an epoch that must be given: an int >= 0.

    Raises:
        InvalidTypeError: Not an int (bools, floats and None are none).
        InvalidInputError: Negative, or wider than 64 bits.
    """
    if type(n_epoch) is not int:
        if isinstance(n_epoch, bool) or not isinstance(n_epoch, (int, np.integer)):
            raise InvalidTypeError(
                f"{parameter} must be an int, got {type(n_epoch).__name__} {n_epoch!r}", "pass an int >= 0"
            )
        n_epoch = int(n_epoch)
    if not 0 <= n_epoch <= _MAX_INT64:
        raise InvalidInputError(
            f"{parameter} must be from 0 to 2**63 - 1, got {n_epoch}", "count epochs from 0"
        )
    return int(n_epoch)


def select_epoch(n_epoch: Any) -> int | None:
    """Return the epoch that a reader, an export or an upload asks for: None = all, -1 = rows without one."""
    if n_epoch is None:
        return None
    if not isinstance(n_epoch, bool) and isinstance(n_epoch, (int, np.integer)) and int(n_epoch) == -1:
        return -1
    return require_epoch(n_epoch)


def parse_labels(ground_truth: Any, batch_size: int) -> Labels:
    """Return the ground truth of a call.

    Args:
        ground_truth: Tensor on any device, numpy array, or (nested) list: ints become int64, floats float64.
        batch_size: B; the shape must be (B,) or (B, C).

    Raises:
        InvalidTypeError: Text or another type.
        InvalidInputError: Another shape.
    """
    if isinstance(ground_truth, torch.Tensor):
        tensor = plain_tensor(ground_truth, "ground_truth")
        labels = Labels(tensor, dtype_name(tensor.dtype), tuple(tensor.shape))
    else:
        array = _label_array(ground_truth)
        labels = Labels(array, array.dtype.name, array.shape)
    shape = labels.shape
    if len(shape) not in (1, 2) or shape[0] != batch_size:
        raise InvalidInputError(
            f"ground_truth must have shape ({batch_size},) or ({batch_size}, C), as there are {batch_size} "
            f"input_ids, got {shape}",
            "pass as many labels as input_ids, one a sample",
        )
    return labels


def _label_array(ground_truth: Any) -> np.ndarray[Any, Any]:
    if isinstance(ground_truth, (list, tuple)):
        if ground_truth and all(isinstance(value, torch.Tensor) for value in ground_truth):
            ground_truth = [value.detach().cpu().tolist() for value in ground_truth]
        array = _list_array(ground_truth)
    elif isinstance(ground_truth, np.ndarray) or (
        hasattr(ground_truth, "__array__") and not isinstance(ground_truth, np.generic)
    ):
        array = np.asarray(ground_truth)
    else:
        raise InvalidTypeError(f"ground_truth has the type {type(ground_truth).__name__}", _LABELS_HINT)
    if (
        array.dtype.kind not in "biufc"
        or array.dtype.itemsize > 16
        or array.dtype.name in ("longdouble", "float128")
    ):
        raise InvalidTypeError(f"ground_truth must hold numbers, got an array of {array.dtype}", _LABELS_HINT)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _list_array(values: Any) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidInputError(
            f"ground_truth is no regular list of numbers: {error}", _LABELS_HINT
        ) from None
    if array.dtype.kind in "iu":
        if array.dtype.kind == "u" and array.size and int(array.max()) > _MAX_INT64:
            raise InvalidInputError("ground_truth holds an int wider than 64 bits", "use class numbers")
        return array.astype(np.int64)
    if array.dtype.kind == "f":
        # numpy makes floats of ints that no integer type holds together.
        if any(isinstance(value, int) and int(float(value)) != value for value in _leaves(values)):
            raise InvalidInputError("ground_truth holds an int that a float cannot hold", "use class numbers")
        return array.astype(np.float64)
    if array.dtype.kind == "O" and any(isinstance(value, int) for value in values):
        raise InvalidInputError(
            "ground_truth holds an int wider than 64 bits or mixes types", "use class numbers"
        )
    return array


def check_flag(value: object, name: str) -> bool:
    """Return ``value`` if it is a bool."""
    if not isinstance(value, bool):
        raise InvalidTypeError(
            f"{name} must be a bool, got {type(value).__name__} {value!r}", "pass True or False"
        )
    return value


def check_seconds(value: object, name: str) -> float:
    """Return ``value`` if it is a number of seconds >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(
            f"{name} must be a number of seconds, got {type(value).__name__}", "pass a float"
        )
    if not 0 <= value < float("inf"):
        raise InvalidInputError(
            f"{name} must be at least 0 and finite, got {value}", "pass a number of seconds"
        )
    return float(value)
