"""Which names columns may have."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from ml_debugger.errors import InvalidInputError, InvalidTypeError

RESERVED_NAMES = frozenset({"input_id", "dataset_type", "n_epoch", "logits", "label", "row_id"})
CALL_PARAMETERS = frozenset({"self", "model_input", "model_output", "ground_truth", "input_ids", "kwargs"})

_MAX_CHARACTERS = 100
_DERIVED = re.compile(r"(?P<base>.+)\.(?:\d+|values|offsets|shapes)\Z", re.DOTALL)
_HINT = "choose another name"


def check_column_name(name: object, what: str) -> str:
    """Return ``name`` if an alias or a field may have it.

    Raises:
        InvalidTypeError: Not a str.
        InvalidInputError: Empty, too long, reserved, or with characters that a file name must not have.
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"{what} must be a str, got {type(name).__name__} {name!r}", "pass text")
    if not 1 <= len(name) <= _MAX_CHARACTERS:
        raise InvalidInputError(f"{what} must have 1 to {_MAX_CHARACTERS} characters, got {len(name)}", _HINT)
    if "/" in name or "\\" in name or ".." in name:
        raise InvalidInputError(f"{what} {name!r} holds '/', '\\' or '..'", _HINT)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise InvalidInputError(f"{what} {name!r} holds a control character or a lone surrogate", _HINT)
    if name in RESERVED_NAMES:
        raise InvalidInputError(f"{what} {name!r} is reserved for a column of ours", _HINT)
    if name in CALL_PARAMETERS:
        raise InvalidInputError(f"{what} {name!r} is a parameter of the tracer's call", _HINT)
    return str(name)


def check_column_names(names: Iterable[str]) -> None:
    """Refuse names that occur twice or that the export would derive from another one.

    Raises:
        InvalidInputError: For the first such name.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidInputError(f"the column name {name!r} is used twice among aliases and fields", _HINT)
        seen.add(name)
    for name in seen:
        match = _DERIVED.match(name)
        if match is not None and match["base"] in seen | RESERVED_NAMES:
            raise InvalidInputError(
                f"the column name {name!r} is one that ml_debugger derives from {match['base']!r}", _HINT
            )
