"""Whether somebody looks."""

from __future__ import annotations

import sys


def stderr_is_terminal() -> bool:
    """Whether progress on standard error reaches a terminal; services run with none, or with a closed one."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False
