"""A stranger's reader of a trace: stock lmdb and msgpack and docs/record_format.md, nothing of the package.

Run as ``python contract_foreign_reader.py DATA_DIR MODEL VERSION OUT``; OUT becomes a msgpack map of
``rows``, ``gaps`` and ``meta``.
"""

import hashlib
import json
import re
import struct
import sys
from pathlib import Path

import lmdb
import msgpack


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def table_entry(value: int) -> int:
    for _ in range(8):
        value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value


TABLE = [table_entry(i) for i in range(256)]


def slug(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    dots = len(safe) - len(safe.lstrip("."))
    return ("_" * dots + safe[dots:])[:40] + "-" + hashlib.sha256(name.encode()).hexdigest()[:12]


class Segment:
    def __init__(self, folder: Path) -> None:
        self.facts = json.loads((folder / "segment.json").read_text())
        sealed = (folder / "sealed.json").exists()
        env = lmdb.open(str(folder), readonly=True, lock=not sealed, max_dbs=4, create=False)
        self.txn = env.begin()
        self.chunks = env.open_db(b"chunks", self.txn, create=False)
        self.headers = env.open_db(b"headers", self.txn, create=False)
        self.gaps: list = []
        self.meta = msgpack.unpackb(self.txn.get(b"meta"))

    def calls(self):
        for key, value in self.txn.cursor(self.headers):
            kind, core, description, inline, crc = msgpack.unpackb(value, strict_map_key=False)
            assert crc == crc32c(value[:-5]), "header checksum"
            if kind == 0:
                assert struct.unpack(">Q", key)[0] == core["call"]
                yield core, description, inline
            else:
                assert kind == 1 and struct.unpack(">Q", key)[0] == core["first_call"]
                self.gaps.append(core)


def captures(core, inline, segments) -> dict:
    found: dict = {}
    for capture, sequence, key, size, crc in core["chunks"]:
        if sequence == -1:
            piece = inline[key : key + size]
        else:
            owner = segments[core["attempt"], sequence]
            piece = owner.txn.get(struct.pack(">Q", key), db=owner.chunks)
        assert len(piece) == size and crc32c(piece) == crc, "chunk"
        found[capture] = found.get(capture, b"") + piece
    return found


def values(column, bytes_of, rows) -> list:
    data = bytes_of[column["capture"]]
    count = 1 if column.get("broadcast") else rows
    if "dtype" not in column:
        cells = msgpack.unpackb(data)
    elif column["shape"] is None:
        shapes = struct.unpack(f"<{len(bytes_of[column['shapes']]) // 8}q", bytes_of[column["shapes"]])
        ndim = len(shapes) // count
        elements = []
        for i in range(count):
            product = 1
            for size in shapes[i * ndim : (i + 1) * ndim]:
                product *= 1 if size == -1 else size
            elements.append(product)
        width = len(data) // max(1, sum(elements))
        ends = [width * sum(elements[: i + 1]) for i in range(count)]
        cells = [data[end - width * n : end] for end, n in zip(ends, elements, strict=True)]
    else:
        width = len(data) // count
        cells = [data[i * width : (i + 1) * width] for i in range(count)]
        if column["type"] == "str":
            signed = column["dtype"].startswith("int")
            cells = [str(int.from_bytes(cell, "little", signed=signed)) for cell in cells]
    return cells * rows if column.get("broadcast") else cells


def read(data_dir: str, model: str, version: str) -> dict:
    rows, gaps, meta, seen = [], [], [], set()
    for partition in sorted((Path(data_dir) / slug(model) / slug(version)).glob("rank-*/epoch-*")):
        found = [Segment(p) for p in sorted(partition.iterdir()) if not p.name.startswith("trash-")]
        segments = {(s.facts["attempt"], s.facts["sequence"]): s for s in found}
        for segment in found:
            for core, description, inline in segment.calls():
                identity = (core["rank"], core["attempt"], core["call"])
                if identity in seen:
                    continue
                seen.add(identity)
                bytes_of = captures(core, inline, segments)
                cells = {
                    (c["table"], c["name"]): values(c, bytes_of, core["rows"]) for c in description["columns"]
                }
                for i in range(core["rows"]):
                    row = {
                        "row_id": core["first_row"] + i,
                        "epoch": core["epoch"],
                        "has_truth": bool(core["ground_truth_rows"]),
                    }
                    row["dataset_type"] = description["dataset_type"]
                    row["cells"] = [[table, name, cell[i]] for (table, name), cell in cells.items()]
                    rows.append(row)
            gaps += segment.gaps
            meta.append(segment.meta)
    return {"rows": rows, "gaps": gaps, "meta": meta}


if __name__ == "__main__":
    Path(sys.argv[4]).write_bytes(msgpack.packb(read(*sys.argv[1:4])))
