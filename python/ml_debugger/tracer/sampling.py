"""Which samples are recorded: a fraction, the same one in every epoch, on every rank and machine."""

from __future__ import annotations

import hashlib

_HASH_BYTES = 8


class SampleFilter:
    """Keeps a sample when a hash of its id falls below a threshold; knows nothing of calls or batches.

    Args:
        fraction: Share of ids to keep, in (0, 1].
    """

    def __init__(self, fraction: float) -> None:
        self._threshold = int(fraction * (1 << (8 * _HASH_BYTES)))

    def keeps(self, input_id: str) -> bool:
        """Whether the sample with this id is recorded."""
        digest = hashlib.blake2b(input_id.encode("utf-8"), digest_size=_HASH_BYTES).digest()
        return int.from_bytes(digest, "big") < self._threshold

    def rows(self, input_ids: list[str]) -> list[int]:
        """Positions of the kept samples, rising."""
        return [row for row, input_id in enumerate(input_ids) if self.keeps(input_id)]
