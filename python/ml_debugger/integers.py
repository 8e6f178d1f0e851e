"""What counts as an int where users give one."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an int of Python or numpy. A bool is none, and a time difference is none either."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))
