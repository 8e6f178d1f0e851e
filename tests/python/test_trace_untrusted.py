"""Stores and ZIPs that lie: every lie ends in one of our errors, before memory is taken by its word."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from format_writer import Column, FormatWriter, crc32c
from ml_debugger.errors import CorruptDataError, MlDebuggerError, NotFoundError
from ml_debugger.exporting import export_trace
from ml_debugger.trace import load_export, open_trace
from ml_debugger.trace.header import HeaderDecoder


def write_one(tmp_path: Path) -> FormatWriter:
    writer = FormatWriter(tmp_path)
    columns = {
        "features": Column(np.ones((2, 3), "<f4")),
        "ragged": Column([np.ones(2, "<f4"), np.ones((3, 1), "<f4")]),
        "camera": Column(["left", "right"], "str"),
        "number": Column(np.array([1, -2], "<i4"), "str"),
    }
    writer.call(0, ["a", "b"], columns, {"label": Column(np.array([1, 2], "<i8"))}, inline=["camera"])
    return writer


def lie(writer: FormatWriter, change: Callable[[list[Any]], Any]) -> None:
    """Change the decoded header and encode it again, with a right checksum."""
    segment = writer.segment(0)
    key, value = segment.calls[0]
    document = msgpack.unpackb(value)[:4]
    changed = change(document)
    parts = document if changed is None else changed
    body = bytes([0x90 + len(parts) + 1]) + b"".join(msgpack.packb(part) for part in parts)
    segment.calls[0] = (key, body + b"\xce" + crc32c(body).to_bytes(4, "big"))


def column(document: list[Any], name: str) -> dict[str, Any]:
    return next(entry for entry in document[2]["columns"] if entry["name"] == name)


def set_core(key: str, value: Any) -> Callable[[list[Any]], None]:
    def change(document: list[Any]) -> None:
        document[1][key] = value

    return change


def set_column(name: str, key: str, value: Any) -> Callable[[list[Any]], None]:
    def change(document: list[Any]) -> None:
        column(document, name)[key] = value

    return change


def set_chunk(position: int, value: Any) -> Callable[[list[Any]], None]:
    def change(document: list[Any]) -> None:
        document[1]["chunks"][0][position] = value

    return change


LIES: dict[str, Callable[[list[Any]], Any]] = {
    "rows": set_core("rows", 1 << 40),
    "negative rows": set_core("rows", -2),
    "rows of another type": set_core("rows", 2.0),
    "another rank": set_core("rank", 1),
    "another attempt": set_core("attempt", 7),
    "another epoch": set_core("epoch", 1),
    "another call": set_core("call", 1),
    "ground truth for half of it": set_core("ground_truth_rows", 1),
    "row ids that overflow": set_core("first_row", (1 << 63) - 1),
    "no chunks": set_core("chunks", []),
    "chunks of another type": set_core("chunks", [1]),
    "a chunk of 2**60 bytes": set_chunk(3, 1 << 60),
    "a negative length": set_chunk(3, -1),
    "inline bytes that are not there": set_chunk(1, -1),
    "another segment": set_chunk(1, 9),
    "a huge shape": set_column("features", "shape", [2, 1 << 40]),
    "an empty shape that overflows": set_column("features", "shape", [2, 0, 1 << 62, 1 << 62]),
    "a negative shape": set_column("features", "shape", [2, -3]),
    "another number of samples": set_column("features", "shape", [3, 2]),
    "too many dimensions": set_column("features", "shape", [2, 3] + [1] * 100),
    "no shape": set_column("features", "shape", []),
    "another dtype": set_column("features", "dtype", "float64"),
    "an unknown dtype": set_column("features", "dtype", "float128"),
    "an unknown type": set_column("features", "type", "object"),
    "an unknown table": set_column("features", "table", "secrets"),
    "a name that is no text": set_column("features", "name", 5),
    "a column twice": set_column("features", "name", "ragged"),
    "no input_id": set_column("input_id", "name", "x"),
    "text stored as floats": set_column("number", "dtype", "float64"),
    "text stored as widened integers": set_column("number", "dtype", "bfloat16"),
    "text stored as wider integers than there are": set_column("number", "dtype", "int64"),
    "text stored as several integers": set_column("number", "shape", [2, 1]),
    "text stored as integers of differing shape": set_column("number", "shape", None),
    "an unknown capture": set_column("ragged", "shapes", 99),
    "a dataset_type that is no text": lambda document: document[2].update(dataset_type=3),
    "no columns": lambda document: document[2].pop("columns") and None,
    "an unknown kind": lambda document: [7, *document[1:]],
    "fewer parts": lambda document: document[:2],
    "no description": lambda document: [*document[:2], None, document[3]],
    "inline text": lambda document: [*document[:3], "text"],
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_corrupt_data(tmp_path: Path, name: str) -> None:
    writer = write_one(tmp_path / "data")
    lie(writer, LIES[name])
    trace_dir = writer.write()
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    with pytest.raises(CorruptDataError):
        trace.arrays("extracted_feature")
    with pytest.raises(CorruptDataError):
        export_trace(trace_dir, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def change_capture(writer: FormatWriter, name: str, data: bytes) -> None:
    """Replace the bytes of a capture, with a right length and checksum."""

    def change(document: list[Any]) -> None:
        number = (
            column(document, "ragged")["shapes"] if name == "shapes" else column(document, name)["capture"]
        )
        segment = writer.segment(0)
        for chunk in document[1]["chunks"]:
            if chunk[0] == number:
                chunk[1:] = segment.put_chunk(data)

    lie(writer, change)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("input_id", msgpack.packb(["a"]) + b"\xc0" * 3),
        ("input_id", msgpack.packb(["a", 1])),
        ("input_id", msgpack.packb(["a", b"b"])),
        ("input_id", msgpack.packb(["a", "b", "c"])),
        ("input_id", b"\xdd\xff\xff\xff\xff"),
        ("input_id", b"\x92\xa1a\xa1\xff"),
        ("input_id", b"\x91" * 2000),
        ("camera", msgpack.packb({"a": 1})),
        ("shapes", np.array([[-1, 2], [3, 2]], "<i8").tobytes()),
        ("shapes", np.array([[2, -1], [3, 1]], "<i8").tobytes()),
        ("shapes", np.array([[-2, 2], [3, 1]], "<i8").tobytes()),
        ("shapes", np.array([[1 << 62, 1 << 62], [3, 1]], "<i8").tobytes()),
        ("ragged", b"\0" * 21),
    ],
)
def test_captures_that_lie_are_corrupt_data(tmp_path: Path, name: str, data: bytes) -> None:
    writer = write_one(tmp_path)
    change_capture(writer, name, data)
    writer.write()
    trace = open_trace("model", "v1", data_dir=tmp_path)
    for read in (trace.arrays, trace.tensors, lambda table: list(trace.iter_batches(table))):
        with pytest.raises(CorruptDataError):
            read("extracted_feature")


def test_headers_that_share_one_chunk_cannot_ask_for_more_than_there_is(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a"], {"features": Column(np.ones((1, 50_000), "<f4"))})
    segment = writer.segment(0)
    document = msgpack.unpackb(segment.calls[0][1])[:4]
    for call in range(1, 50):
        core = {**document[1], "call": call, "first_row": call}
        segment.put_header(call, 0, core, document[2], b"")
    writer.write()
    with pytest.raises(CorruptDataError, match=r"name .* bytes"):
        open_trace("model", "v1", data_dir=tmp_path).num_rows("extracted_feature")


def test_random_bytes_never_escape_the_error_family() -> None:
    generator = np.random.default_rng(11)
    decoder = HeaderDecoder(0, 0, 0, 0)
    for _ in range(2000):
        value = generator.integers(0, 256, int(generator.integers(1, 60)), dtype=np.uint8).tobytes()
        with pytest.raises(CorruptDataError):
            decoder.decode(0, b"\x95" + value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format_version": 99}', b'{"format_version": 1}', b"\xff", b"[" * 100_000],
)
def test_a_damaged_version_file_is_corrupt_data(tmp_path: Path, content: bytes) -> None:
    trace_dir = write_one(tmp_path).write()
    (trace_dir / "version.json").write_bytes(content)
    with pytest.raises(CorruptDataError):
        open_trace("model", "v1", data_dir=tmp_path)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return export_trace(write_one(tmp_path / "data").write(), tmp_path / "good.zip")


def read_all(path: Path) -> None:
    trace = load_export(path)
    for table in ("extracted_feature", "ground_truth"):
        trace.arrays(table)
        trace.tensors(table, dedupe=True)


def rewrite(
    path: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The same members, changed; the manifest keeps up with what was changed in them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    target = path.with_name("bad.zip")
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def set_member(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    import hashlib

    def change(members: dict[str, bytes]) -> None:
        members[name] = data
        manifest = json.loads(members["manifest.json"])
        manifest["members"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        members["manifest.json"] = json.dumps(manifest).encode()

    return change


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None, **header: Any) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape, **header}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue() + array.tobytes()


BAD_MEMBERS = {
    "a huge shape": ("features.npy", npy(np.ones((2, 3), "<f4"), (1 << 40, 3))),
    "more rows": ("features.npy", npy(np.ones((4, 3), "<f4"))),
    "another dtype": ("features.npy", npy(np.ones((2, 3), "<f8"))),
    "another shape": ("features.npy", npy(np.ones((2, 4), "<f4"))),
    "Fortran order": ("features.npy", npy(np.ones((2, 3), "<f4"), fortran_order=True)),
    "a pickle": ("features.npy", npy(np.zeros(2, "<i8"), (2,), descr="|O")),
    "no npy": ("features.npy", b"hello"),
    "nothing": ("features.npy", b""),
    "a header that numpy's tokenizer refuses": (
        "features.npy",
        b"\x93NUMPY\1\0\x10\0{'descr': '<f4', (\n" + b" " * 99,
    ),
    "numbers for text": ("input_id.npy", npy(np.zeros(2, "<i8"))),
    "offsets that fall": ("ragged.offsets.npy", npy(np.array([0, 9, 5], "<i8"))),
    "offsets beyond the values": ("ragged.offsets.npy", npy(np.array([0, 2, 500], "<i8"))),
    "too few offsets": ("ragged.offsets.npy", npy(np.array([0, 5], "<i8"))),
    "shapes that do not fit": ("ragged.shapes.npy", npy(np.array([[-1, 2], [3, 7]], "<i8"))),
}


@pytest.mark.parametrize("name", BAD_MEMBERS)
def test_a_member_that_lies_is_corrupt_data(export: Path, name: str) -> None:
    member, data = BAD_MEMBERS[name]
    read_all(export)
    with pytest.raises(CorruptDataError):
        read_all(rewrite(export, set_member(f"extracted_feature/{member}", data)))


def test_a_flipped_byte_in_a_member_is_corrupt_data(export: Path) -> None:
    data = bytearray(export.read_bytes())
    position = data.index(np.ones(6, "<f4").tobytes())
    data[position + 2] ^= 1
    export.write_bytes(data)
    with pytest.raises(CorruptDataError, match="SHA-256"):
        load_export(export).arrays("extracted_feature", columns=["features"])


def test_a_truncated_or_foreign_file_is_corrupt_data(export: Path, tmp_path: Path) -> None:
    whole = export.read_bytes()
    for length in [0, 1, 21, 22, 100, len(whole) // 2, len(whole) - 1]:
        bad = tmp_path / "bad.zip"
        bad.write_bytes(whole[:length])
        with pytest.raises(CorruptDataError):
            read_all(bad)


def test_flipped_bytes_anywhere_give_our_errors_or_the_same_rows(export: Path, tmp_path: Path) -> None:
    whole = export.read_bytes()
    generator = np.random.default_rng(5)
    bad = tmp_path / "bad.zip"
    refused = 0
    for position in generator.integers(0, len(whole), 150):
        data = bytearray(whole)
        data[position] ^= 1 << int(generator.integers(0, 8))
        bad.write_bytes(data)
        try:
            read_all(bad)
        except MlDebuggerError:
            refused += 1
    assert refused > 50


def test_hostile_archives_are_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptDataError, match="compressed"):
        read_all(rewrite(export, lambda members: None, zipfile.ZIP_DEFLATED))
    with pytest.raises(CorruptDataError, match="no member"):
        read_all(rewrite(export, lambda members: members.pop("manifest.json") and None))
    with pytest.raises(CorruptDataError):
        read_all(rewrite(export, lambda members: members.pop("extracted_feature/features.npy") and None))
    for manifest in (
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"format_version": 99, "members": {}, "tables": {}}',
    ):
        with pytest.raises(CorruptDataError):
            read_all(
                rewrite(export, lambda members, content=manifest: members.update({"manifest.json": content}))
            )
    doubled = tmp_path / "doubled.zip"
    with zipfile.ZipFile(doubled, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("manifest.json", b"{}")
    with pytest.raises(CorruptDataError, match="one name"):
        load_export(doubled)


def test_member_names_are_never_paths(export: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    bad = rewrite(
        export, lambda members: members.update({"../../evil": b"x", "/abs": b"x", "a\\..\\b": b"x"})
    )
    read_all(bad)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, bad])


def test_a_header_offset_outside_the_file_is_corrupt_data(export: Path) -> None:
    data = bytearray(export.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = struct.pack("<I", 0xFFFF0000)
    export.write_bytes(data)
    with pytest.raises(CorruptDataError):
        read_all(export)


def test_a_directory_or_a_missing_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no export"):
        load_export(tmp_path / "x.zip")
    with pytest.raises(MlDebuggerError):
        load_export(tmp_path)
    with pytest.raises(TypeError):
        load_export(5)  # type: ignore[arg-type]
