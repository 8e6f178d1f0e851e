"""Memory that slices are cut into, one after the other: taken from the system once, not for each slice.

New memory costs a fault and zeroes for each page, for a slice of 32 MiB about as much as hashing half of it.
"""

from __future__ import annotations

import io
import mmap
import os
from typing import IO, Any, cast

import numpy as np

from ml_debugger.trace.dtypes import Array

_GROWTH_BYTES = 1 << 20


class SliceMemory:
    """Gives out files in memory, and takes their memory back when they are closed.

    Any thread may close a file, one at a time may ask for one.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._scratch = np.empty(0, np.uint8)
        self._is_closed = False

    def file(self, size_bytes: int) -> IO[bytes]:
        """An empty `MemoryFile` that holds ``size_bytes`` without growing."""
        return cast(IO[bytes], MemoryFile(self, size_bytes))

    def scratch(self, size_bytes: int) -> Array:
        """uint8 (size_bytes,), the same memory each time; holds anything."""
        if self._scratch.size < size_bytes:
            self._scratch = np.empty(size_bytes, np.uint8)
        return self._scratch[:size_bytes]

    def close(self) -> None:
        """Give the memory back to the system; that of open files when they are closed."""
        self._is_closed = True
        while self._free:
            self._free.pop().close()

    def take(self, size_bytes: int) -> mmap.mmap:
        """Memory of at least that size."""
        for number, found in enumerate(self._free):
            if len(found) >= size_bytes:
                return self._free.pop(number)
        rounded = -(-max(size_bytes, 1) // _GROWTH_BYTES) * _GROWTH_BYTES
        return mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def give(self, memory: mmap.mmap) -> None:
        """Take memory back."""
        if self._is_closed:
            memory.close()
        else:
            self._free.append(memory)


class MemoryFile(io.RawIOBase):
    """A file in memory of a `SliceMemory`: binary, for reading and writing, seekable."""

    def __init__(self, owner: SliceMemory, size_bytes: int) -> None:
        self._owner = owner
        self._memory: mmap.mmap | None = owner.take(size_bytes)
        self._length = 0
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def write(self, data: Any) -> int:
        """Write all of ``data`` at the position."""
        memory = self._open()
        with memoryview(data).cast("B") as view:
            length = len(view)
            end = self._position + length
            if end > len(memory):
                memory = self._grow(end)
            memory[self._position : end] = view
        self._position = end
        self._length = max(self._length, end)
        return length

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes from the position, all of the rest if it is negative."""
        end = self._length if size < 0 else min(self._length, self._position + size)
        data = self._open()[self._position : end]
        self._position += len(data)
        return data

    def view(self) -> memoryview:
        """The content; to be released before the file is closed."""
        return memoryview(self._open())[: self._length]

    def close(self) -> None:
        """Give the memory back."""
        if self._memory is not None:
            self._owner.give(self._memory)
            self._memory = None
        super().close()

    def _open(self) -> mmap.mmap:
        if self._memory is None:
            raise ValueError("I/O operation on closed file.")
        return self._memory

    def _grow(self, size_bytes: int) -> mmap.mmap:
        before = self._open()
        memory = self._owner.take(size_bytes + _GROWTH_BYTES)
        memory[: self._length] = before[: self._length]
        self._owner.give(before)
        self._memory = memory
        return memory
