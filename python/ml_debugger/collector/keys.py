"""API keys of a collector: who may come in, and how much each may leave there.

A key is kept as its SHA-256. That is enough for keys as `new_key` makes them: 256 random bits cannot be
guessed from a hash, however fast it is to compute.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from ml_debugger.errors import InvalidInputError

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

    Args:
        lines: A key each, plain or as ``sha256:<64 hex digits>``, and after a blank its quota, such as
            ``20GB``. Empty lines and those that begin with ``#`` count for nothing.

    Raises:
        InvalidInputError: A line is something else; it is not quoted, since it may hold a key.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.entries = [
            entry for number, line in enumerate(lines, 1) if (entry := _parse(line, number)) is not None
        ]

    @classmethod
    def from_environment(cls, keys_file: str | os.PathLike[str] | None = None) -> KeyRing:
        """Keys of ``MLD_API_KEYS`` (separated by commas) and of a file (one a line).

        Raises:
            InvalidInputError: The file cannot be read, or holds something else.
        """
        ring = cls(os.environ.get("MLD_API_KEYS", "").split(","))
        if keys_file is None:
            return ring
        shown = os.fspath(keys_file)
        try:
            with open(keys_file, encoding="utf-8") as file:
                listed = cls(file.read().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"cannot read the keys file {shown!r}: {error}", "name a text file, a key a line"
            ) from error
        if not listed:
            raise InvalidInputError(f"the keys file {shown!r} holds no key", "write one key a line")
        ring.entries += listed.entries
        return ring

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self.entries)}>"

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a key; takes as long for a wrong one as for a right one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for entry in self.entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry
        return found


def new_key() -> str:
    """A new random key."""
    return f"mld-{secrets.token_urlsafe(32)}"


def hashed_key(key: str) -> str:
    """A key as a keys file may hold it, so that the file gives nobody access."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


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
