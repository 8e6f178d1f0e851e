"""Sending committed data to an endpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ml_debugger.errors import UploadError

__all__ = ["UploadReport", "require_endpoint"]


@dataclass(frozen=True)
class UploadReport:
    """What an upload did.

    Attributes:
        segments_sent: Segments that were sent.
        segments_skipped: Segments that the endpoint held already.
        bytes_sent: Bytes that travelled.
        seconds: Time it took.
    """

    segments_sent: int
    segments_skipped: int
    bytes_sent: int
    seconds: float


def require_endpoint(endpoint: str | None) -> str:
    """Return ``endpoint``, or raise an `UploadError` that says what to set."""
    if not endpoint:
        raise UploadError("there is no endpoint to upload to", "pass api_endpoint or set MLD_API_ENDPOINT")
    return endpoint
