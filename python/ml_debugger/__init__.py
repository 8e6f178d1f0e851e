"""Record what a classifier computes for every sample while it is trained, at almost no cost to the training.

The tracer is `ml_debugger.training.ClassificationTracer`; traces are read with `open_trace` and
`load_export`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from ml_debugger import _core as _core
except ImportError as error:
    raise ImportError(
        f"ml_debugger._core, the compiled part of ml-debugger, cannot be loaded ({error}). Install the "
        "package: pip install ml-debugger, or pip install . in a checkout, which needs a C++ compiler."
    ) from error

from ml_debugger import errors
from ml_debugger.config import TracerConfig
from ml_debugger.stats import TracerStats
from ml_debugger.uploading import UploadReport

if TYPE_CHECKING:
    from ml_debugger.trace import load_export, open_trace

__version__ = "0.1.0"

__all__ = [
    "TracerConfig",
    "TracerStats",
    "UploadReport",
    "__version__",
    "errors",
    "load_export",
    "open_trace",
]

_READERS = ("load_export", "open_trace")


def __getattr__(name: str) -> Any:
    # Reading needs numpy and msgpack; who only trains should not wait for them.
    if name in _READERS:
        from ml_debugger import trace

        return getattr(trace, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
