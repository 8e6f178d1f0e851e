"""`lmdb` and `msgpack` from Python, a row a sample: in the hook, and in a thread behind a queue."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from benchmarks.baselines.base import Baseline, Columns, ThreadedBaseline

MAP_BYTES = 64 << 30


class _Rows:
    """Rows by their number, packed one by one."""

    def __init__(self, folder: Any, *, sync: bool = False) -> None:
        import lmdb

        # Without a sync at a commit it does what durability="process" of a tracer does.
        self.environment = lmdb.open(str(folder / "rows"), map_size=MAP_BYTES, sync=sync)
        self.rows = 0
        self.meta: dict[str, tuple[str, tuple[int, ...]]] = {}

    def put(self, ids: list[str], columns: Columns) -> None:
        import msgpack

        arrays = {name: values.numpy() for name, values in columns.items()}
        self.meta = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
        with self.environment.begin(write=True) as transaction:
            for row, input_id in enumerate(ids):
                packed = msgpack.packb(
                    [input_id, *(array[row].tobytes() for array in arrays.values())], use_bin_type=True
                )
                transaction.put(self.rows.to_bytes(8, "big"), packed, append=True)
                self.rows += 1

    def read(self, folder: Any) -> dict[str, np.ndarray]:
        import lmdb
        import msgpack

        with lmdb.open(str(folder / "rows"), readonly=True) as environment, environment.begin() as reading:
            rows = [msgpack.unpackb(value) for _, value in reading.cursor()]
        found = {"input_id": np.array([row[0] for row in rows])}
        for number, (name, (dtype, shape)) in enumerate(self.meta.items(), 1):
            joined = b"".join(row[number] for row in rows)
            found[name] = np.frombuffer(joined, dtype).reshape(len(rows), *shape)
        return found


class LmdbInHook(Baseline):
    name = "lmdb + msgpack, in the hook"
    requires = ("lmdb", "msgpack")

    def open(self) -> None:
        self.rows = _Rows(self.folder)

    def save(self, ids: list[str], columns: Columns) -> None:
        self.rows.put(ids, columns)

    def close(self) -> None:
        super().close()
        self.rows.environment.close()

    def read(self) -> dict[str, np.ndarray]:
        return self.rows.read(self.folder)


class LmdbInThread(ThreadedBaseline):
    name = "lmdb + msgpack, in a thread"
    requires = ("lmdb", "msgpack")
    sync: ClassVar[bool] = False

    def begin(self) -> None:
        self.rows = _Rows(self.folder, sync=self.sync)

    def store(self, ids: list[str], columns: Columns) -> None:
        self.rows.put(ids, columns)

    def end(self) -> None:
        self.rows.environment.close()

    def read(self) -> dict[str, np.ndarray]:
        return self.rows.read(self.folder)


class DurableLmdbInThread(LmdbInThread):
    """Each step is on the disk when the queue is done with it."""

    name = "lmdb + msgpack, in a thread, synced"
    survives = "power cut, from the queue on"
    sync = True
