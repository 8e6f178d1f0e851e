"""Contract 5: the bytes on disk are documented well enough that stock lmdb and msgpack read them; counters of
stats() against what a second process reads; segments stay sound through everything."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_children import verify_segments
from contract_models import batch, by_id, carrier_tracer, carry, raw_bytes

from ml_debugger import TracerConfig, open_trace

FIELDS = [{"name": kind, "type": kind} for kind in ("int", "float", "bool", "str", "bytes", "tensor")]


def cells(row: dict[str, Any], table: str = "extracted_feature") -> dict[str, Any]:
    return {name: value for owner, name, value in row["cells"] if owner == table}


@pytest.fixture
def rich(make_tracer: Any) -> Any:
    """Labelled and unlabelled calls, epochs and none, fields of every type, one a batch and one a sample."""
    tracer = carrier_tracer(
        make_tracer,
        additional_fields=FIELDS,
        additional_label_fields=[{"name": "annotator", "type": "str"}],
        config=TracerConfig(commit_interval_s=0.02),
    )
    for call in range(6):
        each = call % 2 == 0
        carry(
            tracer,
            torch.randn(3, 4 + call),
            [f"{call}-{i}" for i in range(3)],
            ground_truth=[0, 1, 2] if call % 3 else None,
            dataset_type=f"kind{call}",
            n_epoch=None if call == 5 else call // 2,
            int=[1, -2, 3] if each else 4,
            float=[0.5, 1.5, -0.0] if each else 2.5,
            bool=[True, False, True] if each else True,
            str=["", "ü", "c"] if each else "one",
            bytes=[b"", b"\x00", b"c"] if each else b"one",
            tensor=torch.arange(6.0).reshape(3, 2) + call,
            annotator="ann",
        )
    tracer.flush()
    return tracer


@pytest.mark.parametrize("state", ["live", "closed"])
def test_a_strangers_reader_sees_what_our_reader_sees(state: str, rich: Any, foreign_read: Any) -> None:
    if state == "closed":
        rich.close()
    rows = foreign_read()["rows"]
    ours = open_trace("net", "v1").tensors("extracted_feature")
    by_row = {int(row_id): i for i, row_id in enumerate(ours["row_id"])}
    assert len(rows) == 18 and {row["row_id"] for row in rows} == set(by_row)
    for row in rows:
        i, seen = by_row[row["row_id"]], cells(row)
        assert seen["input_id"] == ours["input_id"][i] and row["dataset_type"] == ours["dataset_type"][i]
        assert (-1 if row["epoch"] is None else row["epoch"]) == int(ours["n_epoch"][i])
        for name in ("tap", "logits", "tensor"):
            assert seen[name] == raw_bytes(ours[name][i]), name
        assert struct.unpack("<q", seen["int"])[0] == int(ours["int"][i])
        assert struct.pack("<d", float(ours["float"][i])) == seen["float"]
        assert bool(seen["bool"][0]) is bool(ours["bool"][i])
        assert (seen["str"], seen["bytes"]) == (ours["str"][i], ours["bytes"][i])


def test_a_strangers_reader_sees_the_ground_truth(rich: Any, foreign_read: Any) -> None:
    truth = open_trace("net", "v1").tensors("ground_truth")
    labels = dict(zip(truth["row_id"].tolist(), truth["label"].tolist(), strict=True))
    found = {
        row["row_id"]: struct.unpack("<q", cells(row, "ground_truth")["label"])[0]
        for row in foreign_read()["rows"]
        if row["has_truth"]
    }
    assert found == labels and len(found) == 12
    annotators = [cells(r, "ground_truth").get("annotator") for r in foreign_read()["rows"] if r["has_truth"]]
    assert annotators == ["ann"] * 12


def test_a_field_of_differing_shapes_is_readable_by_a_stranger(make_tracer: Any, foreign_read: Any) -> None:
    tracer = carrier_tracer(make_tracer, additional_fields=[{"name": "boxes", "type": "tensor"}])
    boxes = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 0, 5)]
    carry(tracer, torch.zeros(3, 2), list("abc"), boxes=boxes)
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "boxes")
    assert all(torch.equal(stored[key], box) for key, box in zip("abc", boxes, strict=True))
    found = {cells(row)["input_id"]: cells(row)["boxes"] for row in foreign_read()["rows"]}
    assert found == {key: raw_bytes(box) for key, box in zip("abc", boxes, strict=True)}


def test_stats_agree_with_the_counters_that_a_second_process_reads(rich: Any, foreign_read: Any) -> None:
    stats = rich.stats()
    foreign = foreign_read()
    total = {name: sum(meta[name] for meta in foreign["meta"]) for name in foreign["meta"][0]}
    assert total["rows"] == stats.rows_committed == len(foreign["rows"]) == 18
    assert total["ground_truth_rows"] == 12
    assert total["calls"] == 6
    assert total["discarded_rows"] == stats.rows_discarded == 0
    assert foreign["gaps"] == []


@pytest.mark.parametrize("name", ["../../x", "größe 模", "...", "x" * 300])
def test_a_stranger_finds_the_trace_by_its_name(name: str, make_tracer: Any, foreign_read: Any) -> None:
    tracer = make_tracer(None, name, name)
    tracer(*batch(3))
    tracer.close()
    assert len(foreign_read(name, name)["rows"]) == 3


def test_sealed_segments_say_so_and_count_their_rows(rich: Any, store: Path) -> None:
    rich.close()
    segments = sorted(path.parent for path in store.rglob("data.mdb"))
    sealed = [json.loads((segment / "sealed.json").read_text()) for segment in segments]
    facts = [json.loads((segment / "segment.json").read_text()) for segment in segments]
    assert sum(s["rows"] for s in sealed) == 18 and sum(s["ground_truth_rows"] for s in sealed) == 12
    assert sum(s["calls"] for s in sealed) == 6
    assert {f["epoch"] for f in facts} == {0, 1, 2, None}
    assert all(f["format_version"] == 1 and f["durability"] == "power" for f in facts)
    assert all(s["format_version"] == 1 for s in sealed)


def test_files_are_private_to_the_user(rich: Any, store: Path) -> None:
    rich.close()
    for path in store.rglob("*"):
        if path.is_symlink():
            continue
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_segments_are_sound_after_drops_and_attempts(make_tracer: Any, store: Path) -> None:
    for attempt in range(3):
        tracer = make_tracer()
        for epoch in range(3):
            for call in range(10):
                tracer(*batch(4, 100 * attempt + call), n_epoch=epoch)
        tracer.drop_epoch_data(1)
        tracer.close()
    assert verify_segments(store) >= 2
    assert sorted(open_trace("net", "v1").epochs) == [0, 2]
    assert len(np.unique(open_trace("net", "v1").arrays("extracted_feature")["row_id"])) == 240


def test_a_flipped_bit_is_corrupt_data_and_never_wrong_values(make_tracer: Any, store: Path) -> None:
    from contract_models import refused

    from ml_debugger import errors

    tracer = carrier_tracer(make_tracer)
    payload = torch.full((2, 1 << 16), 1.5)
    carry(tracer, payload, ["a", "b"])
    tracer.close()
    (data,) = store.rglob("data.mdb")
    content = bytearray(data.read_bytes())
    position = content.find(struct.pack("<f", 1.5) * 64)
    assert position > 0
    content[position + 128] ^= 0x10
    data.write_bytes(content)
    with refused(errors.CorruptDataError):
        open_trace("net", "v1").arrays("extracted_feature")
