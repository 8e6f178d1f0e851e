"""What is left of one segment or slice: its sound headers, and its chunks by key, whatever state it is in.

A segment's pages are read by `ml_debugger.store.page_file`, never by LMDB. Its trees are followed first; if
they are whole and hold as many calls as its counters say, they are all there is. Otherwise every other page
is looked at too, and what it holds counts if its checksum is right.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ml_debugger import _core
from ml_debugger.errors import CorruptDataError, MlDebuggerError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.store.page_file import KEY_BYTES, PageFile, Value
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.slice_file import SliceFile

_CHECKSUM_BYTES = 5
_HEADER_MARK = b"\x95"  # every header is a msgpack array of 5
_MAX_META_BYTES = 4096
_COUNTERS = ("calls", "rows", "discarded_rows")


@dataclass(eq=False)
class Salvage:
    """Common to segments and slices; `ml_debugger.uploading.slices.Origin` describes the rest.

    Attributes:
        problems: What is damaged.
        counters: ``calls``, ``rows`` and ``discarded_rows`` that it held, as far as known.
        damaged_keys: Calls whose header is there and unreadable.
        is_whole: Whether the list of its headers is complete.
    """

    rank: int
    epoch: int
    attempt: int
    sequence: int
    path: Path
    problems: list[str] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    damaged_keys: set[int] = field(default_factory=set)
    is_whole: bool = True

    def check_exists(self) -> None:
        """Raise NotFoundError if it is gone."""
        if not self.path.exists():
            raise NotFoundError(f"{self.path} is gone", "run it again, while nothing else changes the trace")


class SegmentSalvage(Salvage):
    """One LMDB segment."""

    def load(self) -> None:
        """Look through the file, and remember where values lie: 24 bytes a chunk and a header."""
        self._headers, self._chunks = _Places(), _Places()
        self._is_swept = False
        self._note_sealed()
        try:
            self._pages = PageFile(self.path / layout.DATA_FILE)
        except MlDebuggerError as error:
            self._lost(error.message)
            return
        with self._pages as pages:
            is_sound = self._walk(pages) and len(pages.problems) == 0
            self._headers.sort()
            # A gap is a header too, but how many there are is not counted.
            if not is_sound or len(self._headers) < self.counters.get("calls", 0):
                self._sweep(new_headers=True)
            self.problems += pages.problems
        self._chunks.sort()
        if not is_sound and not self.counters:
            self.is_whole = False

    def headers(self) -> Iterator[tuple[int, list[bytes]]]:
        """(key, sound values) by rising key; there may be several of a header that was rewritten."""
        if self._headers.is_empty:
            return
        for key in self._headers.distinct_keys():
            with self._pages:
                values = self._sound_values(key)
                if not values:
                    self._sweep(new_headers=False)
                    values = self._sound_values(key)
            if not values:
                self.damaged_keys.add(key)
            yield key, values

    def _sound_values(self, key: int) -> list[bytes]:
        found = []
        for position, length in self._headers.places(key):
            with contextlib.suppress(CorruptDataError):
                value = self._pages.read(position, length)
                if _is_sound(value):
                    found.append(value)
        return list(dict.fromkeys(found))

    @contextlib.contextmanager
    def opened(self) -> Iterator[SegmentSalvage]:
        """Itself, with its file open."""
        with self._pages:
            yield self

    def read(self, chunks: Sequence[tuple[int, int, int, int]], out: Any) -> None:
        """Copy chunks (key, offset in ``out``, bytes, crc32c) to ``out``.

        Raises:
            CorruptDataError: One is not there, or does not match its checksum.
        """
        target = memoryview(out).cast("B")
        for key, offset, length, crc in chunks:
            target[offset : offset + length] = self._chunk(key, length, crc)

    def _chunk(self, key: int, length: int, crc: int) -> bytes:
        if not length:
            return b""
        for is_swept in (False, True):
            if is_swept:  # an earlier state of its page may be left
                self._sweep(new_headers=False)
            for position, held in self._chunks.places(key):
                if held == length:
                    with contextlib.suppress(CorruptDataError):
                        data = self._pages.read(position, length)
                        if _core.crc32c(data) == crc:
                            return data
        raise CorruptDataError(f"chunk {key} of {self.path} is missing or damaged", "restore it from a copy")

    def _sweep(self, *, new_headers: bool) -> None:
        """Take in, once, what pages hold that no tree leads to; headers of other calls only if wanted."""
        if self._is_swept:
            return
        self._is_swept = True
        known = set(self._headers.distinct_keys())
        for value in self._pages.sweep():
            self._chunks.add(value)
            if (new_headers or int.from_bytes(value.key, "big") in known) and self._is_header(value):
                self._headers.add(value)
        self._headers.sort()
        self._chunks.sort()

    def _lost(self, problem: str) -> None:
        self.problems.append(problem)
        self.is_whole = False

    def _note_sealed(self) -> None:
        try:
            self._count(layout.read_json(self.path / layout.SEALED_FILE) or {})
        except MlDebuggerError as error:
            self.problems.append(error.message)

    def _count(self, counted: dict[Any, Any]) -> None:
        for name in _COUNTERS:
            said = counted.get(name)
            if type(said) is int and 0 <= said < 1 << 63:
                self.counters[name] = max(said, self.counters.get(name, 0))

    def _walk(self, pages: PageFile) -> bool:
        """Follow the trees as LMDB would; whether they are all there, and as full as they say."""
        if pages.root is None:
            return pages.is_readable  # nothing was committed
        named = {value.key: value for value in pages.walk(pages.root)}
        meta = named.get(b"meta")
        if meta is not None and meta.tree is None and meta.length_bytes <= _MAX_META_BYTES:
            with contextlib.suppress(CorruptDataError, ValueError, RecursionError, msgpack.UnpackException):
                found = msgpack.unpackb(pages.read(meta.position, meta.length_bytes))
                self._count(found if isinstance(found, dict) else {})
        is_sound = True
        for name, places in ((b"headers", self._headers), (b"chunks", self._chunks)):
            tree = named[name].tree if name in named else None
            if tree is None:
                pages.problems.append(f"the database {name.decode()} is not there")
                continue
            entries, root = tree
            count = 0
            for value in pages.walk(root) if entries else ():
                places.add(value)
                count += 1
            is_sound = is_sound and count == entries
        return is_sound

    def _is_header(self, value: Value) -> bool:
        with contextlib.suppress(CorruptDataError):
            return self._pages.read(value.position, 1) == _HEADER_MARK and _is_sound(
                self._pages.read(value.position, value.length_bytes)
            )
        return False


class SliceSalvage(Salvage):
    """One slice, which an upload has brought."""

    def load(self) -> None:
        """Read its directory."""
        name = layout.parse_slice_name(self.path.name)
        if name is not None:
            self.counters = {"rows": name.rows}
        try:
            with self.opened() as file:
                self._keys = file.keys
        except MlDebuggerError as error:
            self._keys = []
            self.problems.append(error.message)
            self.is_whole = False

    def headers(self) -> Iterator[tuple[int, list[bytes]]]:
        """(key, sound values) by rising key."""
        for key in self._keys:
            values = []
            try:
                with self.opened() as file:
                    values = [value for _, value in file.headers(key - 1 if key else None, 1)]
            except CorruptDataError as error:
                self.problems.append(error.message)
                self.damaged_keys.add(key)
            yield key, values

    @contextlib.contextmanager
    def opened(self) -> Iterator[SliceFile]:
        """The open slice."""
        file = SliceFile(self.path)
        try:
            yield file
        finally:
            file.close()


class _Places:
    """Where the values of a database lie, by key; several places for a key in the order they came."""

    def __init__(self) -> None:
        self._numbers = array("Q")
        self._sorted: Array = np.empty((0, 3), np.uint64)

    def __len__(self) -> int:
        return len(self._numbers) // 3

    @property
    def is_empty(self) -> bool:
        """Whether nothing was found."""
        return not self._numbers

    def add(self, value: Value) -> None:
        """Note a value; what has no key of 8 bytes is none of a segment's."""
        if len(value.key) == KEY_BYTES and value.tree is None:
            self._numbers.extend((int.from_bytes(value.key, "big"), value.position, value.length_bytes))

    def sort(self) -> None:
        """Make what was added so far be found."""
        numbers = np.array(self._numbers, np.uint64).reshape(-1, 3)
        self._sorted = numbers[np.argsort(numbers[:, 0], kind="stable")]

    def distinct_keys(self) -> list[int]:
        """All keys, rising."""
        found: list[int] = np.unique(self._sorted[:, 0]).tolist()
        return found

    def places(self, key: int) -> list[tuple[int, int]]:
        """(position, length) of the values of a key."""
        if key >> 64:
            return []
        keys = self._sorted[:, 0]
        first, last = (int(np.searchsorted(keys, np.uint64(key), side=side)) for side in ("left", "right"))
        return [(int(position), int(length)) for _, position, length in self._sorted[first:last]]


def _is_sound(value: bytes) -> bool:
    """Whether a header's checksum is right."""
    checksum = b"\xce" + _core.crc32c(value[:-_CHECKSUM_BYTES]).to_bytes(4, "big")
    return value[-_CHECKSUM_BYTES:] == checksum
