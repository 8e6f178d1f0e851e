"""Sending committed data to an endpoint: `docs/upload.md` has the picture.

Light to import: what talks to networks is imported by the process that uploads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ml_debugger.uploading.report import UploadReport

if TYPE_CHECKING:
    from ml_debugger.uploading.upload import upload_trace

__all__ = ["UploadReport", "upload_trace"]


def __getattr__(name: str) -> Any:
    if name == "upload_trace":
        from ml_debugger.uploading.upload import upload_trace

        return upload_trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
