"""Zarr: an array a column on a local store, grown by each step, a chunk a step, without compression."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.baselines.base import Baseline, Columns


class ZarrAppend(Baseline):
    name = "Zarr"
    requires = ("zarr",)

    def open(self) -> None:
        import zarr

        self.group = zarr.open_group(self.folder / "rows.zarr", mode="w")
        self.arrays: dict[str, Any] = {}

    def save(self, ids: list[str], columns: Columns) -> None:
        # Its specification has no text of a fixed width: as bytes, as wide in every step.
        self._append("input_id", np.array(ids, "S").view(np.uint8).reshape(len(ids), -1))
        for name, values in columns.items():
            self._append(name, values.numpy())

    def _append(self, name: str, values: np.ndarray[Any, Any]) -> None:
        if name not in self.arrays:
            array = self.group.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=values.shape, compressors=None
            )
            array[:] = values
            self.arrays[name] = array
            return
        self.arrays[name].append(values)

    def read(self) -> dict[str, np.ndarray]:
        import zarr

        group = zarr.open_group(self.folder / "rows.zarr", mode="r")
        columns = {name: array[:] for name, array in group.arrays()}
        ids = columns["input_id"]
        return {**columns, "input_id": ids.view(f"S{ids.shape[1]}").reshape(-1).astype("U")}
