"""Arguments that are rare and not wrong, or wrong in a rare way: containers, numbers, paths, endpoints."""

from __future__ import annotations

import array
import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import batch

from ml_debugger import errors, load_export, open_trace

FEATURES = "extracted_feature"


@pytest.mark.parametrize(
    "ids",
    [collections.deque("ab"), collections.UserList(["a", "b"]), array.array("q", [1, 2]), range(2)],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_come_in_any_sequence(ids: Any, make_tracer: Any) -> None:
    x, y, _ = batch(2)
    tracer = make_tracer()
    tracer(x, y, ids, n_epoch=0)
    tracer.flush()
    stored = open_trace("net", "v1").arrays(FEATURES)["input_id"]
    assert list(stored) == [str(value) for value in ids]


@pytest.mark.parametrize("ids", [[], (), np.array([]), torch.tensor([])], ids=range(4))
def test_an_empty_batch_may_have_its_ids_in_any_empty_container(ids: Any, make_tracer: Any) -> None:
    x, y, _ = batch(2)
    tracer = make_tracer()
    tracer(x[:0], y[:0], ids)
    assert tracer.stats().rows_submitted == 0


@pytest.mark.parametrize("labelled", [True, False])
def test_no_ids_for_a_batch_with_samples_is_an_error(labelled: bool, make_tracer: Any) -> None:
    x, y, _ = batch(2)
    with pytest.raises(errors.InvalidInputError):
        make_tracer()(x, y if labelled else None, [])


def test_values_of_a_field_come_in_any_sequence(make_tracer: Any) -> None:
    fields = [{"name": "weight", "type": "float"}, {"name": "camera", "type": "str"}]
    tracer = make_tracer(additional_fields=fields)
    x, y, ids = batch(2)
    tracer(x, y, ids, weight=range(2), camera=collections.deque(["left", "right"]))
    tracer.flush()
    stored = open_trace("net", "v1").arrays(FEATURES)
    assert list(stored["weight"]) == [0.0, 1.0] and list(stored["camera"]) == ["left", "right"]


@pytest.mark.parametrize("value", [2**53 + 1, [0.5, 2**53 + 1], np.int64(2**53 + 1)], ids=range(3))
def test_an_int_that_a_float_field_would_round_is_refused(value: Any, make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "weight", "type": "float"}])
    x, y, ids = batch(2)
    with pytest.raises(errors.InvalidInputError, match="weight"):
        tracer(x, y, ids, weight=value)
    tracer(x, y, ids, weight=2**53)


def test_a_time_difference_is_no_epoch(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids, n_epoch=3)
    with pytest.raises(TypeError):
        tracer(x, y, ids, n_epoch=np.timedelta64(3))
    for ask in (tracer.drop_epoch_data, tracer.export, open_trace("net", "v1").arrays):
        with pytest.raises(errors.InvalidTypeError):
            ask(*((FEATURES,) if ask.__name__ == "arrays" else ()), n_epoch=np.timedelta64(3))
    tracer.flush()
    assert open_trace("net", "v1").num_rows(FEATURES) == 2


def test_minus_one_is_part_of_what_an_epoch_below_it_is_told(make_tracer: Any) -> None:
    with pytest.raises(ValueError, match="at least -1"):
        make_tracer().export(n_epoch=-2)


@pytest.mark.parametrize("name", ["kwargs", "self", "model_input", "ground_truth", "n_epoch"])
def test_every_parameter_of_the_call_is_refused_as_a_name(name: str, make_tracer: Any) -> None:
    with pytest.raises(errors.InvalidInputError):
        make_tracer(additional_fields=[{"name": name, "type": "int"}])


def test_what_is_no_name_was_not_captured(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids)
    with pytest.raises(errors.NotFoundError):
        tracer.get_hooked_features(["hidden"])


def test_features_of_dropped_rows_are_told_gone_with_a_remedy(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids, n_epoch=0)
    tracer.drop_epoch_data(0)
    with pytest.raises(errors.NotFoundError) as caught:
        tracer.get_hooked_features("hidden")
    assert caught.value.hint


@pytest.mark.parametrize(
    "path", ["n" * 300 + ".zip", "n" * 300, "d/" * 2500, "\ud800.zip", "a\0b.zip", ""], ids=range(6)
)
def test_an_export_to_a_path_that_cannot_be_is_our_error(path: str, make_tracer: Any, tmp_path: Path) -> None:
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids)
    target = path and f"{tmp_path}/{path}"
    with pytest.raises((errors.InvalidInputError, errors.StorageError)) as caught:
        tracer.export(target)
    assert caught.value.hint
    with pytest.raises((errors.InvalidInputError, errors.NotFoundError, errors.StorageError)):
        load_export(target)


@pytest.mark.parametrize("directory", ["n" * 300, "a\0b", "\ud800", 3], ids=range(4))
def test_parquet_files_to_a_path_that_cannot_be_are_our_error(
    directory: Any, make_tracer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids)
    tracer.flush()
    target = f"{tmp_path}/{directory}" if isinstance(directory, str) else directory
    with pytest.raises(errors.MlDebuggerError):
        open_trace("net", "v1").to_parquet(FEATURES, target)


def test_a_dataset_over_an_export_is_found_from_any_directory(
    make_tracer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids)
    monkeypatch.chdir(tmp_path)
    tracer.export("out.zip")
    export = load_export("out.zip")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    copy = pickle.loads(pickle.dumps(export.dataset(FEATURES)))
    assert len(copy) == 2 and copy[0]["input_id"] == ids[0]


@pytest.mark.parametrize("blank", ["", "  "], ids=["empty", "blanks"])
def test_a_blank_endpoint_is_none(blank: str, make_tracer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.InvalidInputError):
        make_tracer(api_endpoint=blank, auto_sync=True)
    monkeypatch.setenv("MLD_API_ENDPOINT", blank)
    tracer = make_tracer()
    x, y, ids = batch(2)
    tracer(x, y, ids, n_epoch=0)
    tracer.wait_for_save()
    assert tracer.stats().rows_committed == 2


def test_a_relative_endpoint_is_that_of_the_start(
    make_tracer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    tracer = make_tracer(api_endpoint="collected")
    x, y, ids = batch(2)
    tracer(x, y, ids, n_epoch=0)
    monkeypatch.chdir(tmp_path / "second")
    tracer.wait_for_save()
    assert os.listdir(tmp_path / "second") == []
    assert open_trace("net", "v1", tmp_path / "first/collected").num_rows(FEATURES) == 2
