"""The C library's allocator, told to be steady."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on; False where there is no `mallopt`.

    Left alone, glibc gives large tensors back to the kernel in one copy of a network and not in another, by
    what lies where in its heap; each such step then faults its memory in anew. That made the same step of
    15 ms one of 22 ms, measured, and is no difference between the arms.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and mallopt(_M_MMAP_MAX, 0))
