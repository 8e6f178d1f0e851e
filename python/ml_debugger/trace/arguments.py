"""Checks of what readers are asked for: epochs, tables, columns, ids."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.integers import is_integer
from ml_debugger.store import layout
from ml_debugger.trace.header import TABLES

Ids: TypeAlias = "Iterable[str | int]"


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Which rows of a table are wanted.

    Attributes:
        n_epoch: The epoch; -1: rows without one; None: all.
        dataset_type: Only rows of this dataset type; None: all.
        dedupe: Of the rows that have an epoch, only the newest of each sample.
        input_ids: Only rows of these samples; None: all.
    """

    n_epoch: int | None = None
    dataset_type: str | None = None
    dedupe: bool = False
    input_ids: frozenset[str] | None = None


def check_rows(n_epoch: object, dataset_type: object, dedupe: object, input_ids: object) -> RowFilter:
    """The filter that a reader was asked for.

    Raises:
        InvalidTypeError: An argument of another type.
        InvalidInputError: An epoch below -1.
    """
    epoch = check_epoch(n_epoch)
    if dataset_type is not None and not isinstance(dataset_type, str):
        raise InvalidTypeError(
            f"dataset_type must be a str or None, got {type(dataset_type).__name__}",
            "pass the text given to the call",
        )
    return RowFilter(epoch, dataset_type, bool(dedupe), check_ids(input_ids))


def check_epoch(n_epoch: object) -> int | None:
    """Return the epoch that is asked for: None (all), -1 (rows without one), or one that is >= 0.

    Raises:
        InvalidTypeError: Not an int; a bool is none.
        InvalidInputError: Below -1.
    """
    if n_epoch is None:
        return None
    epoch = check_integer(n_epoch, "n_epoch", "an int, -1 for the rows without an epoch, or None for all")
    if epoch < layout.NO_EPOCH:
        raise InvalidInputError(
            f"n_epoch must be at least -1, got {epoch}", "pass -1 for the rows without an epoch"
        )
    return epoch


def check_integer(value: object, name: str, expected: str) -> int:
    """Return ``value`` if it is an int; a bool is none.

    Raises:
        InvalidTypeError: Another type.
    """
    if not is_integer(value):
        raise InvalidTypeError(f"{name} must be an int, got {type(value).__name__}", f"pass {expected}")
    return operator.index(value)


def check_batch_size(batch_size: object) -> int:
    """Return a number of rows that is at least 1.

    Raises:
        InvalidTypeError: Not an int.
        InvalidInputError: Below 1.
    """
    rows = check_integer(batch_size, "batch_size", "a positive int")
    if rows < 1:
        raise InvalidInputError(f"batch_size must be at least 1, got {rows}", "pass a positive int")
    return rows


def check_table(table: str) -> str:
    """Return ``table`` if it is one of the two.

    Raises:
        InvalidInputError: Another name.
    """
    if not isinstance(table, str) or table not in TABLES:
        raise InvalidInputError(f"there is no table {table!r}", f"name one of {', '.join(map(repr, TABLES))}")
    return table


def check_columns(columns: Sequence[str] | None) -> Sequence[str] | None:
    """Return names of columns as a list; None stays None.

    Raises:
        InvalidTypeError: Not a sequence of str.
    """
    if columns is None:
        return None
    if isinstance(columns, str):
        raise InvalidTypeError(
            f"columns must be a list of names, got the str {columns!r}", f"pass [{columns!r}]"
        )
    try:
        names = list(columns)
    except TypeError as error:
        raise InvalidTypeError(
            f"columns must be a list of names, got {type(columns).__name__}", "pass a list of str"
        ) from error
    if not all(isinstance(name, str) for name in names):
        raise InvalidTypeError(f"columns must be a list of names, got {names!r}", "pass a list of str")
    return names


def check_ids(input_ids: Any) -> frozenset[str] | None:
    """Return ids as they are stored, as text; None stays None.

    Args:
        input_ids: What a call takes as ``input_ids``: text or integers in a list, tuple, numpy array or
            tensor; also a set or any other iterable of them.

    Raises:
        InvalidTypeError: Something else; a bare str or an id that is neither text nor an integer.
    """
    if input_ids is None:
        return None
    values = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, (Collection, Iterable)):
        raise InvalidTypeError(
            f"input_ids must be a sequence of ids, got {type(input_ids).__name__}",
            "pass a list of str or int",
        )
    return frozenset(_id_text(value) for value in values)


def _id_text(value: object) -> str:
    if isinstance(value, str):
        return str(value)
    return str(check_integer(value, "an input id", "a str or an int"))
