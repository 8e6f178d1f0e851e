"""Lance: a fragment a step appended to a dataset, in a thread: each append writes a manifest."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.baselines.base import Columns, ThreadedBaseline


class LanceAppend(ThreadedBaseline):
    name = "Lance, in a thread"
    requires = ("lance", "pyarrow")

    def begin(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def store(self, ids: list[str], columns: Columns) -> None:
        import lance
        import pyarrow as pa

        arrays: dict[str, Any] = {"input_id": pa.array(ids)}
        for name, values in columns.items():
            array = values.numpy()
            flat = pa.array(array.reshape(-1))
            width = int(np.prod(array.shape[1:]))
            arrays[name] = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
        mode = "append" if self.shapes else "create"
        lance.write_dataset(pa.table(arrays), self.folder / "rows.lance", mode=mode)
        self.shapes = {name: tuple(values.shape[1:]) for name, values in columns.items()}

    def read(self) -> dict[str, np.ndarray]:
        import lance

        table = lance.dataset(self.folder / "rows.lance").to_table()
        found = {"input_id": np.array(table["input_id"].to_pylist())}
        for name, shape in self.shapes.items():
            column = table[name].combine_chunks()
            flat = column.flatten() if shape else column
            found[name] = flat.to_numpy().reshape(table.num_rows, *shape)
        return found
