"""A Parquet writer in a thread: a row group a step, tensors as fixed-size lists."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.baselines.base import Columns, ThreadedBaseline


class ParquetInThread(ThreadedBaseline):
    name = "Parquet, in a thread"
    requires = ("pyarrow",)

    def begin(self) -> None:
        self.writer: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}

    def store(self, ids: list[str], columns: Columns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays: dict[str, Any] = {"input_id": pa.array(ids)}
        for name, values in columns.items():
            array = values.numpy()
            self.shapes[name] = array.shape[1:]
            flat = pa.array(array.reshape(-1))
            width = int(np.prod(array.shape[1:]))
            arrays[name] = flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
        table = pa.table(arrays)
        if self.writer is None:
            path = self.folder / "rows.parquet"
            self.writer = pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False)
        self.writer.write_table(table)

    def end(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def read(self) -> dict[str, np.ndarray]:
        import pyarrow.parquet as pq

        table = pq.read_table(self.folder / "rows.parquet")
        found = {"input_id": np.array(table["input_id"].to_pylist())}
        for name, shape in self.shapes.items():
            column = table[name].combine_chunks()
            flat = column.flatten() if shape else column
            found[name] = flat.to_numpy().reshape(table.num_rows, *shape)
        return found
