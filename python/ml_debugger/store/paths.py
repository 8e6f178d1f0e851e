"""Names and paths of a trace's directories: model, version, rank, epoch. Nothing here creates any."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from ml_debugger.errors import InvalidInputError, InvalidTypeError, StorageError
from ml_debugger.path_argument import check_path

NO_EPOCH = -1
MAX_RANKS = 1 << 14

LOCK_FILE = "writer.lock"
VERSION_FILE = "version.json"

_DEFAULT_DATA_DIR = "mld_data"
_SLUG_CHARACTERS = 40
_SLUG_HASH_DIGITS = 12

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_RANK = re.compile(r"rank-(\d{5,})\Z")
_EPOCH = re.compile(r"epoch-(\d+|none)\Z")


class Partition(NamedTuple):
    """One epoch of one rank; ``epoch`` is -1 for the rows without one."""

    epoch: int
    path: Path


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Directory of all traces: the argument, ``MLD_DATA_DIR``, or ``./mld_data``; absolute, not created."""
    if data_dir is None:
        data_dir = os.environ.get("MLD_DATA_DIR") or _DEFAULT_DATA_DIR
    return Path(os.path.abspath(os.path.expanduser(check_path(data_dir, "data_dir"))))


def check_name(name: object, parameter: str) -> str:
    """Return ``name`` if it can name a model or a version: any non-empty text.

    Raises:
        InvalidTypeError: Not a str.
        InvalidInputError: Empty.
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"{parameter} must be a str, got {type(name).__name__}", "pass non-empty text")
    if not name:
        raise InvalidInputError(f"{parameter} must not be empty", "pass non-empty text")
    return str(name)


def slug(name: str) -> str:
    """Directory name for a model or a version: readable, safe, and different for different names."""
    readable = _UNSAFE.sub("_", name)
    stripped = readable.lstrip(".")
    readable = "_" * (len(readable) - len(stripped)) + stripped
    # surrogatepass: "any non-empty text" includes text that UTF-8 proper cannot encode.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable[:_SLUG_CHARACTERS]}-{digest[:_SLUG_HASH_DIGITS]}"


def trace_directory(data_dir: Path, model_name: str, version_name: str) -> Path:
    """Directory of one (model, version); not created."""
    return data_dir / slug(model_name) / slug(version_name)


def rank_directory(trace_dir: Path, rank: int) -> Path:
    """Directory of one rank; not created."""
    return trace_dir / f"rank-{rank:05d}"


def partition_directory(rank_dir: Path, epoch: int) -> Path:
    """Directory of one epoch (-1: rows without one); not created."""
    return rank_dir / ("epoch-none" if epoch == NO_EPOCH else f"epoch-{epoch}")


def trace_directories(data_dir: Path) -> list[Path]:
    """Directory of every trace under ``data_dir``, sorted by path."""
    return sorted(path.parent for path in data_dir.glob(f"*/*/{VERSION_FILE}"))


def rank_directories(trace_dir: Path) -> list[tuple[int, Path]]:
    """(rank, directory) of every rank that has recorded here, by rank."""
    return sorted((int(match[1]), path) for match, path in matching(trace_dir, _RANK))


def partitions(rank_dir: Path) -> list[Partition]:
    """The epochs of a rank in rising order, -1 (rows without one) first; dropped ones are not listed."""
    found = matching(rank_dir, _EPOCH)
    return sorted(Partition(NO_EPOCH if match[1] == "none" else int(match[1]), path) for match, path in found)


def matching(directory: Path, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
    """What in a directory has a name of that pattern; nothing if there is no directory."""
    try:
        with os.scandir(directory) as entries:
            found = [(pattern.match(entry.name), Path(entry.path)) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"cannot list {directory}: {error.strerror}", "check its permissions") from error
    return [(match, path) for match, path in found if match is not None]
