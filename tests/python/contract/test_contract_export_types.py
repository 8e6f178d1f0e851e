"""Contract 4, the ZIP: ragged columns, bytes, long text, several dtypes in a column, widening."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import by_id, carrier_tracer, carry, raw_bytes, refused, same_array

from ml_debugger import errors, load_export


def members(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(path, allow_pickle=False) as data:
        return {
            name: data[name]
            for name in data.files
            if name.startswith(("extracted_feature/", "ground_truth/"))
        }


def facts(path: Path, column: str, table: str = "extracted_feature") -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        found: dict[str, Any] = json.loads(archive.read("manifest.json"))["tables"][table]["columns"][column]
    return found


def ragged_rows(
    data: dict[str, np.ndarray[Any, Any]], column: str, table: str = "extracted_feature"
) -> dict[str, Any]:
    """Rows of a column in values/offsets/shapes form, by id."""
    prefix = f"{table}/{column}"
    assert prefix not in data
    values, offsets, shapes = (data[f"{prefix}.{part}"] for part in ("values", "offsets", "shapes"))
    ids = data[f"{table}/input_id"]
    assert offsets.shape == (len(ids) + 1,) and shapes.shape[0] == len(ids) and values.ndim == 1
    assert offsets[0] == 0 and offsets[-1] == len(values)
    rows = {}
    for i, key in enumerate(ids):
        shape = tuple(int(n) for n in shapes[i])
        lead = len(shape) - len(shape[next((k for k, n in enumerate(shape) if n != -1), len(shape)) :])
        rows[str(key)] = values[offsets[i] : offsets[i + 1]].reshape(shape[lead:])
    return rows


def test_rows_of_differing_shape_are_values_offsets_and_shapes(make_tracer: Any, tmp_path: Path) -> None:
    tracer = carrier_tracer(make_tracer)
    sent = {}
    for call, shape in enumerate([(3,), (5,), (2, 2), (0,), ()]):
        payload = torch.randn(2, *shape, dtype=torch.float64)
        ids = [f"{call}-0", f"{call}-1"]
        carry(tracer, payload, ids)
        sent.update(dict(zip(ids, payload.numpy(), strict=True)))
    path = tracer.export(tmp_path / "out.zip")
    data = members(path)
    assert data["extracted_feature/tap.values"].dtype == np.float64
    assert data["extracted_feature/tap.shapes"].shape == (10, 2)
    rows = ragged_rows(data, "tap")
    assert set(rows) == set(sent)
    assert all(same_array(rows[key], np.asarray(sent[key])) for key in sent)
    assert facts(path, "tap")["shape"] is None
    assert facts(path, "tap")["recorded"] == "float64"


def test_shorter_shapes_are_padded_in_front_with_minus_one(make_tracer: Any, tmp_path: Path) -> None:
    tracer = carrier_tracer(make_tracer)
    carry(tracer, torch.zeros(1, 3), ["flat"])
    carry(tracer, torch.zeros(1, 2, 4), ["deep"])
    data = members(tracer.export(tmp_path / "out.zip"))
    shapes = dict(
        zip(data["extracted_feature/input_id"], data["extracted_feature/tap.shapes"].tolist(), strict=True)
    )
    assert shapes == {"flat": [-1, 3], "deep": [2, 4]}


@pytest.mark.parametrize("kind", ["bytes", "long text"])
def test_bytes_and_text_wider_than_256_characters_are_uint8_values(
    kind: str, make_tracer: Any, tmp_path: Path
) -> None:
    field = {"name": "field", "type": "bytes" if kind == "bytes" else "str"}
    tracer = carrier_tracer(make_tracer, additional_fields=[field])
    given: list[Any] = [b"", b"\x00\xff", b"abc"] if kind == "bytes" else ["", "ü" * 257, "abc"]
    carry(tracer, torch.zeros(3, 2), list("abc"), field=given)
    path = tracer.export(tmp_path / "out.zip")
    data = members(path)
    rows = ragged_rows(data, "field")
    assert data["extracted_feature/field.values"].dtype == np.uint8
    assert data["extracted_feature/field.shapes"].shape == (3, 1)
    expected = [value if kind == "bytes" else value.encode() for value in given]
    assert [rows[key].tobytes() for key in "abc"] == expected
    assert facts(path, "field")["recorded"] == field["type"]
    assert load_export(path).tensors("extracted_feature")["field"][0] in given
    assert by_id(load_export(path).tensors("extracted_feature"), "field") == dict(
        zip("abc", given, strict=True)
    )


@pytest.mark.parametrize("width", [1, 256])
def test_text_up_to_256_characters_is_numpy_unicode(width: int, make_tracer: Any, tmp_path: Path) -> None:
    tracer = carrier_tracer(make_tracer, additional_fields=[{"name": "field", "type": "str"}])
    given = ["ü" * width, "", "b"]
    carry(tracer, torch.zeros(3, 2), list("abc"), field=given)
    column = members(tracer.export(tmp_path / "out.zip"))["extracted_feature/field"]
    assert column.dtype.kind == "U" and sorted(column.tolist()) == sorted(given)


def test_long_input_ids_take_the_same_form(make_tracer: Any, tmp_path: Path) -> None:
    tracer = carrier_tracer(make_tracer)
    ids = ["x" * 10_000, "short", "größe" * 100]
    carry(tracer, torch.arange(3.0).unsqueeze(1), ids, ground_truth=[0, 1, 2])
    path = tracer.export(tmp_path / "out.zip")
    data = members(path)
    for table in ("extracted_feature", "ground_truth"):
        assert data[f"{table}/input_id.values"].dtype == np.uint8 and f"{table}/input_id" not in data
    exported = load_export(path)
    stored = by_id(exported.tensors("extracted_feature"), "tap")
    assert [float(stored[key]) for key in ids] == [0.0, 1.0, 2.0]
    assert set(exported.tensors("ground_truth")["input_id"]) == set(ids)


COMMON = [
    ("float32", "float64", np.float64),
    ("int8", "int64", np.int64),
    ("float16", "bfloat16", np.float32),
    ("bfloat16", "float32", np.float32),
    ("uint8", "int16", np.int16),
    ("bool", "uint8", np.uint8),
    ("float8_e5m2", "float16", None),
]


@pytest.mark.parametrize(("first", "second", "common"), COMMON)
def test_a_column_of_several_dtypes_takes_the_common_type(
    first: str, second: str, common: Any, make_tracer: Any, tmp_path: Path
) -> None:
    tracer = carrier_tracer(make_tracer)
    sent = {}
    for name in (first, second):
        payload = torch.tensor([[0.0, 1.0]]).to(getattr(torch, name))
        carry(tracer, payload, [name])
        sent[name] = payload.double().numpy()[0]
    path = tracer.export(tmp_path / "out.zip")
    column = members(path)["extracted_feature/tap"]
    if common is not None:
        assert column.dtype == common
    rows = dict(zip(members(path)["extracted_feature/input_id"], column, strict=True))
    assert all(np.array_equal(rows[name].astype(np.float64), value) for name, value in sent.items())
    assert sorted(facts(path, "tap")["recorded"]) == sorted([first, second])


@pytest.mark.parametrize(
    ("first", "second"), [("int64", "float64"), ("uint64", "int64"), ("float32", "int64")]
)
def test_dtypes_without_a_lossless_common_type_are_a_storage_error_that_names_them(
    first: str, second: str, make_tracer: Any, tmp_path: Path
) -> None:
    tracer = carrier_tracer(make_tracer)
    for name in (first, second):
        carry(tracer, torch.ones(1, 2).to(getattr(torch, name)), [name])
    with refused(errors.StorageError) as caught:
        tracer.export(tmp_path / "out.zip")
    assert first in str(caught.value) and second in str(caught.value)
    assert not (tmp_path / "out.zip").exists()


def test_fields_of_each_type_have_their_numpy_type(make_tracer: Any, tmp_path: Path) -> None:
    kinds = {"int": (np.int64, -(2**63)), "float": (np.float64, 0.1), "bool": (np.bool_, True)}
    tracer = carrier_tracer(make_tracer, additional_fields=[{"name": k, "type": k} for k in kinds])
    carry(tracer, torch.zeros(2, 2), ["a", "b"], **{k: value for k, (_, value) in kinds.items()})
    data = members(tracer.export(tmp_path / "out.zip"))
    for kind, (dtype, value) in kinds.items():
        column = data[f"extracted_feature/{kind}"]
        assert column.dtype == dtype and column.shape == (2,) and column.tolist() == [value, value]


def test_column_names_are_members_as_they_are(make_tracer: Any, tmp_path: Path) -> None:
    from contract_models import Carrier

    tracer = make_tracer(Carrier(), layers={"größe layer.1": "taps.of_tap"})
    payload = torch.randn(2, 3)
    carry(tracer, payload, ["a", "b"])
    data = members(tracer.export(tmp_path / "out.zip"))
    assert data["extracted_feature/größe layer.1"].tobytes() == raw_bytes(payload)


def test_a_tensor_field_of_fixed_shape_is_one_array(make_tracer: Any, tmp_path: Path) -> None:
    field = {"name": "box", "type": "tensor", "dtype": "int32", "shape": [4]}
    tracer = carrier_tracer(make_tracer, additional_fields=[field])
    boxes = torch.arange(8, dtype=torch.int32).reshape(2, 4)
    carry(tracer, torch.zeros(2, 2), ["a", "b"], box=boxes)
    path = tracer.export(tmp_path / "out.zip")
    stored = members(path)["extracted_feature/box"]
    assert stored.dtype == np.int32 and stored.tobytes() == raw_bytes(boxes)
    assert facts(path, "box") == {"recorded": "int32", "written": "int32", "shape": [4]}
