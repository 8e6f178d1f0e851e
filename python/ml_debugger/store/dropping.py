"""Deleting rows of a trace that nobody records to, from any process."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ml_debugger import _core
from ml_debugger.store import layout, staging

_TIMEOUT_S = 300.0


def drop_rows(trace_dir: Path, n_epoch: int | None) -> dict[str, int]:
    """Delete one epoch of all ranks, or (None) every row of the trace; its tables stay, empty.

    Args:
        trace_dir: Directory of the (model, version).
        n_epoch: The epoch; -1: the rows without one; None: all.

    Returns:
        Deleted rows: ``{"extracted_feature": N, "ground_truth": M}``.

    Raises:
        NotFoundError: No trace there.
        TraceInUseError: A process records to one of its ranks; nothing was deleted.
        StorageError: The directory cannot be changed.
    """
    layout.read_version(trace_dir)
    dropped = {"extracted_feature": 0, "ground_truth": 0}
    with contextlib.ExitStack() as held:
        stores = []
        # All locks first, so that a trace in use is left whole.
        for rank, rank_dir in layout.rank_directories(trace_dir):
            store = _core.Store(str(rank_dir), rank=rank, durability="power")
            held.callback(store.close)
            staging.adopt(rank_dir)
            stores.append((store, rank_dir))
        for store, rank_dir in stores:
            epochs = [partition.epoch for partition in layout.partitions(rank_dir)]
            for epoch in epochs if n_epoch is None else [n_epoch]:
                rows, labels = store.drop_epoch(epoch, attempt=None, timeout_s=_TIMEOUT_S)
                dropped["extracted_feature"] += rows
                dropped["ground_truth"] += labels
            if n_epoch is None:
                store.drop_all(timeout_s=_TIMEOUT_S)
    return dropped
