"""Choosing the newest of the rows that repeat a sample (``dedupe=True``)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MAX_UNSPLIT_ROWS = 1 << 20
_BUCKETS = 16

Mask = npt.NDArray[np.bool_]


class NewestRows:
    """Marks the last row of each (dataset_type, input_id) of one epoch.

    Rows are given in row order, in which, within an epoch, later means newer. A row costs 16 bytes (two
    SipHashes of 64 bits, by which rows are compared: n rows have two different samples taken for one with a
    probability of n^2 / 2^129) and one byte of the result.
    """

    def __init__(self, rows: int) -> None:
        """``rows`` is the number of rows that will be added."""
        self._low = np.empty(rows, np.int64)
        self._high = np.empty(rows, np.int64)
        self._added = 0
        self._dataset_types: dict[str, int] = {}

    def add(self, dataset_type: str, input_ids: list[str]) -> None:
        """Add the next rows, all of one dataset type."""
        number = self._dataset_types.setdefault(dataset_type, len(self._dataset_types))
        rows = len(input_ids)
        start, self._added = self._added, self._added + rows
        for hashes, prefix in ((self._low, f"{number}\0a"), (self._high, f"{number}\0b")):
            hashes[start : self._added] = np.fromiter(
                map(hash, map(prefix.__add__, input_ids)), np.int64, rows
            )

    def mask(self) -> Mask:
        """True for every row that no later row repeats."""
        keep = np.zeros(self._added, np.bool_)
        low, high = self._low[: self._added], self._high[: self._added]
        buckets = _BUCKETS if self._added > _MAX_UNSPLIT_ROWS else 1
        bucket_of_row = low.view(np.uint8)[::8] & np.uint8(buckets - 1)
        # Bucket by bucket, so that the scratch memory of sorting stays small beside the hashes.
        for bucket in range(buckets):
            rows = np.flatnonzero(bucket_of_row == bucket)
            # Ties keep their order (lexsort is stable), so the last of equal neighbours is the newest.
            order = np.lexsort((low[rows], high[rows]))
            rows = rows[order]
            last = np.ones(rows.size, np.bool_)
            last[:-1] = (low[rows[1:]] != low[rows[:-1]]) | (high[rows[1:]] != high[rows[:-1]])
            keep[rows[last]] = True
        return keep
