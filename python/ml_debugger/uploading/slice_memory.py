"""Memory that slices are cut into, one after the other: taken from the system once, not for each slice.

New memory costs a fault and zeroes for each page, for a slice of 32 MiB about as much as hashing half of it.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
from typing import IO, Any, cast

import numpy as np

from ml_debugger.trace.dtypes import Array

_GROWTH_BYTES = 2 << 20  # a huge page


class SliceMemory:
    """Gives out files in memory, and takes their memory back when they are closed.

    Any thread may close a file, one at a time may ask for one.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._is_closed = False

    def file(self, size_bytes: int) -> IO[bytes]:
        """An empty `MemoryFile` that holds ``size_bytes`` without growing."""
        return cast(IO[bytes], MemoryFile(self, size_bytes))

    def close(self) -> None:
        """Give the memory back to the system; that of open files when they are closed."""
        self._is_closed = True
        while self._free:
            _close(self._free.pop())

    def take(self, size_bytes: int) -> mmap.mmap:
        """Memory of at least that size; what is free and too small for it goes back to the system."""
        while self._free:
            found = self._free.pop()
            if len(found) >= size_bytes:
                return found
            _close(found)
        rounded = -(-max(size_bytes, 1) // _GROWTH_BYTES) * _GROWTH_BYTES
        memory = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def give(self, memory: mmap.mmap) -> None:
        """Take memory back."""
        if self._is_closed:
            _close(memory)
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

    def reserve(self, size_bytes: int) -> Array:
        """The memory, uint8 (size_bytes,), that the next `write` fills; given to it, nothing is copied."""
        end = self._position + size_bytes
        memory = self._open() if end <= len(self._open()) else self._grow(end)
        return np.frombuffer(memory, np.uint8, size_bytes, self._position)

    def write(self, data: Any) -> int:
        """Write all of ``data`` at the position."""
        if not len(data):
            return 0
        source = np.frombuffer(data, np.uint8)
        length = source.size
        target = self.reserve(length)
        if self._position > self._length:  # a hole reads as zeroes, not as the slice before
            np.frombuffer(self._open(), np.uint8)[self._length : self._position] = 0
        if source.ctypes.data != target.ctypes.data:
            target[:] = source
        end = self._position + length
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


def _close(memory: mmap.mmap) -> None:
    """Close memory; where somebody still looks at it, as an error's frames do, it goes with the last look."""
    with contextlib.suppress(BufferError):
        memory.close()
