"""Small files and directories of a trace: JSON, written durably; errors of the system as ours."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_debugger.errors import CorruptDataError, StorageError

FORMAT_VERSION = 1


@contextlib.contextmanager
def storage_errors(
    action: str, remedy: str = "check that data_dir is writable and has space"
) -> Iterator[None]:
    """Errors of the system inside of it become `StorageError`: "cannot ``action``", and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {action}: {error.strerror or error}", remedy) from error


def make_directory(path: Path) -> None:
    """Create ``path`` and its missing parents with mode 0700 and make the new names durable."""
    with storage_errors(f"create the directory {path}"):
        missing = []
        current = path
        while not current.exists():
            missing.append(current)
            current = current.parent
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(directory.parent)
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a directory")


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no file.

    Raises:
        CorruptDataError: It holds something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:  # brackets without end
        raise CorruptDataError(f"{path} is not JSON: {error}", "restore the file from a copy") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    if not isinstance(document, dict):
        raise CorruptDataError(f"{path} holds no JSON object", "restore the file from a copy")
    return document


def check_format_version(document: dict[str, Any], path: Path) -> None:
    """Refuse a file of a newer format than this package knows."""
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise CorruptDataError(
            f"{path} has format version {version!r}, expected at most {FORMAT_VERSION}", "upgrade ml-debugger"
        )


def write_json(path: Path, document: dict[str, Any], *, durable: bool = True) -> None:
    """Replace ``path`` (mode 0600), atomic and durable: temporary file, fsync, rename, directory fsync.

    Args:
        path: The file.
        document: Its content.
        durable: False: no fsync, for what may be lost, or found empty, after a power cut.
    """
    with storage_errors(f"write {path}"), _temporary_json(path, document, durable=durable) as temporary:
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)


def create_json(path: Path, document: dict[str, Any]) -> bool:
    """Write ``path`` atomically if nothing is there; False if something is."""
    with storage_errors(f"write {path}"), _temporary_json(path, document) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a filesystem without hard links
            if path.exists():
                return False
            os.replace(temporary, path)
        sync_directory(path.parent)
        return True


@contextlib.contextmanager
def _temporary_json(path: Path, document: dict[str, Any], *, durable: bool = True) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(document, file, indent=1)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
