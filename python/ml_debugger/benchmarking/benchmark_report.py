"""`BenchmarkReport`: the figures of a run, the part that limits, and advice."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BenchmarkReport"]

# Below this share of the part before it, a part is what limits.
_KEEPS_UP = 0.8
_MUCH_FASTER = 1.3
_GROUPS_IN_RING = 4


@dataclass(frozen=True)
class BenchmarkReport:
    """What a short benchmark has found on this machine. Rates are bytes a second, 0 rows were lost.

    Attributes:
        data_dir: Where it wrote.
        bytes: Captured in each run.
        ring_bytes: Of the ring that was used.
        commit_bytes: Of a group, likewise.
        hook_us: Time that a hook on a small tensor (256 bytes) adds to its layer.
        call_us: Time that a call of one layer and one sample takes.
        copy_bytes_per_s: One copy between warm buffers.
        hook_bytes_per_s: Large tensors into the ring, while there is room.
        process_bytes_per_s: Captured and committed with ``durability="process"``.
        power_bytes_per_s: The same with ``durability="power"``.
        disk_bytes_per_s: A bare write of the same bytes, made durable after each group.
        flush_ms: Until one small call is committed with ``durability="power"``, median.
        stalls: How often hooks waited for room in the ring, with ``"power"``.
        rows_committed: Rows of all runs; as many were submitted, and those looked at read back equal.
    """

    data_dir: str
    bytes: int
    ring_bytes: int
    commit_bytes: int
    hook_us: float
    call_us: float
    copy_bytes_per_s: float
    hook_bytes_per_s: float
    process_bytes_per_s: float
    power_bytes_per_s: float
    disk_bytes_per_s: float
    flush_ms: float
    stalls: int
    rows_committed: int

    @property
    def limit(self) -> Literal["hook", "ring", "disk"]:
        """The part that limits steady recording with ``durability="power"``."""
        if self.power_bytes_per_s >= _KEEPS_UP * self.hook_bytes_per_s:
            return "hook"
        # The disk had more to give: the ring does not hold enough groups to keep it busy.
        is_disk_idle = self.power_bytes_per_s < _KEEPS_UP * self.disk_bytes_per_s
        is_ring_small = self.ring_bytes < _GROUPS_IN_RING * self.commit_bytes
        return "ring" if is_disk_idle and is_ring_small else "disk"

    @property
    def burst_bytes(self) -> int:
        """What hooks can hand over at once without a wait: the ring less the group that is being written."""
        return max(0, self.ring_bytes - self.commit_bytes)

    @property
    def advice(self) -> list[str]:
        """What to set, the most useful first."""
        steady = _rate(self.power_bytes_per_s)
        lines = [f"a training that captures up to {steady} on average is not slowed down by the storage"]
        if self.limit == "ring":
            wanted = _GROUPS_IN_RING * self.commit_bytes
            lines.append(
                f"set TracerConfig.ring_bytes to {wanted} ({wanted >> 20} MiB) or more, or commit_bytes to "
                f"{max(1, self.ring_bytes // _GROUPS_IN_RING)}: the ring holds less than "
                f"{_GROUPS_IN_RING} groups, so the disk waits for the hooks"
            )
        if self.limit == "disk":
            if self.process_bytes_per_s >= _MUCH_FASTER * self.power_bytes_per_s:
                lines.append(
                    f'durability="process" reaches {_rate(self.process_bytes_per_s)}: a kill loses nothing '
                    "more, a power cut at most the open segment"
                )
            lines.append("a data_dir on a faster disk raises the rate")
        if self.limit == "hook":
            lines.append("the disk keeps up with the hooks; more speed needs faster memory")
        lines.append(
            f"a burst of {self.burst_bytes >> 20} MiB fits into the ring; raise TracerConfig.ring_bytes for "
            "larger ones"
        )
        lines.append("to capture less: capture_dtype, reduce, sample_fraction, every_n_calls")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Every figure, ``limit`` and ``advice``, ready for JSON."""
        return {**dataclasses.asdict(self), "limit": self.limit, "advice": self.advice}

    def __str__(self) -> str:
        figures = [
            ("hook on a small tensor", f"{self.hook_us:.1f} us"),
            ("call of one sample", f"{self.call_us:.0f} us"),
            ("one copy in memory", _rate(self.copy_bytes_per_s)),
            ("hook, into the ring", _rate(self.hook_bytes_per_s)),
            ('committed, durability="process"', _rate(self.process_bytes_per_s)),
            ('committed, durability="power"', _rate(self.power_bytes_per_s)),
            ("bare write and sync to the disk", _rate(self.disk_bytes_per_s)),
            ("flush of a small call", f"{self.flush_ms:.1f} ms"),
            ("waits for room in the ring", str(self.stalls)),
        ]
        lines = [f"{name:<34}{figure:>12}" for name, figure in figures]
        return "\n".join([*lines, f"limit: {self.limit}", *(f"- {line}" for line in self.advice)])


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e9 else f"{bytes_per_s / 1e6:.0f} MB/s"
