"""Memory that slices are cut into: files that behave as files do, and memory that is used again."""

from __future__ import annotations

import io
import os
import random
import zipfile

import numpy as np
import pytest

from ml_debugger.uploading.slice_memory import MemoryFile, SliceMemory


def test_a_file_in_memory_is_a_file_like_any_other() -> None:
    generator = random.Random(4)
    used = SliceMemory()
    with used.file(4 << 20) as before:
        before.write(b"x" * (4 << 20))
    ours, other = MemoryFile(used, 10), io.BytesIO()
    assert ours.write(b"") == 0
    for _ in range(400):
        match generator.randrange(3):
            case 0:
                data = generator.randbytes(generator.randrange(20_000))
                assert ours.write(data) == other.write(data)
            case 1:
                place = generator.randrange(len(other.getvalue()) + 3000), os.SEEK_SET
                assert ours.seek(*place) == other.seek(*place)
            case _:
                size = generator.randrange(-1, 5000)
                assert ours.read(size) == other.read(size)
        assert ours.tell() == other.tell()
    assert ours.seek(0, os.SEEK_END) == other.seek(0, os.SEEK_END)
    with ours.view() as view:
        assert view == other.getvalue()
    ours.close()
    ours.close()
    with pytest.raises(ValueError, match="closed"):
        ours.read()


def test_what_was_reserved_is_written_without_a_copy_also_into_a_zip() -> None:
    file = MemoryFile(SliceMemory(), 1 << 20)
    with zipfile.ZipFile(file, "w") as archive, archive.open("a", "w") as member:  # type: ignore[call-overload]
        block = file.reserve(1000)
        block[:] = np.arange(1000) % 251
        place = block.ctypes.data
        member.write(block.data)
        assert file.reserve(1).ctypes.data == place + 1000
        del block
    assert zipfile.ZipFile(io.BytesIO(bytes(file.view()))).read("a") == bytes(i % 251 for i in range(1000))
    file.close()


def test_memory_is_used_again_while_it_fits_and_given_back_at_the_end() -> None:
    memory = SliceMemory()
    first = memory.file(3 << 20)
    first.write(b"one")
    first.close()
    second, third = memory.file(2 << 20), memory.file(1)
    assert second.read() == b"" and not memory._free
    second.close()
    large = memory.file(64 << 20)
    assert not memory._free, "what was too small is not kept beside it"
    memory.close()
    third.write(b"it goes on")
    third.close()
    large.close()
    assert not memory._free
