"""Where an export goes: `output_path` and the default file name."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from ml_debugger.errors import InvalidInputError
from ml_debugger.path_argument import check_path
from ml_debugger.store.files import storage_errors

_MAX_NAME_BYTES = 255
_HASH_DIGITS = 8
# Separators and what some filesystem refuses: control characters, and text that UTF-8 cannot encode.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]')


def default_name(model_name: str, version_name: str, n_epoch: int | None) -> str:
    """File name ``<model_name>_<version_name>[_epoch<n>].zip``, safe: at most 255 bytes, no separators."""
    end = ".zip" if n_epoch is None else f"_epoch{n_epoch}.zip"
    return safe_name(f"{model_name}_{version_name}", end)


def safe_name(stem: str, end: str) -> str:
    """A file name of at most 255 bytes that every filesystem takes, from any text; ``end`` stays."""
    safe = _UNSAFE.sub("_", stem)
    stripped = safe.lstrip(".")
    safe = "_" * (len(safe) - len(stripped)) + stripped
    room = _MAX_NAME_BYTES - len(end)
    encoded = safe.encode()
    if len(encoded) > room:
        # Long names that begin alike must not overwrite one another.
        digest = "-" + hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
        safe = encoded[: room - len(digest)].decode("utf-8", "ignore") + digest
    return safe + end


def resolve_output(output_path: str | os.PathLike[str] | None, name: str) -> Path:
    """The file to write.

    Args:
        output_path: A directory, or a file that ends in ``.zip``; an existing directory stays one even with
            that ending.
            None: the current directory.
        name: File name to use in a directory.

    Raises:
        InvalidTypeError: Not a path.
        InvalidInputError: An empty path, one with NUL, or one that leads through a file.
        StorageError: The filesystem cannot look at it: its name is too long, say.
    """
    if output_path is None:
        return Path.cwd() / name
    text = check_path(output_path, "output_path", "a file or a directory")
    path = Path(text)
    with storage_errors(f"look at {text}", "name a path that the filesystem takes"):
        if path.is_dir() or not text.lower().endswith(".zip"):
            path = path / name
        nearest = next(parent for parent in path.parents if parent.exists())
        if not nearest.is_dir():
            raise InvalidInputError(
                f"output_path {text!r} leads through {str(nearest)!r}, which is a file",
                "name a directory, or a file that ends in .zip",
            )
        return path
