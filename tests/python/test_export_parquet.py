"""`export(format="parquet")`: what pandas, polars and DuckDB see in it, and `load_export` over it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger.errors import CorruptDataError, InvalidInputError, StorageError
from ml_debugger.exporting import export_trace, parquet_tables
from ml_debugger.trace import Trace, load_export, open_trace
from test_export_zip import assert_same, manifest, rich_trace

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FEATURES = "extracted_feature"
TABLES = (FEATURES, "ground_truth")


@pytest.fixture
def trace_dir(tmp_path: Path) -> Path:
    return rich_trace(tmp_path / "data").write()


def parquet(trace_dir: Path, output: Path, **options: Any) -> Path:
    return export_trace(trace_dir, output, format="parquet", **options)


def stored(trace_dir: Path) -> Trace:
    return open_trace("model", "v1", data_dir=trace_dir.parent.parent)


def unpacked(path: Path, directory: Path) -> dict[str, Path]:
    """The Parquet files of an export, by table."""
    with zipfile.ZipFile(path) as archive:
        archive.extractall(directory)
    return {table: directory / f"{table}.parquet" for table in TABLES}


def one_column(directory: Path, *calls: Any) -> Path:
    writer = FormatWriter(directory)
    for number, values in enumerate(calls):
        column = values if isinstance(values, Column) else Column(values)
        writer.call(number, [f"{number}-{row}" for row in range(len(column.values))], {"features": column})
    return writer.write()


@pytest.mark.parametrize("dedupe", [True, False])
@pytest.mark.parametrize("n_epoch", [None, 1, -1, 9])
def test_load_export_has_the_face_of_the_store(
    trace_dir: Path, tmp_path: Path, n_epoch: int | None, dedupe: bool
) -> None:
    loaded = load_export(parquet(trace_dir, tmp_path / "out.zip", n_epoch=n_epoch, dedupe=dedupe))
    reference = load_export(export_trace(trace_dir, tmp_path / "npy.zip", n_epoch=n_epoch, dedupe=dedupe))
    assert loaded.epochs == reference.epochs and loaded.attempts == reference.attempts
    assert (loaded.model_name, loaded.version_name) == ("model", "v1")
    for table in TABLES:
        assert loaded.columns(table) == reference.columns(table)
    assert_same(loaded, reference)
    assert_same(loaded, reference, dataset_type="train", dedupe=True)
    if n_epoch is None:
        assert_same(loaded, stored(trace_dir), dedupe=dedupe)


def test_polars_reads_the_members(trace_dir: Path, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    files = unpacked(parquet(trace_dir, tmp_path / "out.zip", dedupe=False), tmp_path / "members")
    arrays = stored(trace_dir).arrays(FEATURES)
    frame = polars.read_parquet(files[FEATURES])
    assert frame["row_id"].to_list() == arrays["row_id"].tolist()
    assert frame["camera"].to_list() == list(arrays["camera"])
    np.testing.assert_array_equal(frame["features"].to_numpy(), arrays["features"])
    np.testing.assert_array_equal(frame["half"].to_numpy(), arrays["half"])
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        joined = polars.read_parquet(io.BytesIO(archive.read("ground_truth.parquet"))).join(
            frame, on="row_id"
        )
    assert len(joined) == stored(trace_dir).num_rows("ground_truth")


def test_duckdb_reads_the_members(trace_dir: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    files = unpacked(parquet(trace_dir, tmp_path / "out.zip", dedupe=False), tmp_path / "members")
    arrays = stored(trace_dir).arrays(FEATURES)
    with duckdb.connect() as connection:
        rows = connection.execute(
            f"select row_id, features[2], half, ragged, camera, blob from '{files[FEATURES]}' order by row_id"
        ).fetchall()
        (labelled,) = connection.execute(
            f"select count(*) from '{files[FEATURES]}' join '{files['ground_truth']}' using (row_id)"
        ).fetchone()
    order = np.argsort(arrays["row_id"])
    assert [row[0] for row in rows] == arrays["row_id"][order].tolist()
    assert [row[1] for row in rows] == arrays["features"][order, 1].tolist()
    assert [list(row[2]) for row in rows] == arrays["half"][order].tolist()
    assert [list(row[3]) for row in rows] == [arrays["ragged"][row].reshape(-1).tolist() for row in order]
    assert [row[4] for row in rows] == [arrays["camera"][row] for row in order]
    assert [row[5] for row in rows] == [arrays["blob"][row] for row in order]
    assert labelled == stored(trace_dir).num_rows("ground_truth")


def test_pandas_reads_the_members(trace_dir: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    files = unpacked(parquet(trace_dir, tmp_path / "out.zip", dedupe=False), tmp_path / "members")
    frame, arrays = pandas.read_parquet(files[FEATURES]), stored(trace_dir).arrays(FEATURES)
    for name in ("row_id", "input_id", "n_epoch", "dataset_type", "camera", "weight", "flag", "blob"):
        assert frame[name].tolist() == list(arrays[name])
    np.testing.assert_array_equal(np.stack(frame["features"]), arrays["features"])


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    names = [
        "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool", "uint8", "uint16",
        "uint32", "uint64", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2",
    ]  # fmt: skip
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 3), (0,), (2, 0, 2)]
    writer, columns = FormatWriter(tmp_path / "data"), {}
    for name in names:
        for shape in shapes:
            width = getattr(torch, name).itemsize
            high = 2 if name == "bool" else 256
            raw = generator.integers(0, high, (4, *shape, width), dtype=np.uint8)
            stored_as = np.dtype(f"V{width}")
            values = np.ascontiguousarray(raw).reshape(-1).view(stored_as).reshape(4, *shape)
            columns[f"{name}_{'x'.join(map(str, shape))}"] = Column(values, dtype=name)
    writer.call(0, list("abcd"), columns, pieces=2)
    trace_dir = writer.write()
    loaded = load_export(parquet(trace_dir, tmp_path / "out.zip"))
    first, second = stored(trace_dir).tensors(FEATURES), loaded.tensors(FEATURES)
    for name in columns:
        assert first[name].dtype == second[name].dtype and first[name].shape == second[name].shape, name
        one, other = (
            tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first[name], second[name])
        )
        assert torch.equal(one, other), name


def test_rows_without_a_column_come_back_as_none(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path / "data")
    writer.call(0, ["a"], {"features": Column(np.ones((1, 2), "<f4")), "camera": Column(["left"], "str")})
    writer.call(1, ["b"], {"features": Column(np.ones((1, 2, 1), "<c8")), "blob": Column([b"x"], "bytes")})
    writer.call(2, ["c"], {"other": Column([np.ones(2, "<f4")])})
    trace_dir = writer.write()
    path = parquet(trace_dir, tmp_path / "out.zip")
    assert_same(load_export(path), stored(trace_dir))
    table = pq.read_table(io.BytesIO(zipfile.ZipFile(path).read(f"{FEATURES}.parquet")))
    assert table.column("camera").to_pylist() == ["left", None, None]
    assert table.column("features.shapes").to_pylist() == [[2], [2, 1], None]


def test_two_exports_are_equal_byte_for_byte(trace_dir: Path, tmp_path: Path) -> None:
    first, second = (parquet(trace_dir, tmp_path / name).read_bytes() for name in ("a.zip", "b.zip"))
    assert first == second


def test_the_manifest_tells_what_was_recorded_and_written(trace_dir: Path, tmp_path: Path) -> None:
    path = parquet(trace_dir, tmp_path / "out.zip")
    document, npy = manifest(path), manifest(export_trace(trace_dir, tmp_path / "npy.zip"))
    assert set(document) == set(npy)
    for key in ("rows_recorded", "rows_written", "rows_deduplicated", "discarded", "ranks", "fingerprint"):
        assert document[key] == npy[key]
    for table in TABLES:
        found, other = document["tables"][table], npy["tables"][table]
        assert found["rows"] == other["rows"] and list(found["columns"]) == list(other["columns"])
        for name, column in found["columns"].items():
            assert column["recorded"] == other["columns"][name]["recorded"]
    columns = document["tables"][FEATURES]["columns"]
    assert columns["half"] == {"recorded": "bfloat16", "written": "float32", "shape": [3]}
    assert columns["ragged"]["shape"] is None and columns["camera"]["written"] == "string"
    assert columns["row_id"] == {"recorded": "int64", "written": "int64", "shape": []}
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [*(f"{table}.parquet" for table in TABLES), "manifest.json"]
        for name, entry in document["members"].items():
            data = archive.read(name)
            assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_an_empty_trace_gives_empty_tables_with_all_columns(tmp_path: Path) -> None:
    fields = [{"name": "camera", "type": "str"}, {"name": "count", "type": "int"}]
    trace_dir = FormatWriter(tmp_path / "data", fields=fields).write()
    path = parquet(trace_dir, tmp_path / "out.zip")
    loaded = load_export(path)
    for table in TABLES:
        assert loaded.num_rows(table) == 0 and loaded.columns(table) == stored(trace_dir).columns(table)
        assert set(loaded.arrays(table)) == set(loaded.columns(table))
    assert loaded.epochs == [] and len(loaded.dataset(FEATURES)) == 0


def test_rows_are_written_in_groups_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_tables, "_ROW_GROUP_ROWS", 5)
    monkeypatch.setattr("ml_debugger.trace.store_source._MAX_CALLS_A_BLOCK", 2)
    monkeypatch.setattr("ml_debugger.trace.runs.RUN_BYTES", 1)
    calls = [np.full((2, 3), number, "<f4") for number in range(9)]
    trace_dir = one_column(tmp_path / "data", *calls)
    path = parquet(trace_dir, tmp_path / "out.zip")
    metadata = pq.ParquetFile(io.BytesIO(zipfile.ZipFile(path).read(f"{FEATURES}.parquet"))).metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [8, 8, 2]
    loaded = load_export(path)
    assert_same(loaded, stored(trace_dir))
    rows = [17, 0, 9, 8, 15]
    dataset = loaded.dataset(FEATURES, columns=["features"])
    assert [int(item["features"][0]) for item in dataset.__getitems__(rows)] == [row // 2 for row in rows]


def test_progress_ends_with_everything_done(trace_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    parquet(trace_dir, tmp_path / "out.zip", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_dtypes_without_a_common_one_are_refused_by_name(tmp_path: Path) -> None:
    trace_dir = one_column(tmp_path / "data", np.array([2**60 + 1], "<i8"), np.array([0.5], "<f8"))
    with pytest.raises(StorageError, match=r"'features'.*float64, int64"):
        parquet(trace_dir, tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_without_pyarrow_the_command_is_named_and_nothing_written(
    trace_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(trace_dir, tmp_path / "out.zip")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidInputError, match=r'pip install "ml-debugger\[arrow\]"'):
        parquet(trace_dir, tmp_path / "new" / "out.zip")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InvalidInputError, match=r'pip install "ml-debugger\[arrow\]"'):
        load_export(path)


@pytest.mark.parametrize("format", ["csv", "", None, "Parquet"])
def test_another_format_is_refused(trace_dir: Path, tmp_path: Path, format: Any) -> None:
    with pytest.raises(InvalidInputError, match="'npy', 'parquet'"):
        export_trace(trace_dir, tmp_path / "out.zip", format=format)


def test_a_changed_member_is_corrupt_data(trace_dir: Path, tmp_path: Path) -> None:
    path = parquet(trace_dir, tmp_path / "out.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"PAR1") + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match="SHA-256"):
        load_export(path)


@pytest.mark.parametrize(
    ("column", "entry"),
    [
        ("features", {"shape": [5]}),
        ("features", {"recorded": "float64"}),
        ("features", {"shape": None}),
        ("ragged", {"shape": [1]}),
        ("half", {"shape": [1, 3]}),
        ("camera", {"recorded": "float32"}),
        ("weight", {"recorded": "str"}),
        ("blob", {"recorded": "str"}),
    ],
)
def test_a_manifest_that_contradicts_its_tables_is_corrupt_data(
    trace_dir: Path, tmp_path: Path, column: str, entry: dict[str, Any]
) -> None:
    path, forged = parquet(trace_dir, tmp_path / "out.zip"), tmp_path / "forged.zip"
    document = manifest(path)
    document["tables"][FEATURES]["columns"][column] |= entry
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(forged, "w") as target:
        for name in source.namelist():
            changed = name == "manifest.json"
            target.writestr(name, json.dumps(document) if changed else source.read(name))
    with pytest.raises(CorruptDataError):
        load_export(forged).arrays(FEATURES)
