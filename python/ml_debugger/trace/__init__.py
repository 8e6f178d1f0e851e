"""Reading recorded traces: `open_trace` for the store on disk, `load_export` for an exported ZIP."""

from ml_debugger.trace.export_reader import load_export
from ml_debugger.trace.trace import Trace, open_trace

__all__ = ["Trace", "load_export", "open_trace"]
