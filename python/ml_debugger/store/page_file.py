"""LMDB's pages as plain bytes: what a damaged `data.mdb` still holds, without handing the file to LMDB.

LMDB believes its pages: a damaged one leads it anywhere, and into a crash. Here every number is checked
before it is used, nothing is mapped, and the file is only ever read, so any content is safe, also of a file
that is cut off. Only the layout of LMDB 0.9 (data version 1) in this machine's byte order is known, with keys
that are compared byte by byte and have one value each, as segments have.

Two ways lead to values. `PageFile.walk` follows a tree from its root, as LMDB does: what is committed.
`PageFile.sweep` looks at every page that no walk has found sound; what it gives may be out of date or never
have been committed, and part of it is no value at all: who uses it needs checksums.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ml_debugger.errors import CorruptDataError, StorageError

PAGE_HEADER_BYTES = 16
KEY_BYTES = 8

_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_NO_PAGE = (1 << 64) - 1
_BRANCH, _LEAF = 0x01, 0x02
_BIG_VALUE, _TREE_VALUE = 0x01, 0x02
_HEADER = struct.Struct("=Q2x3H")  # number, flags, lower and upper end of the free space
_NODE = struct.Struct("=4H")
# Magic, version; page size in the record of the free pages; root of the main tree; last transaction.
_META = struct.Struct("=16xII16xI84xQ8xQ")
_TREE = struct.Struct("=32xQQ")  # entries, root
_POINTER_BYTES = 2
_PAGE_SIZES = (4096, 16384, 65536, 8192, 32768)
_SWEEP_BYTES = 16 << 20
_UNSEEN, _SOUND, _DAMAGED = range(3)


class Value(NamedTuple):
    """Where a value lies in the file; ``tree`` is its (entries, root) if it describes a named database."""

    key: bytes
    position: int
    length_bytes: int
    tree: tuple[int, int] | None = None


class PageFile:
    """One `data.mdb`. Use as a context manager: it is open within.

    Attributes:
        problems: What walks have found damaged.

    Raises:
        StorageError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.problems: list[str] = []
        self._path = path
        self._descriptor = -1
        with self:
            self.size_bytes = os.fstat(self._descriptor).st_size
            metas = self._metas()
        self._roots = [root for _, root in sorted(metas, reverse=True)]
        self._states = bytearray(-(-self.size_bytes // self.page_bytes))

    def __enter__(self) -> PageFile:
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(
                f"cannot read {self._path}: {error.strerror}", "check its permissions"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    @property
    def root(self) -> int | None:
        """Root of the main tree as of the last commit; None for an empty one, or if no meta page is sound."""
        return self._roots[0] if self._roots and self._roots[0] != _NO_PAGE else None

    @property
    def is_readable(self) -> bool:
        """Whether a meta page is sound."""
        return bool(self._roots)

    def read(self, position: int, length_bytes: int) -> bytes:
        """Bytes of the file.

        Raises:
            CorruptDataError: They lie behind its end, or the disk does not give them.
        """
        data = bytearray()
        while len(data) < length_bytes:
            try:
                more = os.pread(self._descriptor, length_bytes - len(data), position + len(data))
            except OSError as error:
                raise self._damaged(f"byte {position + len(data)}: {error.strerror}") from error
            if not more:
                raise self._damaged("it ends too early")
            data += more
        return bytes(data)

    def walk(self, root: int) -> Iterator[Value]:
        """The values of a tree in key order; notes what is damaged, and goes on behind it."""
        left: list[int] = []
        self._queue(left, [root])
        while left:
            number = left.pop()
            try:
                page = self.read(number * self.page_bytes, self.page_bytes)
            except CorruptDataError as error:
                self.problems.append(error.message)
                continue
            flags = self._check_header(number, page)
            if flags is None:
                self.problems.append(f"page {number} is damaged")
                continue
            if flags == _BRANCH:
                self._queue(left, self._children(page))
                self._states[number] = _SOUND
                continue
            values = list(self._values(number, page))
            if None in values:
                self.problems.append(f"page {number} is damaged")
            else:
                self._states[number] = _SOUND
            yield from (value for value in values if value is not None)

    def _queue(self, left: list[int], numbers: Iterable[int]) -> None:
        """Put pages before what is ``left`` to walk, each page of the file at most once."""
        fresh = []
        for number in numbers:
            if number >= len(self._states) or self._states[number] != _UNSEEN:
                self.problems.append(f"page {number} is named by a tree and is not there, or named twice")
            else:
                self._states[number] = _DAMAGED  # until it has been looked at
                fresh.append(number)
        left += reversed(fresh)

    def sweep(self) -> Iterator[Value]:
        """What may be values with keys of 8 bytes on pages that no walk has found sound, in no order."""
        a_step = max(1, _SWEEP_BYTES // self.page_bytes)
        for first in range(0, len(self._states), a_step):
            for number, page in self._leaf_like(first, min(a_step, len(self._states) - first)):
                for value in self._values(number, page):
                    if value is not None and len(value.key) == KEY_BYTES and value.tree is None:
                        yield value

    def _metas(self) -> list[tuple[int, int]]:
        """(transaction, root) of the sound meta pages; finds the page size."""
        self.page_bytes = _PAGE_SIZES[0]
        found = []
        for position in (0, *_PAGE_SIZES):
            with contextlib.suppress(CorruptDataError):
                magic, version, page_bytes, root, transaction = _META.unpack(self.read(position, _META.size))
                is_size = page_bytes in _PAGE_SIZES and position in (0, page_bytes)
                if magic == _MAGIC and version == _DATA_VERSION and is_size:
                    self.page_bytes = page_bytes
                    found.append((transaction, root))
        if len(found) < 2:
            self.problems.append("a meta page is damaged")
        return found

    def _check_header(self, number: int, page: bytes) -> int | None:
        """The flags of a page if it is one of a tree."""
        said, flags, lower, upper = _HEADER.unpack_from(page)
        sound = said == number and flags in (_BRANCH, _LEAF) and lower % _POINTER_BYTES == 0
        return flags if sound and PAGE_HEADER_BYTES <= lower <= upper <= len(page) else None

    def _pointers(self, page: bytes) -> tuple[int, ...]:
        """Where the nodes of a page begin; all that may be pointers, if the page does not say how many."""
        lower = int(_HEADER.unpack_from(page)[2])
        if lower % _POINTER_BYTES or not PAGE_HEADER_BYTES <= lower <= len(page):
            lower = len(page)
        pointers = struct.unpack_from(
            f"={(lower - PAGE_HEADER_BYTES) // _POINTER_BYTES}H", page, PAGE_HEADER_BYTES
        )
        if lower < len(page):
            return pointers
        # The first node that begins within the pointers ends them.
        end = len(page)
        for count, pointer in enumerate(pointers):
            if PAGE_HEADER_BYTES + _POINTER_BYTES * count >= end:
                return pointers[:count]
            end = min(end, pointer) if pointer > PAGE_HEADER_BYTES else end
        return pointers

    def _children(self, page: bytes) -> Iterator[int]:
        for pointer in self._pointers(page):
            if pointer + _NODE.size <= len(page):
                low, high, top, _ = _NODE.unpack_from(page, pointer)
                yield low | high << 16 | top << 32

    def _values(self, number: int, page: bytes) -> Iterator[Value | None]:
        """The values of a leaf; None stands for what is none."""
        for pointer in self._pointers(page):
            yield self._value(number, page, pointer)

    def _value(self, number: int, page: bytes, pointer: int) -> Value | None:
        if pointer < PAGE_HEADER_BYTES or pointer + _NODE.size > len(page):
            return None
        low, high, flags, key_bytes = _NODE.unpack_from(page, pointer)
        length = low | high << 16
        start = pointer + _NODE.size + key_bytes
        in_page = KEY_BYTES if flags == _BIG_VALUE else length
        if start + in_page > len(page) or flags not in (0, _BIG_VALUE, _TREE_VALUE):
            return None
        key = page[pointer + _NODE.size : start]
        tree = None
        position = number * self.page_bytes + start
        if flags == _BIG_VALUE:
            (overflow,) = struct.unpack_from("=Q", page, start)
            position = overflow * self.page_bytes + PAGE_HEADER_BYTES
        elif flags == _TREE_VALUE:
            if length != _TREE.size:
                return None
            tree = _TREE.unpack_from(page, start)
        return Value(key, position, length, tree) if position + length <= self.size_bytes else None

    def _leaf_like(self, first: int, count: int) -> Iterator[tuple[int, bytes]]:
        """Pages that no walk has found sound and whose first node has a key of 8 bytes, or that say leaf."""
        size = self.page_bytes
        try:
            available = min(count * size, self.size_bytes - first * size)
            data = self.read(first * size, available).ljust(count * size, b"\0")
        except CorruptDataError as error:
            self.problems.append(error.message)
            if count > 1:  # One unreadable sector costs its page only.
                for number in range(first, first + count):
                    yield from self._leaf_like(number, 1)
            return
        pages = np.frombuffer(data, np.uint8).reshape(count, size)
        shorts = pages[:, : PAGE_HEADER_BYTES + _POINTER_BYTES].copy().view(np.uint16)
        pointer = shorts[:, -1].astype(np.int64)
        inside = (pointer > PAGE_HEADER_BYTES) & (pointer <= size - _NODE.size - KEY_BYTES)
        key_at = np.where(inside, pointer, 0) + _NODE.size - 2
        rows = np.arange(count)
        key_bytes = pages[rows, key_at].astype(np.int64) | pages[rows, key_at + 1].astype(np.int64) << 8
        unsound = np.frombuffer(self._states, np.uint8)[first : first + count] != _SOUND
        says_leaf = (shorts[:, 5] == _LEAF) & (shorts[:, 6] > PAGE_HEADER_BYTES)
        for row in np.flatnonzero(unsound & (says_leaf | (inside & (key_bytes == KEY_BYTES)))).tolist():
            yield first + row, data[row * size : (row + 1) * size]

    def _damaged(self, problem: str) -> CorruptDataError:
        return CorruptDataError(f"{self._path}: {problem}", "restore the segment from a copy")
