"""Packages that only some features need: imported when used, named with their remedy when missing."""

from __future__ import annotations

import importlib
from typing import Any

from ml_debugger.errors import InvalidInputError


def require(module: str, extra: str, feature: str) -> Any:
    """Import a package that an extra of this distribution installs.

    Args:
        module: What to import, such as ``pyarrow.parquet``.
        extra: Name of the extra.
        feature: What needs it, for the message.

    Raises:
        InvalidInputError: It is not installed; the message has the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidInputError(
            f"{feature} needs {module.partition('.')[0]}, which cannot be imported ({error})",
            f'pip install "ml-debugger[{extra}]"',
        ) from error
