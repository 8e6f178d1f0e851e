"""MosaicML streaming: `MDSWriter` in a thread, a sample a row, without compression."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.baselines.base import Columns, ThreadedBaseline, joined


class MosaicStreaming(ThreadedBaseline):
    name = "MosaicML streaming, in a thread"
    requires = ("streaming",)

    def begin(self) -> None:
        self.writer: Any = None

    def store(self, ids: list[str], columns: Columns) -> None:
        from streaming import MDSWriter

        arrays = {name: values.numpy() for name, values in columns.items()}
        if self.writer is None:
            kinds = {"input_id": "str"}
            for name, array in arrays.items():
                shape = ",".join(map(str, array.shape[1:]))
                kinds[name] = f"ndarray:{array.dtype.name}:{shape}" if shape else array.dtype.name
            self.writer = MDSWriter(out=str(self.folder / "rows"), columns=kinds)
        for row, input_id in enumerate(ids):
            self.writer.write({"input_id": input_id, **{name: array[row] for name, array in arrays.items()}})

    def end(self) -> None:
        if self.writer is not None:
            self.writer.finish()

    def read(self) -> dict[str, np.ndarray]:
        from streaming import LocalDataset

        rows = LocalDataset(str(self.folder / "rows"))
        return joined([{name: [value] for name, value in row.items()} for row in rows])
