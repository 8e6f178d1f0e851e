"""Reading recorded traces: `open_trace` for the store on disk, `load_export` for an exported ZIP.

Light to import: a tracer takes small things from here, and who only trains does not wait for the readers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_debugger.trace.export_reader import load_export
    from ml_debugger.trace.trace import Trace, open_trace

__all__ = ["Trace", "load_export", "open_trace"]


def __getattr__(name: str) -> Any:
    if name == "load_export":
        from ml_debugger.trace.export_reader import load_export

        return load_export
    if name in ("Trace", "open_trace"):
        from ml_debugger.trace import trace

        return getattr(trace, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
