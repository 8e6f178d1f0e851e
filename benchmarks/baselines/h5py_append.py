"""`h5py`: one file, a dataset a column that grows by each step."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.baselines.base import Baseline, Columns


class H5pyAppend(Baseline):
    name = "h5py"
    requires = ("h5py",)
    survives = "nothing"  # a file that was not closed may not open again

    def open(self) -> None:
        import h5py

        self.file = h5py.File(self.folder / "rows.h5", "w")

    def save(self, ids: list[str], columns: Columns) -> None:
        self._append("input_id", np.array(ids, "S"))
        for name, values in columns.items():
            self._append(name, values.numpy())

    def _append(self, name: str, values: np.ndarray[Any, Any]) -> None:
        if name not in self.file:
            shape = (None, *values.shape[1:])
            self.file.create_dataset(name, data=values, maxshape=shape, chunks=values.shape)
            return
        dataset = self.file[name]
        rows = len(dataset)
        dataset.resize(rows + len(values), axis=0)
        dataset[rows:] = values

    def drain(self) -> None:
        if self.file:
            self.file.flush()

    def close(self) -> None:
        super().close()
        self.file.close()

    def read(self) -> dict[str, np.ndarray]:
        import h5py

        with h5py.File(self.folder / "rows.h5") as file:
            columns = {name: dataset[:] for name, dataset in file.items()}
        return {**columns, "input_id": columns["input_id"].astype("U")}
