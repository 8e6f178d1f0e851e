"""The npy ZIP: what plain `numpy.load` and `zipfile` see in it, and `load_export` over it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger.errors import InvalidInputError, InvalidTypeError, NotFoundError, StorageError
from ml_debugger.exporting import export_trace, tables
from ml_debugger.trace import Trace, load_export, open_trace

TABLES = ("extracted_feature", "ground_truth")


def rich_trace(data_dir: Path) -> FormatWriter:
    """Two ranks, two attempts, epochs and none, every kind of column."""
    fields = [{"name": "camera", "type": "str"}, {"name": "blob", "type": "bytes"}]
    writer = FormatWriter(data_dir, aliases=["features", "half", "ragged"], fields=fields)
    generator = np.random.default_rng(3)
    for call in range(12):
        ids = [f"id{(call % 3) * 2 + row}" for row in range(2)]
        half = generator.normal(size=(2, 3)).astype("<f4").view("<u4") >> np.uint32(16)
        columns = {
            "features": Column(generator.normal(size=(2, 4)).astype("<f4")),
            "half": Column(half.astype("<u2"), dtype="bfloat16"),
            "ragged": Column([np.arange(call, dtype="<f4"), np.array(call, "<f4")]),
            "camera": Column(["left", "x" * (300 if call == 4 else 3)], "str"),
            "blob": Column([b"\0" * call, b""], "bytes"),
            "weight": Column(np.array([0.5, 1.5]), "float"),
            "flag": Column(np.array([True, False]), "bool"),
        }
        epoch = None if call > 9 else call // 5
        truths = {"label": Column(np.array([call, 1], "<i8"))} if call % 4 else None
        writer.call(call, ids, columns, truths, epoch=epoch, rank=call % 2, attempt=call // 8, pieces=2)
    writer.gap(50, 52, 6, epoch=0)
    writer.gap(60, 60, 2, "stall", epoch=1, rank=1)
    return writer


@pytest.fixture
def trace_dir(tmp_path: Path) -> Path:
    return rich_trace(tmp_path / "data").write()


def members(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name != "manifest.json"}


def manifest(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("manifest.json"))


def assert_same(first: Trace, second: Trace, **selection: Any) -> None:
    for table in TABLES:
        arrays, others = first.arrays(table, **selection), second.arrays(table, **selection)
        assert list(arrays) == list(others)
        for name in arrays:
            assert arrays[name].dtype == others[name].dtype and arrays[name].shape == others[name].shape, name
            for one, other in zip(arrays[name], others[name], strict=True):
                np.testing.assert_array_equal(one, other)
        tensors, others = first.tensors(table, **selection), second.tensors(table, **selection)
        for name in tensors:
            assert type(tensors[name]) is type(others[name]), name
            if isinstance(tensors[name], torch.Tensor):
                assert tensors[name].dtype == others[name].dtype
            for one, other in zip(tensors[name], others[name], strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
        rows = first.num_rows(table, **selection)
        assert rows == second.num_rows(table, **selection) == len(arrays["row_id"])
        sizes = [
            [len(batch["row_id"]) for batch in trace.iter_batches(table, batch_size=5, **selection)]
            for trace in (first, second)
        ]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dedupe", [True, False])
def test_plain_numpy_reads_the_rows_of_the_trace(trace_dir: Path, tmp_path: Path, dedupe: bool) -> None:
    path = export_trace(trace_dir, tmp_path, dedupe=dedupe)
    found = members(path)
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    for table in TABLES:
        for name, values in trace.arrays(table, dedupe=dedupe).items():
            if values.dtype != object:
                np.testing.assert_array_equal(found[f"{table}/{name}"], values)
                assert found[f"{table}/{name}"].dtype == values.dtype
    assert found["extracted_feature/half"].dtype == np.float32
    assert found["extracted_feature/n_epoch"][0] == -1
    assert len(set(found["extracted_feature/row_id"])) == len(found["extracted_feature/row_id"])
    assert set(found["ground_truth/row_id"]) <= set(found["extracted_feature/row_id"])


def test_ragged_columns_bytes_and_wide_text_come_in_three_members(trace_dir: Path, tmp_path: Path) -> None:
    found = members(export_trace(trace_dir, tmp_path, dedupe=False))
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    rows = trace.arrays("extracted_feature", columns=["ragged", "camera", "blob"])
    for name in rows:
        values, offsets, shapes = (
            found[f"extracted_feature/{name}.{part}"] for part in ("values", "offsets", "shapes")
        )
        assert f"extracted_feature/{name}" not in found
        assert offsets.shape == (25,) and offsets.dtype == np.int64
        assert shapes.shape == (24, 1) and shapes.dtype == np.int64
        for row, expected in enumerate(rows[name]):
            part = values[offsets[row] : offsets[row + 1]]
            if name == "ragged":
                np.testing.assert_array_equal(
                    part.reshape([size for size in shapes[row] if size >= 0]), expected
                )
            else:
                assert values.dtype == np.uint8
                assert part.tobytes() == (expected.encode() if name == "camera" else expected)
                assert shapes[row, 0] == len(part)


def test_the_manifest_says_what_is_there(trace_dir: Path, tmp_path: Path) -> None:
    path = export_trace(trace_dir, tmp_path)
    document = manifest(path)
    assert list(document) == [
        "format_version", "model_name", "version_name", "fingerprint", "tables", "members", "rows_recorded",
        "rows_written", "rows_deduplicated", "discarded", "ranks",
    ]  # fmt: skip
    assert (document["model_name"], document["version_name"], document["fingerprint"]) == (
        "model",
        "v1",
        "f" * 64,
    )
    assert document["rows_recorded"] == 24
    assert document["rows_written"] == len(members(path)["extracted_feature/row_id"]) < 24
    assert document["rows_written"] + document["rows_deduplicated"] == 24
    assert document["discarded"] == {"rows": 8, "by_cause": {"ring_full": 6, "stall": 2}}
    assert document["ranks"] == [
        {"rank": 0, "rows": 12, "last_call": 10, "writing": False},
        {"rank": 1, "rows": 12, "last_call": 11, "writing": False},
    ]
    columns = document["tables"]["extracted_feature"]["columns"]
    assert columns["features"] == {"recorded": "float32", "written": "float32", "shape": [4]}
    assert columns["half"] == {"recorded": "bfloat16", "written": "float32", "shape": [3]}
    assert columns["ragged"] == {"recorded": "float32", "written": "float32", "shape": None}
    assert columns["camera"] == {"recorded": "str", "written": "uint8", "shape": None}
    assert columns["weight"] == {"recorded": "float", "written": "float64", "shape": []}
    assert columns["flag"] == {"recorded": "bool", "written": "bool", "shape": []}
    assert columns["n_epoch"] == columns["row_id"] == {"recorded": "int64", "written": "int64", "shape": []}
    assert columns["input_id"] == {"recorded": "str", "written": "<U3", "shape": []}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert set(document["members"]) == set(archive.namelist()) - {"manifest.json"}
        for name, entry in document["members"].items():
            data = archive.read(name)
            assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_a_selected_epoch_counts_its_own_rows_and_gaps(trace_dir: Path, tmp_path: Path) -> None:
    path = export_trace(trace_dir, tmp_path, n_epoch=1, dedupe=False)
    assert path.name == "model_v1_epoch1.zip"
    document = manifest(path)
    assert document["rows_recorded"] == document["rows_written"] == 10
    assert document["discarded"] == {"rows": 2, "by_cause": {"stall": 2}}
    assert [entry["rows"] for entry in document["ranks"]] == [4, 6]
    assert set(members(path)["extracted_feature/n_epoch"]) == {1}
    assert set(members(export_trace(trace_dir, tmp_path, n_epoch=-1))["extracted_feature/n_epoch"]) == {-1}


def test_an_absent_epoch_gives_empty_tables(trace_dir: Path, tmp_path: Path) -> None:
    path = export_trace(trace_dir, tmp_path, n_epoch=99)
    assert all(len(values) in (0, 1) for values in members(path).values())
    assert members(path)["extracted_feature/features"].shape == (0, 4)
    document = manifest(path)
    assert (
        document["rows_recorded"]
        == document["rows_written"]
        == document["tables"]["ground_truth"]["rows"]
        == 0
    )
    assert load_export(path).epochs == []


def test_a_trace_that_recorded_nothing_gives_empty_tables(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path / "data")
    path = export_trace(writer.write(), tmp_path)
    found = members(path)
    assert found["extracted_feature/row_id"].shape == (0,) and found["ground_truth/label"].shape == (0,)
    trace = load_export(path)
    assert trace.num_rows("extracted_feature") == trace.num_rows("ground_truth") == 0
    assert trace.arrays("extracted_feature")["input_id"].tolist() == []


def test_two_exports_of_the_same_rows_are_equal_byte_for_byte(trace_dir: Path, tmp_path: Path) -> None:
    first = export_trace(trace_dir, tmp_path / "a.zip")
    time.sleep(0.01)
    os.utime(trace_dir)
    second = export_trace(trace_dir, tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()


def test_streamed_columns_equal_small_ones(
    trace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export_trace(trace_dir, tmp_path / "whole.zip")
    monkeypatch.setattr(tables, "_SPOOLED_BYTES", 0)
    monkeypatch.setattr(tables, "_SPOOLED_BYTES_A_CALL", 0)
    streamed = export_trace(trace_dir, tmp_path / "streamed.zip")
    assert whole.read_bytes() == streamed.read_bytes()


def test_members_are_stored_and_their_values_aligned(trace_dir: Path, tmp_path: Path) -> None:
    path = export_trace(trace_dir, tmp_path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED and info.date_time == (1980, 1, 1, 0, 0, 0)
            name, extra = np.frombuffer(data, "<u2", 2, info.header_offset + 26)
            assert (info.header_offset + 30 + int(name) + int(extra)) % 64 == 0


@pytest.mark.parametrize("dedupe", [True, False])
@pytest.mark.parametrize(
    "selection", [{}, {"n_epoch": 1}, {"n_epoch": -1}, {"dataset_type": "val"}, {"dedupe": True}]
)
def test_an_export_has_the_face_of_its_trace(
    trace_dir: Path, tmp_path: Path, dedupe: bool, selection: dict[str, Any]
) -> None:
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    export = load_export(export_trace(trace_dir, tmp_path, dedupe=dedupe))
    assert (export.model_name, export.version_name, export.fingerprint) == ("model", "v1", trace.fingerprint)
    assert (export.epochs, export.attempts) == (trace.epochs, trace.attempts)
    assert [export.columns(table) for table in TABLES] == [trace.columns(table) for table in TABLES]
    if dedupe:
        selection = {**selection, "dedupe": True}
    for table in TABLES:
        assert export.num_rows(table, **selection) == trace.num_rows(table, **selection)
        for name in ("row_id", "input_id", "n_epoch", "dataset_type"):
            np.testing.assert_array_equal(
                export.arrays(table, **selection)[name], trace.arrays(table, **selection)[name]
            )


def test_every_value_of_an_export_equals_the_store(trace_dir: Path, tmp_path: Path) -> None:
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    export = load_export(export_trace(trace_dir, tmp_path, dedupe=False))
    assert_same(trace, export)
    assert_same(trace, export, n_epoch=0)
    assert_same(trace, export, dedupe=True)


def test_an_export_checks_arguments_like_a_trace(trace_dir: Path, tmp_path: Path) -> None:
    export = load_export(export_trace(trace_dir, tmp_path))
    with pytest.raises(InvalidInputError):
        export.arrays("features")
    with pytest.raises(InvalidInputError, match="no column"):
        export.tensors("extracted_feature", columns=["nope"])
    with pytest.raises(InvalidTypeError):
        export.num_rows("extracted_feature", n_epoch=True)
    with pytest.raises(NotFoundError, match="no export"):
        load_export(tmp_path / "none.zip")
    assert not (tmp_path / "none.zip").exists()


@pytest.mark.parametrize(
    ("n_epoch", "error"), [(True, TypeError), (1.5, TypeError), ("1", TypeError), (-2, ValueError)]
)
def test_a_wrong_epoch_is_refused_before_anything_is_written(
    trace_dir: Path, tmp_path: Path, n_epoch: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        export_trace(trace_dir, tmp_path / "out", n_epoch=n_epoch)
    assert not (tmp_path / "out").exists()


def test_an_unknown_trace_or_format_writes_nothing(trace_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        export_trace(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InvalidInputError, match="format"):
        export_trace(trace_dir, tmp_path / "out", format="csv")
    assert not (tmp_path / "out").exists() and not (tmp_path / "nowhere").exists()


def test_a_failed_export_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path / "data")
    writer.call(0, ["a"], {"features": Column(np.array([2**60 + 1], "<i8"))})
    writer.call(1, ["b"], {"features": Column(np.array([0.5], "<f8"))})
    target = tmp_path / "out" / "x.zip"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(StorageError, match="float64, int64"):
        export_trace(writer.write(), target)
    assert target.read_bytes() == b"old" and os.listdir(target.parent) == ["x.zip"]


def test_an_existing_file_is_replaced_and_a_symlink_is_not_followed(trace_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    target = tmp_path / "x.zip"
    target.symlink_to(victim)
    assert export_trace(trace_dir, target) == target
    assert victim.read_bytes() == b"keep" and not target.is_symlink() and zipfile.is_zipfile(target)


def test_an_unwritable_place_is_a_storage_error(trace_dir: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        export_trace(trace_dir, "/proc/none/x.zip")


def test_progress_counts_to_the_end(
    trace_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, int]] = []
    export_trace(trace_dir, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == seen[-1][1] > 0
    export_trace(trace_dir, tmp_path)
    assert capsys.readouterr().err == ""
    export_trace(trace_dir, tmp_path, progress=True)
    assert "100 %" in capsys.readouterr().err
    with pytest.raises(InvalidTypeError):
        export_trace(trace_dir, tmp_path, progress="yes")


def test_an_epoch_dropped_in_the_middle_is_left_out_whole(
    trace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_SPOOLED_BYTES", 0)
    monkeypatch.setattr(tables, "_SPOOLED_BYTES_A_CALL", 0)
    dropped = threading.Event()

    def drop(done: int, total: int) -> None:
        if not dropped.is_set():
            dropped.set()
            for rank in ("rank-00000", "rank-00001"):
                shutil.rmtree(trace_dir / rank / "epoch-1")

    found = members(export_trace(trace_dir, tmp_path, progress=drop))
    assert set(found["extracted_feature/n_epoch"]) == {-1, 0}
    assert set(found["ground_truth/n_epoch"]) <= {-1, 0}


def test_huge_pieces_and_partly_kept_calls_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ml_debugger.exporting import streams

    monkeypatch.setattr(streams, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(tables, "_SPOOLED_BYTES", 0)
    monkeypatch.setattr(tables, "_SPOOLED_BYTES_A_CALL", 0)
    writer = FormatWriter(tmp_path / "data")
    values = np.arange(8 * 500, dtype="<f4").reshape(8, 500)
    half = np.arange(8 * 500, dtype="<u2").reshape(8, 500)
    for call, dtype, array in [(0, "", values), (1, "bfloat16", half), (2, "", values + 1)]:
        ids = [f"{row if call else 'x'}{row % 3 if call == 1 else row}" for row in range(8)]
        writer.call(call, ids, {"features": Column(array, dtype=dtype)}, pieces=5)
    trace_dir = writer.write()
    trace = open_trace("model", "v1", data_dir=tmp_path / "data")
    for dedupe in (True, False):
        found = members(export_trace(trace_dir, tmp_path, dedupe=dedupe))
        expected = trace.arrays("extracted_feature", dedupe=dedupe)["features"]
        np.testing.assert_array_equal(found["extracted_feature/features"], expected)
