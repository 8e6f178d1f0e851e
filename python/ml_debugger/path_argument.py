"""`check_path`: paths as users give them."""

from __future__ import annotations

import os

from ml_debugger.errors import InvalidInputError, InvalidTypeError


def check_path(value: object, name: str, expected: str = "a directory") -> str:
    """Return a path as text if the system could know one of that name.

    Raises:
        InvalidTypeError: Neither text nor an ``os.PathLike`` of text.
        InvalidInputError: Empty, or with NUL or what the filesystem's encoding has no form for.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise InvalidTypeError(
            f"{name} must be a path, got {type(value).__name__}", "pass a str or a pathlib.Path"
        )
    try:
        is_name = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise InvalidInputError(
            f"{name} must be a non-empty path without NUL or lone surrogates, got {text!r}",
            f"name {expected}",
        )
    return text
