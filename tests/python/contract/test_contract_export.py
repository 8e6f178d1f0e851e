"""Contract 4, export: where the file goes, names, atomic replacement, ZIP layout, manifest, dedupe, equal
bytes, the n_epoch argument."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, batch, by_id, refused

from ml_debugger import errors, load_export


def filled(make_tracer: Any, **kwargs: Any) -> Any:
    """Epochs 0 and 1 and none, 4 rows each, labelled."""
    tracer = make_tracer(**kwargs)
    for i, epoch in enumerate([0, 1, None]):
        tracer(*batch(4, i), n_epoch=epoch)
    return tracer


def manifest(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        content: dict[str, Any] = json.loads(archive.read("manifest.json"))
    return content


def test_the_default_is_the_current_directory_and_the_default_name(
    make_tracer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    tracer = filled(make_tracer)
    paths = [tracer.export(), tracer.export(n_epoch=1)]
    assert all(isinstance(path, Path) and path.exists() for path in paths)
    assert sorted(os.listdir(tmp_path / "work")) == ["net_v1.zip", "net_v1_epoch1.zip"]


def test_a_path_with_the_zip_ending_is_the_file_and_missing_parents_are_made(
    make_tracer: Any, tmp_path: Path
) -> None:
    target = tmp_path / "a" / "b" / "mine.zip"
    assert filled(make_tracer).export(str(target)) == target
    assert zipfile.is_zipfile(target)


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_without_the_ending_is_a_directory(exists: bool, make_tracer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "exports" / "today.d"
    if exists:
        folder.mkdir(parents=True)
    assert filled(make_tracer).export(folder) == folder / "net_v1.zip"
    assert os.listdir(folder) == ["net_v1.zip"]


def test_an_existing_directory_stays_one_even_if_it_ends_in_zip(make_tracer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder.zip"
    folder.mkdir()
    assert filled(make_tracer).export(folder) == folder / "net_v1.zip"


def test_an_existing_file_is_replaced_atomically(make_tracer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "mine.zip"
    target.write_bytes(b"old" * 1000)
    with open(target, "rb") as old:
        filled(make_tracer).export(target)
        assert old.read() == b"old" * 1000, "the old file was written into"
    assert zipfile.is_zipfile(target) and os.listdir(folder) == ["mine.zip"]


def test_a_failed_export_leaves_the_old_file(make_tracer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "mine.zip"
    target.write_bytes(b"old")
    tracer = filled(make_tracer)
    with refused(ValueError):
        tracer.export(target, n_epoch=-2)
    with refused(ValueError):
        tracer.export(target, format="csv")
    assert target.read_bytes() == b"old" and os.listdir(folder) == ["mine.zip"]


@pytest.mark.parametrize("where", ["below a file", "in proc"])
def test_a_target_that_cannot_be_written_is_an_error_of_ours(
    where: str, make_tracer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if where == "below a file" else Path("/proc/self")
    tracer = filled(make_tracer)
    with refused(errors.StorageError, errors.InvalidInputError) as caught:
        tracer.export(folder / "out.zip")
    assert str(folder) in str(caught.value)
    assert tracer.export(tmp_path / "fine.zip").exists()


HOSTILE = ["../../x", "/etc/passwd", "..", "a\nb", "模型" * 300, "x" * 10_240, "a\\b"]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("epoch", [None, 3])
def test_the_default_name_is_made_safe(
    name: str, epoch: int | None, make_tracer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "deep"
    tracer = make_tracer(None, name, name)
    tracer(*batch(2), n_epoch=3)
    path = tracer.export(folder, n_epoch=epoch)
    assert path.parent == folder and os.listdir(folder) == [path.name]
    assert os.listdir(tmp_path / "out") == ["deep"]
    assert len(os.fsencode(path.name)) <= 255
    assert path.name.endswith("_epoch3.zip" if epoch else ".zip")
    assert not set("/\\\n\x00") & set(path.name)
    content = manifest(path)
    assert (content["model_name"], content["version_name"]) == (name, name)


def test_the_zip_opens_with_plain_numpy_load(make_tracer: Any, tmp_path: Path) -> None:
    path = filled(make_tracer).export(tmp_path / "out.zip")
    with np.load(path, allow_pickle=False) as data:
        names = {name for name in data.files if "manifest" not in name}
        common = ("row_id", "input_id", "dataset_type", "n_epoch")
        assert names == {f"extracted_feature/{c}" for c in (*common, "hidden", "logits")} | {
            f"ground_truth/{c}" for c in (*common, "label")
        }
        features = {n.split("/")[1]: data[n] for n in names if n.startswith("extracted_feature")}
        truth = {n.split("/")[1]: data[n] for n in names if n.startswith("ground_truth")}
    assert {len(column) for column in (*features.values(), *truth.values())} == {12}
    model = Net()
    for i, epoch in enumerate([0, 1, -1]):
        x, y, ids = batch(4, i)
        hidden, epochs, labels = by_id(features, "hidden"), by_id(features, "n_epoch"), by_id(truth, "label")
        assert np.array_equal(np.stack([hidden[k] for k in ids]), model.body(x).detach().numpy())
        assert [int(labels[k]) for k in ids] == y.tolist()
        assert [int(epochs[k]) for k in ids] == [epoch] * 4
    assert by_id(truth, "row_id") == by_id(features, "row_id")
    assert features["row_id"].dtype == np.int64 and features["input_id"].dtype.kind == "U"
    assert features["dataset_type"].dtype.kind == "U" and features["n_epoch"].dtype == np.int64


def test_the_archive_holds_the_members_and_the_manifest_only(make_tracer: Any, tmp_path: Path) -> None:
    path = filled(make_tracer).export(tmp_path / "out.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        members = manifest(path)["members"]
        assert len(names) == len(set(names))
        assert set(members) == set(names) - {"manifest.json"}
        for name, facts in members.items():
            content = archive.read(name)
            assert facts == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            assert np.load(io.BytesIO(content), allow_pickle=False) is not None


def test_the_manifest_has_the_documented_keys(make_tracer: Any, tmp_path: Path) -> None:
    content = manifest(filled(make_tracer).export(tmp_path / "out.zip"))
    assert set(content) == {
        "format_version",
        "model_name",
        "version_name",
        "fingerprint",
        "tables",
        "members",
        "rows_recorded",
        "rows_written",
        "rows_deduplicated",
        "discarded",
        "ranks",
    }
    assert (content["model_name"], content["version_name"]) == ("net", "v1")
    assert (content["rows_recorded"], content["rows_written"], content["rows_deduplicated"]) == (12, 12, 0)
    assert content["discarded"]["rows"] == 0 and sum(content["discarded"]["by_cause"].values()) == 0
    (rank,) = content["ranks"]
    assert set(rank) == {"rank", "rows", "last_call", "writing"}
    assert (rank["rank"], rank["rows"]) == (0, 12)
    assert {name: facts["rows"] for name, facts in content["tables"].items()} == {
        "extracted_feature": 12,
        "ground_truth": 12,
    }


def test_the_manifest_describes_the_columns(make_tracer: Any, tmp_path: Path) -> None:
    fields = [{"name": name, "type": name} for name in ("int", "float", "bool", "str", "bytes")]
    tracer = make_tracer(Net().to(torch.bfloat16), layers={"hidden": "body"}, additional_fields=fields)
    x, y, ids = batch(3)
    tracer(x.to(torch.bfloat16), y, ids, n_epoch=0, int=1, float=0.5, bool=True, str="s", bytes=b"b")
    content = manifest(tracer.export(tmp_path / "out.zip"))
    columns = content["tables"]["extracted_feature"]["columns"]
    assert all(set(facts) == {"recorded", "written", "shape"} for facts in columns.values())
    assert columns["hidden"] == {"recorded": "bfloat16", "written": "float32", "shape": [6]}
    assert columns["logits"] == {"recorded": "bfloat16", "written": "float32", "shape": [3]}
    recorded = {name: facts["recorded"] for name, facts in columns.items()}
    assert recorded["row_id"] == recorded["n_epoch"] == "int64"
    assert {name: recorded[name] for name in ("int", "float", "bool", "str", "bytes")} == {
        name: name for name in ("int", "float", "bool", "str", "bytes")
    }
    label = content["tables"]["ground_truth"]["columns"]["label"]
    assert label["recorded"] == "int64" and label["shape"] == []


@pytest.mark.parametrize(("epoch", "rows"), [(None, 12), (0, 4), (np.int64(1), 4), (-1, 4), (99, 0)])
def test_n_epoch_selects_what_is_exported(epoch: Any, rows: int, make_tracer: Any, tmp_path: Path) -> None:
    path = filled(make_tracer).export(tmp_path / "out.zip", n_epoch=epoch)
    exported = load_export(path)
    assert exported.num_rows("extracted_feature") == exported.num_rows("ground_truth") == rows
    assert manifest(path)["rows_recorded"] == manifest(path)["rows_written"] == rows
    if epoch is not None and rows:
        assert list(exported.epochs) == [epoch]


@pytest.mark.parametrize("method", ["export", "upload", "wait_for_save"])
@pytest.mark.parametrize(
    ("epoch", "kind"), [(-2, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_other_values_of_n_epoch_are_refused(
    method: str,
    epoch: Any,
    kind: type[Exception],
    make_tracer: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with refused(kind):
        getattr(filled(make_tracer), method)(n_epoch=epoch)
    assert os.listdir(tmp_path / "empty") == []


def test_nothing_recorded_is_an_archive_with_empty_tables(make_tracer: Any, tmp_path: Path) -> None:
    path = make_tracer().export(tmp_path / "out.zip")
    content = manifest(path)
    assert content["rows_recorded"] == content["rows_written"] == 0
    assert all(facts["rows"] == 0 for facts in content["tables"].values())
    exported = load_export(path)
    assert exported.num_rows("extracted_feature") == exported.num_rows("ground_truth") == 0
    assert list(exported.epochs) == []


def test_two_exports_of_the_same_rows_are_equal_byte_for_byte(make_tracer: Any, tmp_path: Path) -> None:
    tracer = filled(make_tracer)
    first = tracer.export(tmp_path / "first.zip").read_bytes()
    os.utime(tmp_path / "first.zip", (1, 1))
    assert tracer.export(tmp_path / "sub" / "second.zip").read_bytes() == first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        written = [time.mktime((*info.date_time, 0, 0, -1)) for info in archive.infolist()]
    assert all(abs(time.time() - moment) > 86_400 for moment in written), (
        "the clock of the export is in the file"
    )


def test_exports_of_a_closed_tracer_are_equal_too(make_tracer: Any, tmp_path: Path) -> None:
    tracer = filled(make_tracer)
    tracer.close()
    first = tracer.export(tmp_path / "first.zip").read_bytes()
    assert tracer.export(tmp_path / "second.zip").read_bytes() == first


def test_dedupe_is_the_default_and_counted(make_tracer: Any, tmp_path: Path) -> None:
    for attempt in range(2):
        tracer = make_tracer()
        x, y, ids = batch(4)
        tracer(x + attempt, y, ids, n_epoch=0)
        tracer(x + attempt, y, ids, n_epoch=None)
        tracer.close()
    path = tracer.export(tmp_path / "deduped.zip")
    content = manifest(path)
    assert (content["rows_recorded"], content["rows_written"], content["rows_deduplicated"]) == (16, 12, 4)
    exported = load_export(path)
    assert exported.num_rows("ground_truth") == 12
    hidden = by_id(exported.arrays("extracted_feature", n_epoch=0), "hidden")
    assert np.array_equal(np.stack([hidden[k] for k in ids]), Net().body(x + 1).detach().numpy())
    every = tracer.export(tmp_path / "all.zip", dedupe=False)
    content = manifest(every)
    assert (content["rows_recorded"], content["rows_written"], content["rows_deduplicated"]) == (16, 16, 0)


def test_export_flushes_first(make_tracer: Any, tmp_path: Path) -> None:
    from ml_debugger import TracerConfig

    tracer = make_tracer(config=TracerConfig(commit_interval_s=3600.0))
    tracer(*batch(5))
    assert load_export(tracer.export(tmp_path / "out.zip")).num_rows("extracted_feature") == 5


def test_recording_goes_on_after_an_export(make_tracer: Any, tmp_path: Path) -> None:
    tracer = filled(make_tracer)
    tracer.export(tmp_path / "a.zip")
    tracer(*batch(4, 9), n_epoch=1)
    assert load_export(tracer.export(tmp_path / "b.zip")).num_rows("extracted_feature") == 16
    assert load_export(tmp_path / "a.zip").num_rows("extracted_feature") == 12
