"""Checks of what a call is given: ids, labels, dataset type, epoch. All of it runs before the forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.integers import is_integer
from ml_debugger.tracer.outputs import plain_tensor, select_rows, stack_tensors, tensor_of_array

Ids = list[str] | torch.Tensor

_MAX_INT64 = (1 << 63) - 1
_IDS_HINT = "pass a sequence of str or int, a numpy array or an integer tensor, one id a sample"
_LABELS_HINT = "pass a tensor, an array or a list, hard (B,) or soft (B, C), or None"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ID_DTYPES = frozenset({*_INTEGERS, torch.uint16, torch.uint32, torch.uint64})
# What the numbers of a list of tensors become: the same as those of a list of numbers.
_LISTED_DTYPES = {
    torch.bool: torch.bool,
    **dict.fromkeys(_INTEGERS, torch.int64),
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), torch.float64),
}


def parse_ids(input_ids: Any) -> Ids:
    """Return the ids of a call in the form in which they are copied; it shares no memory with ``input_ids``.

    Integers in an array, a tensor, a range or a list stay integers, (B,), in their dtype and on their device,
    and become decimal text when they are read: their values are not looked at, so nothing waits for a device.
    Everything else is text.

    Args:
        input_ids: Sequence of str or int, numpy array of text or integers, or integer tensor; one
            dimension. A list of 0-dim tensors that `stack_tensors` leaves alone waits for them.

    Raises:
        InvalidTypeError: Another type, or an id that is neither text nor an integer.
        InvalidInputError: Not one-dimensional, or text that holds a lone surrogate or NUL.
    """
    if isinstance(input_ids, (list, tuple, range)):
        return _listed_ids(input_ids)
    if isinstance(input_ids, torch.Tensor):
        # Of an empty list torch makes floats.
        return [] if tuple(input_ids.shape) == (0,) else _integer_ids(input_ids)
    if hasattr(input_ids, "__array__"):
        return _ids_of_array(np.asarray(input_ids))
    if isinstance(input_ids, Sequence) and not isinstance(input_ids, (str, bytes, bytearray, memoryview)):
        return _listed_ids(list(input_ids))
    raise InvalidTypeError(f"input_ids must be a sequence of ids, got {type(input_ids).__name__}", _IDS_HINT)


def id_texts(ids: Ids) -> list[str]:
    """The ids as text; waits for a device on which they are."""
    return ids if isinstance(ids, list) else list(map(str, ids.tolist()))


def select_ids(ids: Ids, rows: list[int] | None) -> Ids:
    """The ids of the sampled rows."""
    if rows is None:
        return ids
    return [ids[row] for row in rows] if isinstance(ids, list) else select_rows(ids, rows)


def _listed_ids(input_ids: Sequence[Any]) -> Ids:
    ids = input_ids
    try:
        text = "".join(ids)  # the fastest check that all are text
    except TypeError:
        integers = _listed_integers(ids)
        if integers is not None:
            return integers
        ids = [_id_text(value) for value in ids]
        text = "".join(ids)
    if "\0" in text:
        raise InvalidInputError("input_ids hold a NUL character", "use ids without NUL")
    if not text.isascii():
        _check_encodable(ids)
    return list(ids)  # the forward may change the caller's


def _listed_integers(ids: Sequence[Any]) -> torch.Tensor | None:
    """The ids as one tensor; None where that takes a look at each of them."""
    if set(map(type, ids)) <= {int, np.int64}:  # a bool is no int here
        try:
            return torch.from_numpy(np.array(ids, np.int64))
        except OverflowError:
            return None
    stacked = stack_tensors(ids)
    return None if stacked is None or stacked.ndim != 1 else _integer_ids(stacked)


def _integer_ids(input_ids: torch.Tensor) -> torch.Tensor:
    if input_ids.dtype not in _ID_DTYPES:
        raise InvalidTypeError(
            f"input_ids must be text or integers, got a tensor of {input_ids.dtype}", _IDS_HINT
        )
    tensor = plain_tensor(input_ids, "input_ids")
    _check_dimension(tensor)
    return tensor.clone()  # the forward may change the caller's


def _ids_of_array(input_ids: np.ndarray[Any, Any]) -> Ids:
    if input_ids.dtype.kind not in "iuUOT" and input_ids.size:  # of an empty list numpy makes floats
        raise InvalidTypeError(
            f"input_ids must be text or integers, got an array of {input_ids.dtype}", _IDS_HINT
        )
    _check_dimension(input_ids)
    is_integer_array = input_ids.dtype.kind in "iu"
    return tensor_of_array(input_ids) if is_integer_array else _listed_ids(input_ids.tolist())


def _check_dimension(input_ids: Any) -> None:
    if input_ids.ndim != 1:
        raise InvalidInputError(
            f"input_ids must have one dimension, got shape {tuple(input_ids.shape)}", "pass one id a sample"
        )


def _id_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not is_integer(value):
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            return id_texts(_integer_ids(value.reshape(1)))[0]
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
        if not is_integer(n_epoch):
            raise InvalidTypeError(
                f"{parameter} must be an int, got {type(n_epoch).__name__} {n_epoch!r}", "pass an int >= 0"
            )
        n_epoch = int(n_epoch)
    if not 0 <= n_epoch <= _MAX_INT64:
        raise InvalidInputError(
            f"{parameter} must be from 0 to 2**63 - 1, got {n_epoch}", f"count {parameter} from 0"
        )
    return int(n_epoch)


def select_epoch(n_epoch: Any) -> int | None:
    """Return the epoch that a reader, an export or an upload asks for: None = all, -1 = rows without one."""
    if n_epoch is None:
        return None
    if is_integer(n_epoch) and n_epoch < 0:
        if n_epoch != -1:
            raise InvalidInputError(
                f"n_epoch must be at least -1, got {n_epoch}", "pass -1 for the rows without an epoch"
            )
        return -1
    return require_epoch(n_epoch)


def parse_labels(ground_truth: Any, batch_size: int) -> torch.Tensor:
    """Return the ground truth of a call, on its device; it shares no memory with ``ground_truth``.

    Args:
        ground_truth: Tensor on any device, numpy array, or (nested) list: ints become int64, floats float64.
            A list of tensors that `stack_tensors` leaves alone waits for them.
        batch_size: B; the shape must be (B,) or (B, C).

    Raises:
        InvalidTypeError: Text or another type.
        InvalidInputError: Another shape.
    """
    if isinstance(ground_truth, torch.Tensor):
        labels = plain_tensor(ground_truth, "ground_truth").clone()  # the forward may change the caller's
    else:
        labels = _label_tensor(ground_truth)
    shape = tuple(labels.shape)
    if len(shape) not in (1, 2) or shape[0] != batch_size:
        raise InvalidInputError(
            f"ground_truth must have shape ({batch_size},) or ({batch_size}, C), as there are {batch_size} "
            f"input_ids, got {shape}",
            "pass as many labels as input_ids, one a sample",
        )
    return labels


def _label_tensor(ground_truth: Any) -> torch.Tensor:
    if isinstance(ground_truth, (list, tuple)):
        stacked = stack_tensors(ground_truth)
        if stacked is not None and stacked.dtype in _LISTED_DTYPES:
            return plain_tensor(stacked, "ground_truth").to(_LISTED_DTYPES[stacked.dtype])
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
    return tensor_of_array(array)


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
