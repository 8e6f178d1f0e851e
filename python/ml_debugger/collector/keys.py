"""API keys of a collector: who may come in, and how much each may leave there.

A key is kept as its SHA-256. That is enough for keys as `new_key` makes them: 256 random bits cannot be
guessed from a hash, however fast it is to compute.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ml_debugger.errors import InvalidInputError, StorageError

logger = logging.getLogger("ml_debugger.collector")

_HASHED = re.compile(r"sha256:([0-9a-f]{64})\Z")
_QUOTA = re.compile(r"(\d+)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?\Z", re.IGNORECASE)
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base ** (power + 1)
    for end, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT")
}


@dataclass(frozen=True)
class KeyEntry:
    """One key.

    Attributes:
        digest: SHA-256 of the key.
        quota_bytes: Most bytes that it may leave at the collector; None: no limit.
    """

    digest: bytes
    quota_bytes: int | None = None

    @property
    def name(self) -> str:
        """Short name that tells nothing of the key."""
        return self.digest.hex()[:16]


class KeyRing:
    """The keys that a collector knows; without any, everybody may come in.

    A keys file is read again when it has changed, so that a key that is added or taken out counts at once.
    While it cannot be read, or is malformed, the keys of before hold, and the log says so.

    Args:
        lines: A key each, plain or as ``sha256:<64 hex digits>``, and after a blank its quota, such as
            ``20GB``. Empty lines and those that begin with ``#`` count for nothing.
        path: A file with more of them; must hold one now.

    Raises:
        InvalidInputError: A line is something else (it is not quoted, since it may hold a key), or the file
            cannot be read or holds no key.
    """

    def __init__(self, lines: Iterable[str], path: str | os.PathLike[str] | None = None) -> None:
        self._fixed = _entries(lines)
        self._path = path
        self._listed: list[KeyEntry] = []
        self._state: tuple[int, ...] | None = None
        if path is not None:
            self._state, self._listed = _state_of(path), _read(path)
            if not self._listed:
                raise InvalidInputError(
                    f"the keys file {os.fspath(path)!r} holds no key",
                    "make one: ml-debugger serve new-key --keys-file FILE",
                )

    @classmethod
    def from_environment(cls, keys_file: str | os.PathLike[str] | None = None) -> KeyRing:
        """Keys of ``MLD_API_KEYS`` (separated by commas) and of a file (one a line).

        Raises:
            InvalidInputError: The file cannot be read, or holds something else.
        """
        return cls(os.environ.get("MLD_API_KEYS", "").split(","), keys_file)

    @property
    def entries(self) -> list[KeyEntry]:
        """Every key."""
        return [*self._fixed, *self._listed]

    def __bool__(self) -> bool:
        # A file whose last key was taken out lets nobody in, not everybody.
        return bool(self._fixed) or self._path is not None

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self.entries)}>"

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a key; takes as long for a wrong one as for a right one."""
        self._refresh()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for entry in self.entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        return found

    def _refresh(self) -> None:
        if self._path is None or (state := _state_of(self._path)) == self._state:
            return
        self._state = state
        try:
            self._listed = _read(self._path)
        except InvalidInputError as error:
            logger.error("%s; the keys of before hold", error)


def new_key() -> str:
    """A new random key."""
    return f"mld-{secrets.token_urlsafe(32)}"


def hashed_key(key: str) -> str:
    """A key as a keys file may hold it, so that the file gives nobody access."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def add_key(path: str | os.PathLike[str], *, quota: str | None = None, note: str | None = None) -> str:
    """Make a new key and add its hash to a keys file; whoever gets the key shows it, nothing else holds it.

    The file is replaced, durably and all or nothing, by one with one more line; of several processes that do
    so at once each adds its own. A new file has mode 0600, an older one keeps its own.

    Args:
        path: The file; made if it is not there.
        quota: Most bytes that the key may leave at the collector, such as ``20GB``; None: no limit.
        note: A comment that tells later whose key it is.

    Raises:
        InvalidInputError: The quota is malformed, or the file holds something else than keys.
        StorageError: The file cannot be written.
    """
    key = new_key()
    line = hashed_key(key) + ("" if quota is None else f" {quota}")
    _entries([line])
    if note:
        line = f"# {' '.join(note.split())}\n{line}"
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        with _only_one_in(target.parent):
            before = target.read_text(encoding="utf-8") if target.exists() else ""
            _entries(before.splitlines())
            if before and not before.endswith("\n"):
                before += "\n"
            _replace(target, f"{before}{line}\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"the keys file {target} is not text", "name another one") from error
    except OSError as error:
        raise StorageError(
            f"cannot add a key to {target}: {error.strerror or error}", "name a file in a writable directory"
        ) from error
    return key


@contextlib.contextmanager
def _only_one_in(directory: Path) -> Iterator[None]:
    """Locks the directory, since a file that is replaced cannot hold a lock."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(target: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if target.exists():
                status = target.stat()
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: str | os.PathLike[str]) -> list[KeyEntry]:
    try:
        with open(path, encoding="utf-8") as file:
            return _entries(file.read().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"cannot read the keys file {os.fspath(path)!r}: {getattr(error, 'strerror', None) or error}",
            "name a text file, a key a line; ml-debugger serve new-key --keys-file FILE makes one",
        ) from error


def _state_of(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Changes when a file does; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _entries(lines: Iterable[str]) -> list[KeyEntry]:
    return [entry for number, line in enumerate(lines, 1) if (entry := _parse(line, number)) is not None]


def _parse(line: str, number: int) -> KeyEntry | None:
    words = line.split(None, 1)
    if not words or words[0].startswith("#"):
        return None
    hashed = _HASHED.match(words[0])
    if hashed is None and (words[0].startswith("sha256:") or not words[0].isascii()):
        raise InvalidInputError(
            f"key {number} is malformed", "write a key in ASCII, or sha256: and 64 lower-case hex digits"
        )
    digest = bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(words[0].encode()).digest()
    quota = None
    if len(words) > 1:
        match = _QUOTA.match(words[1].strip())
        if match is None:
            raise InvalidInputError(f"the quota of key {number} is malformed", "write it as 500MB or 20GB")
        quota = int(match[1]) * _UNITS[(match[2] or "").upper()]
    return KeyEntry(digest, quota)
