"""Counters of a tracer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["TracerStats"]


@dataclass(frozen=True)
class TracerStats:
    """What happened to the rows of one tracer; a row is one sample (its ground truth is not counted again).

    ``submitted == committed + discarded + failed + in_flight`` holds for rows and for bytes; each figure is
    counted at its own place, none is derived from the others. Rows left out on purpose (``every_n_calls``,
    ``sample_fraction``) are in none.

    Attributes:
        rows_submitted: Rows handed over by calls that returned.
        rows_committed: Rows that are on disk, as safe as ``durability`` says.
        rows_discarded: Rows lost to a full ring (``overflow="discard"``), to a stall, or with an epoch
            that was dropped while their call was running.
        rows_failed: Rows lost to a storage that failed for good.
        rows_in_flight: Rows on their way; a kill -9 now would cost at most these.
        bytes_submitted: Payload bytes, likewise.
        bytes_committed: Payload bytes, likewise.
        bytes_discarded: Payload bytes, likewise.
        bytes_failed: Payload bytes, likewise.
        bytes_in_flight: Payload bytes, likewise.
        discarded_by_cause: Rows by cause; adds up to ``rows_discarded``.
        stalls: How often a hook had to wait for room in the ring.
        stall_seconds: How long, in all.
        ring_high_water_bytes: Most bytes that the ring has held.
        commits: Group commits.
        write_throughput_bytes_per_s: Payload bytes committed a second of writing.
    """

    rows_submitted: int = 0
    rows_committed: int = 0
    rows_discarded: int = 0
    rows_failed: int = 0
    rows_in_flight: int = 0
    bytes_submitted: int = 0
    bytes_committed: int = 0
    bytes_discarded: int = 0
    bytes_failed: int = 0
    bytes_in_flight: int = 0
    discarded_by_cause: Mapping[str, int] = field(default_factory=dict, hash=False)
    stalls: int = 0
    stall_seconds: float = 0.0
    ring_high_water_bytes: int = 0
    commits: int = 0
    write_throughput_bytes_per_s: float = 0.0

    @classmethod
    def from_counters(cls, counters: Mapping[str, Any]) -> TracerStats:
        """Build from the core's counters, by name; counters that are no field are left out."""
        known = {entry.name: counters[entry.name] for entry in fields(cls) if entry.name in counters}
        causes = known.get("discarded_by_cause", {})
        known["discarded_by_cause"] = {cause: rows for cause, rows in causes.items() if rows}
        return cls(**known)
