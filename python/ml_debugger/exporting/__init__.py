"""Writing traces into files that plain tools open."""

from ml_debugger.exporting.export import export_trace

__all__ = ["export_trace"]
