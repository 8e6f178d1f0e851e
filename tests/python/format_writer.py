"""Writes traces from `docs/record_format.md` alone, with stock `lmdb` and `msgpack`: an independent check of
that page.

Nothing here imports ml_debugger, so that a shared mistake cannot hide.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np

# In this process an environment may be open only once; the writer closes its own before anything reads.
_MAP_BYTES = 1 << 30


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in bytes(data):
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def slug(name: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    readable = re.sub(r"^\.+", lambda dots: "_" * len(dots[0]), readable)
    return f"{readable[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


@dataclass
class Column:
    """One column of one call: an array of raw elements, a list of arrays, or a list of str or bytes.

    An array of integers of type ``str`` is text that is stored as integers.
    """

    values: Any
    type: str = "tensor"
    dtype: str = ""
    broadcast: bool = False


@dataclass
class SegmentWriter:
    """One LMDB segment."""

    path: Path
    rank: int
    epoch: int | None
    attempt: int
    sequence: int
    next_key: int = 4096
    calls: list[tuple[int, bytes]] = field(default_factory=list)
    chunks: list[tuple[int, bytes]] = field(default_factory=list)
    rows: int = 0
    ground_truth_rows: int = 0
    discarded_rows: int = 0
    num_calls: int = 0

    def put_chunk(self, data: bytes) -> list[int]:
        key = self.next_key
        self.next_key += len(data) + 4096
        self.chunks.append((key, data))
        return [self.sequence, key, len(data), crc32c(data)]

    def put_header(
        self, key: int, kind: int, core: Mapping[str, Any], description: Any, inline: bytes
    ) -> None:
        parts = (kind, dict(core), description, inline)
        body = b"\x95" + b"".join(msgpack.packb(part) for part in parts)
        self.calls.append((key, body + b"\xce" + crc32c(body).to_bytes(4, "big")))

    def write(self, *, sealed: bool, durability: str, boot_id: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        description = {
            "format_version": 1, "rank": self.rank, "epoch": self.epoch, "attempt": self.attempt,
            "sequence": self.sequence, "durability": durability, "boot_id": boot_id,
        }  # fmt: skip
        (self.path / "segment.json").write_text(json.dumps(description))
        meta = {
            "format_version": 1, "rows": self.rows, "ground_truth_rows": self.ground_truth_rows,
            "calls": self.num_calls, "payload_bytes": sum(len(data) for _, data in self.chunks),
            "discarded_rows": self.discarded_rows,
        }  # fmt: skip
        with lmdb.open(str(self.path), map_size=_MAP_BYTES, max_dbs=2) as env:
            chunks, headers = env.open_db(b"chunks"), env.open_db(b"headers")
            with env.begin(write=True) as txn:
                for key, data in self.chunks:
                    txn.put(key.to_bytes(8, "big"), data, db=chunks)
                for key, data in self.calls:
                    txn.put(key.to_bytes(8, "big"), data, db=headers)
                txn.put(b"meta", msgpack.packb(meta))
        if sealed:
            document = {
                "format_version": 1,
                "rows": self.rows,
                "ground_truth_rows": self.ground_truth_rows,
                "calls": self.num_calls,
            }
            (self.path / "sealed.json").write_text(json.dumps(document))


class FormatWriter:
    """Collects calls and writes them as a trace. Call `write` once, at the end."""

    def __init__(
        self,
        data_dir: Path,
        model: str = "model",
        version: str = "v1",
        *,
        aliases: Sequence[str] = ("features",),
        fields: Sequence[Mapping[str, Any]] = (),
        label_fields: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.directory = data_dir / slug(model) / slug(version)
        self.segments: dict[tuple[int, int | None, int, int], SegmentWriter] = {}
        self.next_row: dict[tuple[int, int], int] = {}
        self.version = {
            "format_version": 1, "model_name": model, "version_name": version, "fingerprint": "f" * 64,
            "aliases": {alias: alias for alias in aliases}, "additional_fields": list(fields),
            "additional_label_fields": list(label_fields),
        }  # fmt: skip

    def segment(self, epoch: int | None, rank: int = 0, attempt: int = 0, sequence: int = 0) -> SegmentWriter:
        key = (rank, epoch, attempt, sequence)
        if key not in self.segments:
            epoch_name = "epoch-none" if epoch is None else f"epoch-{epoch}"
            name = f"a{attempt:05d}-s{sequence:05d}"
            path = self.directory / f"rank-{rank:05d}" / epoch_name / name
            self.segments[key] = SegmentWriter(path, rank, epoch, attempt, sequence)
        return self.segments[key]

    def call(
        self,
        number: int,
        ids: Sequence[str] | np.ndarray,
        features: Mapping[str, Column],
        truths: Mapping[str, Column] | None = None,
        *,
        epoch: int | None = 0,
        rank: int = 0,
        attempt: int = 0,
        sequence: int = 0,
        chunk_sequence: int | None = None,
        dataset_type: str = "train",
        first_row: int | None = None,
        pieces: int = 1,
        inline: Sequence[str] = (),
    ) -> int:
        """Record one call; returns its first ``row_id``. ``inline`` names columns to keep in the header."""
        segment = self.segment(epoch, rank, attempt, sequence)
        target = segment if chunk_sequence is None else self.segment(epoch, rank, attempt, chunk_sequence)
        if first_row is None:
            first_row = (rank << 49) | (attempt << 36) | self.next_row.get((rank, attempt), 0)
            self.next_row[rank, attempt] = self.next_row.get((rank, attempt), 0) + len(ids)
        columns, chunks, inlined = [], [], b""
        capture = 0
        tables = {
            "extracted_feature": {"input_id": Column(ids, "str"), **features},
            "ground_truth": truths or {},
        }
        for table, table_columns in tables.items():
            for name, column in table_columns.items():
                entry, captures = _describe(table, name, column, capture)
                columns.append(entry)
                for data in captures:
                    if name in inline:
                        chunks.append([capture, -1, len(inlined), len(data), crc32c(data)])
                        inlined += data
                    else:
                        for part in _parts(data, pieces):
                            chunks.append([capture, *target.put_chunk(part)])
                    capture += 1
        core = {
            "rank": rank, "attempt": attempt, "call": number, "epoch": epoch, "rows": len(ids),
            "ground_truth_rows": len(ids) if truths else 0, "first_row": first_row, "chunks": chunks,
        }  # fmt: skip
        segment.put_header(number, 0, core, {"dataset_type": dataset_type, "columns": columns}, inlined)
        segment.rows += len(ids)
        segment.num_calls += 1
        segment.ground_truth_rows += core["ground_truth_rows"]
        return first_row

    def gap(self, first_call: int, last_call: int, rows: int, cause: str = "ring_full", **where: Any) -> None:
        """Record that rows were lost."""
        segment = self.segment(where.pop("epoch", 0), **where)
        core = {
            "first_call": first_call,
            "last_call": last_call,
            "rows": rows,
            "bytes": 100 * rows,
            "cause": cause,
        }
        segment.put_header(first_call, 1, core, None, b"")
        segment.discarded_rows += rows

    def write(self, *, sealed: bool = True, durability: str = "power", boot_id: str = "") -> Path:
        """Write everything; returns the trace's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "version.json").write_text(json.dumps(self.version))
        attempts: dict[int, set[int]] = {}
        for rank, _, attempt, _ in self.segments:
            attempts.setdefault(rank, set()).add(attempt)
        for segment in self.segments.values():
            segment.write(sealed=sealed, durability=durability, boot_id=boot_id)
        for rank, numbers in attempts.items():
            entries = [{"attempt": number, "started_unix_s": 0.0, "pid": 1} for number in sorted(numbers)]
            document = {"format_version": 1, "attempts": entries}
            (self.directory / f"rank-{rank:05d}" / "attempts.json").write_text(json.dumps(document))
        return self.directory


def _describe(table: str, name: str, column: Column, capture: int) -> tuple[dict[str, Any], list[bytes]]:
    entry = {"table": table, "name": name, "type": column.type, "capture": capture}
    if column.broadcast:
        entry["broadcast"] = True
    is_array = isinstance(column.values, np.ndarray)
    if column.type in ("str", "bytes") and not is_array:
        return entry, [msgpack.packb(list(column.values))]
    if is_array:
        entry |= {"dtype": column.dtype or column.values.dtype.name, "shape": list(column.values.shape)}
        return entry, [column.values.tobytes()]
    rows = [np.asarray(row) for row in column.values]
    ndim = max(row.ndim for row in rows)
    shapes = np.array([[-1] * (ndim - row.ndim) + list(row.shape) for row in rows], "<i8").reshape(
        len(rows), ndim
    )
    entry |= {"dtype": column.dtype or rows[0].dtype.name, "shape": None, "shapes": capture + 1}
    return entry, [b"".join(row.tobytes() for row in rows), shapes.tobytes()]


def _parts(data: bytes, pieces: int) -> list[bytes]:
    size = max(1, -(-len(data) // pieces))
    return [data[start : start + size] for start in range(0, len(data), size)] or [b""]
