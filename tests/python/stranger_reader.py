"""A reader that somebody wrote from `docs/record_format.md`, with stock `lmdb` and `msgpack` only.

Usage: python stranger_reader.py TRACE_DIRECTORY > rows.pickle
"""

import io
import math
import pickle
import struct
import sys
from pathlib import Path

import lmdb
import msgpack


def samples(column, captures, rows):
    data, count = captures[column["capture"]], 1 if column.get("broadcast") else rows
    dtype, shape, stream = column.get("dtype"), column.get("shape"), io.BytesIO(data)
    if dtype is None:
        values = msgpack.unpackb(data)
    elif shape is not None:
        values = [(dtype, shape[1:], stream.read(len(data) // count)) for _ in range(count)]
    else:
        flat = [number for (number,) in struct.iter_unpack("<q", captures[column["shapes"]])]
        ndim = len(flat) // count
        shapes = [[n for n in flat[i * ndim : (i + 1) * ndim] if n != -1] for i in range(count)]
        item = len(data) // max(1, sum(map(math.prod, shapes)))
        values = [(dtype, shape, stream.read(item * math.prod(shape))) for shape in shapes]
    if dtype and column["type"] == "str":
        values = [str(int.from_bytes(value, "little", signed=dtype[0] == "i")) for _, _, value in values]
    return values * (rows // count)


def read(trace):
    envs, tables = {}, {"extracted_feature": {}, "ground_truth": {}}

    def get(path, database):
        if path not in envs:
            is_sealed = (path / "sealed.json").exists()
            envs[path] = lmdb.open(str(path), readonly=True, max_dbs=2, lock=not is_sealed)
        with envs[path].begin(db=envs[path].open_db(database, create=False)) as txn:
            return {int.from_bytes(key, "big"): value for key, value in txn.cursor()}

    for path in sorted(Path(trace).glob("rank-*/epoch-*/a*-s*")):
        for value in get(path, b"headers").values():
            kind, core, description, inline, _ = msgpack.unpackb(value)
            if kind == 1:
                continue
            captures = {}
            for capture, sequence, key, length, _ in core["chunks"]:
                holder = path.with_name(f"a{core['attempt']:05d}-s{sequence:05d}")
                piece = inline[key : key + length] if sequence == -1 else get(holder, b"chunks")[key]
                captures[capture] = captures.get(capture, b"") + piece
            for column in description["columns"]:
                for position, value in enumerate(samples(column, captures, core["rows"])):
                    row = tables[column["table"]].setdefault(core["first_row"] + position, {})
                    row.update(n_epoch=core["epoch"], dataset_type=description["dataset_type"])
                    row[column["name"]] = value
    return tables


if __name__ == "__main__":
    sys.stdout.buffer.write(pickle.dumps(read(sys.argv[1])))
