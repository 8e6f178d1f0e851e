"""How much memory this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["usable_memory_bytes"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")
# cgroup v1 writes "no limit" as a huge page-rounded number.
_NO_LIMIT = 1 << 60


def usable_memory_bytes() -> int | None:
    """Smallest of physical memory, our cgroups' limits and ``RLIMIT_AS``; None if nothing is known."""
    limits = [_physical_bytes(), _address_space_bytes(), *_cgroup_limits()]
    known = [limit for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    return min(known, default=None)


def _physical_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _address_space_bytes() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroup_limits() -> list[int | None]:
    """Limits of our cgroup and of all its ancestors: each of them binds."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            root, name = _CGROUP_ROOT, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUP_ROOT / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's, which is not visible here: then only the root's file is
        # there.
        parts = Path(path.lstrip("/")).parts
        limits += [_read_limit(root.joinpath(*parts[:depth], name)) for depth in range(len(parts) + 1)]
    return limits


def _read_limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdigit() else None
