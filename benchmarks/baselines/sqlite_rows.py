"""SQLite with a writer in a thread: a row a sample, a transaction a batch, tensors as blobs."""

from __future__ import annotations

import sqlite3

import numpy as np

from benchmarks.baselines.base import Columns, ThreadedBaseline


class SqliteRows(ThreadedBaseline):
    name = "SQLite, rows, in a thread"

    def begin(self) -> None:
        self.database = sqlite3.connect(self.folder / "rows.sqlite", check_same_thread=False)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=NORMAL")
        self.meta: dict[str, tuple[str, tuple[int, ...]]] = {}

    def store(self, ids: list[str], columns: Columns) -> None:
        arrays = {name: values.numpy() for name, values in columns.items()}
        if not self.meta:
            self.meta = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
            named = ", ".join(f'"{name}" BLOB' for name in arrays)
            self.database.execute(f"CREATE TABLE rows (input_id TEXT, {named})")
        marks = ", ".join("?" * (len(arrays) + 1))
        rows = (
            (input_id, *(array[row].tobytes() for array in arrays.values()))
            for row, input_id in enumerate(ids)
        )
        with self.database:
            self.database.executemany(f"INSERT INTO rows VALUES ({marks})", rows)

    def end(self) -> None:
        self.database.close()

    def read(self) -> dict[str, np.ndarray]:
        database = sqlite3.connect(self.folder / "rows.sqlite")
        rows = database.execute("SELECT * FROM rows ORDER BY rowid").fetchall()
        database.close()
        found = {"input_id": np.array([row[0] for row in rows])}
        for number, (name, (dtype, shape)) in enumerate(self.meta.items(), 1):
            joined = b"".join(row[number] for row in rows)
            found[name] = np.frombuffer(joined, dtype).reshape(len(rows), *shape)
        return found
