"""What an upload did."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["UploadReport"]


@dataclass(frozen=True)
class UploadReport:
    """What an upload did.

    Attributes:
        segments_sent: Segments that were sent.
        segments_skipped: Segments that the endpoint held already.
        bytes_sent: Bytes of segments that travelled, those that had to travel again included.
        seconds: Time it took.
    """

    segments_sent: int
    segments_skipped: int
    bytes_sent: int
    seconds: float
