"""Where in a batch something stands, as a user names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_debugger.errors import InvalidInputError

Place = str | int | Callable[[Any], Any]


def take(batch: Any, place: Place, what: str) -> Any:
    """Return what stands at a place of a batch: under a key, at a position, or what a callable finds.

    Raises:
        InvalidInputError: There is nothing; names what the batch has.
    """
    if callable(place):
        return place(batch)
    try:
        return batch[place]
    except (KeyError, IndexError, TypeError) as error:
        keys = f" with {', '.join(map(repr, batch))}" if hasattr(batch, "keys") else ""
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InvalidInputError(
            f"{what} should stand at {place!r} of the batch, got a {type(batch).__name__}{size}{keys}",
            "name a key or position of the batch, or pass a callable that is given the batch",
        ) from error
