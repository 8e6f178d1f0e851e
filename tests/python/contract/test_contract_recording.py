"""Contract 3: the call. Same object returned; model_input forms; ground_truth forms; input_ids forms;
columns; containers of outputs; logits; empty batches; threads."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, Speaker, batch, by_id, nothing_visible, rows_of, same_array
from torch import nn

from ml_debugger import load_export, open_trace


def features(**kwargs: Any) -> dict[str, Any]:
    return open_trace("net", "v1").arrays("extracted_feature", **kwargs)


def truth(**kwargs: Any) -> dict[str, Any]:
    return open_trace("net", "v1").arrays("ground_truth", **kwargs)


def test_the_call_returns_the_models_output_the_same_object(make_tracer: Any) -> None:
    model = Net()
    outputs: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    tracer = make_tracer(model, layers={"hidden": "body"})
    assert tracer(*batch(3)) is outputs[0]
    assert tracer(*batch(3), dataset_type="val", n_epoch=2) is outputs[1]


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.saw: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.saw.append((args, kwargs))
        return self.head(kwargs["x"] if kwargs else args[0])


X = torch.ones(2, 4)
FORMS = {
    "tensor": (X, ((X,), {})),
    "tuple": ((X, 5), ((X, 5), {})),
    "list": ([X, "flag"], ((X, "flag"), {})),
    "dict": ({"x": X, "mask": None}, ((), {"x": X, "mask": None})),
    "ordered mapping": (OrderedDict(x=X), ((), {"x": X})),
    "mapping proxy": (MappingProxyType({"x": X}), ((), {"x": X})),
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_model_input_is_one_argument_positional_or_keywords(form: str, make_tracer: Any) -> None:
    model_input, (args, kwargs) = FORMS[form]
    model = Keyword()
    tracer = make_tracer(model, layers={"out": "head"})
    tracer(model_input, None, ["a", "b"])
    seen_args, seen_kwargs = model.saw[0]
    assert len(seen_args) == len(args) and all(s is a for s, a in zip(seen_args, args, strict=True))
    assert list(seen_kwargs) == list(kwargs) and all(seen_kwargs[k] is kwargs[k] for k in kwargs)


TRUTHS = {
    "int64 tensor": (torch.tensor([0, 2, 1]), np.array([0, 2, 1])),
    "int32 tensor": (torch.tensor([0, 2, 1], dtype=torch.int32), np.array([0, 2, 1], dtype=np.int32)),
    "uint8 array": (np.array([0, 2, 1], dtype=np.uint8), np.array([0, 2, 1], dtype=np.uint8)),
    "list of ints": ([0, 2, 1], np.array([0, 2, 1], dtype=np.int64)),
    "list of floats": ([0.0, 0.1, 1.0], np.array([0.0, 0.1, 1.0], dtype=np.float64)),
    "soft tensor": (torch.eye(3), np.eye(3, dtype=np.float32)),
    "soft list": ([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]], np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])),
    "soft array": (np.eye(3, dtype=np.float16), np.eye(3, dtype=np.float16)),
}


@pytest.mark.parametrize("form", sorted(TRUTHS))
def test_ground_truth_is_a_tensor_array_or_list(form: str, make_tracer: Any) -> None:
    given, expected = TRUTHS[form]
    tracer = make_tracer()
    x, _, ids = batch(3)
    tracer(x, given, ids)
    tracer.flush()
    labels = by_id(truth(), "label")
    assert same_array(np.stack([labels[i] for i in ids]), expected)


def test_ground_truth_of_a_graph_is_recorded_as_values(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, _, ids = batch(3)
    soft = torch.full((3, 3), 0.25, requires_grad=True)
    tracer(x, soft * 2, ids)
    tracer.flush()
    assert same_array(
        np.stack(list(by_id(truth(), "label").values())), np.full((3, 3), 0.5, dtype=np.float32)
    )


def test_none_is_logging_mode_and_may_be_mixed(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, _ = batch(2)
    for i, ground_truth in enumerate([None, y, None, y]):
        tracer(x, ground_truth, [f"{i}-0", f"{i}-1"])
    tracer.flush()
    assert rows_of() == 8
    assert sorted(truth()["input_id"]) == ["1-0", "1-1", "3-0", "3-1"]


def test_a_ground_truth_row_has_the_row_id_of_its_feature_row(make_tracer: Any) -> None:
    tracer = make_tracer()
    for i in range(4):
        x, y, ids = batch(3, i)
        tracer(x, y if i % 2 else None, ids)
    tracer.flush()
    row_ids = by_id(features(), "row_id")
    assert len(set(row_ids.values())) == 12
    assert features()["row_id"].dtype == np.int64
    for input_id, row_id in by_id(truth(), "row_id").items():
        assert row_ids[input_id] == row_id


IDS = {
    "list of str": (["x", "ü", "模"], ["x", "ü", "模"]),
    "tuple of int": ((1, -2, 10**15), ["1", "-2", "1000000000000000"]),
    "mixed": (["a", 7, np.int64(8)], ["a", "7", "8"]),
    "int array": (np.array([5, 6, 7], dtype=np.int32), ["5", "6", "7"]),
    "text array": (np.array(["p", "qq", "r"]), ["p", "qq", "r"]),
    "object array": (np.array(["p", 3, "r"], dtype=object), ["p", "3", "r"]),
    "integer tensor": (torch.tensor([3, 2, 1]), ["3", "2", "1"]),
    "uint8 tensor": (torch.tensor([3, 2, 255], dtype=torch.uint8), ["3", "2", "255"]),
    "empty and repeated": (["", "same", "same"], ["", "same", "same"]),
    "long, newline, path": (["x" * 10_000, "a\nb", "../../x"], ["x" * 10_000, "a\nb", "../../x"]),
}


@pytest.mark.parametrize("form", sorted(IDS))
def test_input_ids_are_stored_as_text(form: str, make_tracer: Any) -> None:
    given, expected = IDS[form]
    tracer = make_tracer()
    x, y, _ = batch(3)
    tracer(x, y, given)
    tracer.flush()
    for table in ("extracted_feature", "ground_truth"):
        data = open_trace("net", "v1").tensors(table)
        order = np.argsort(np.asarray(data["row_id"]))
        assert [data["input_id"][int(i)] for i in order] == expected


def test_an_id_is_the_same_id_in_whatever_form_it_comes(make_tracer: Any, tmp_path: Path) -> None:
    tracer = make_tracer()
    forms = [[7, 8], ["7", "8"], torch.tensor([7, 8], dtype=torch.uint8), np.array([7, 8]), range(7, 9)]
    for form in forms:
        x, y, _ = batch(2)
        tracer(x, y, form, "train", 0)
    exported = load_export(tracer.export(tmp_path / "out.zip", n_epoch=0))
    everything = load_export(tracer.export(tmp_path / "all.zip", dedupe=False))
    trace = open_trace("net", "v1")
    for table in ("extracted_feature", "ground_truth"):
        assert trace.num_rows(table) == everything.num_rows(table) == 2 * len(forms)
        assert trace.num_rows(table, dedupe=True) == exported.num_rows(table) == 2
        for source in (trace, everything):
            assert source.tensors(table)["input_id"] == ["7", "8"] * len(forms)
            arrays = source.arrays(table)
            assert arrays["input_id"].dtype.kind == "U"
            ids = [text for rows in source.iter_batches(table, batch_size=3) for text in rows["input_id"]]
            assert ids == arrays["input_id"].tolist() == ["7", "8"] * len(forms)
        newest = trace.tensors(table, dedupe=True)
        assert newest["row_id"].tolist() == exported.tensors(table)["row_id"].tolist()
        assert newest["row_id"].tolist() == sorted(trace.tensors(table)["row_id"].tolist())[-2:]


def test_the_columns_of_the_two_tables(make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "camera", "type": "str"}])
    x, y, ids = batch(3)
    tracer(x, y, ids, "val", 4, camera="left")
    tracer.flush()
    trace = open_trace("net", "v1")
    common = {"row_id", "input_id", "dataset_type", "n_epoch"}
    assert set(trace.columns("extracted_feature")) == common | {"hidden", "logits", "camera"}
    assert set(trace.columns("ground_truth")) == common | {"label"}
    for data in (features(), truth()):
        assert list(data["dataset_type"]) == ["val"] * 3
        assert list(data["n_epoch"]) == [4] * 3


def test_no_epoch_is_minus_one_and_dataset_type_train_by_default(make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(2))
    tracer.flush()
    assert list(features()["n_epoch"]) == [-1, -1]
    assert list(features()["dataset_type"]) == ["train", "train"]
    assert list(truth()["n_epoch"]) == [-1, -1]


@pytest.mark.parametrize("epoch", [0, 7, np.int64(7), np.uint8(3), 10**9])
def test_n_epoch_is_an_int_numpy_integers_too(epoch: Any, make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(2), n_epoch=epoch)
    tracer.flush()
    assert list(open_trace("net", "v1").epochs) == [int(epoch)]


@pytest.mark.parametrize("name", ["train", "größe", "a/b", "x" * 1000])
def test_dataset_type_is_text(name: str, make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(2), dataset_type=name)
    tracer.flush()
    assert open_trace("net", "v1").tensors("extracted_feature")["dataset_type"] == [name, name]


@dataclasses.dataclass
class Box:
    note: str
    scale: torch.Tensor
    hidden: torch.Tensor


Pair = namedtuple("Pair", ["first", "second"])
CONTAINERS = {
    "tensor": lambda x: x * 2,
    "tuple": lambda x: (x * 2, x * 3),
    "list": lambda x: [x * 2, x * 3],
    "namedtuple": lambda x: Pair(x * 2, x * 3),
    "mapping": lambda x: {"first": x * 2, "second": x * 3},
    "dataclass": lambda x: Box("note", torch.ones(7), x * 2),
    "scalar before it": lambda x: (torch.tensor(1.0), torch.ones(len(x) + 1, 2), x * 2),
    "none before it": lambda x: (None, "text", x * 2),
}


@pytest.mark.parametrize("form", sorted(CONTAINERS))
def test_the_first_tensor_with_the_batch_size_is_the_column(form: str, make_tracer: Any) -> None:
    tracer = make_tracer(Speaker(CONTAINERS[form]), layers={"seen": "layer"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    seen = by_id(features(), "seen")
    assert same_array(np.stack([seen[i] for i in ids]), (x * 2).numpy())


class Answers(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(self.head(x))


@dataclasses.dataclass
class WithLogits:
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: {"hidden": z * 9, "logits": z},
        lambda z: WithLogits(torch.tensor(0.0), z),
        lambda z: (z, z * 9),
    ],
    ids=["tensor", "mapping", "dataclass", "tuple"],
)
def test_logits_are_the_output_itself_or_its_logits(wrap: Any, make_tracer: Any) -> None:
    model = Answers(wrap)
    tracer = make_tracer(model, layers={"out": "head"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    logits = by_id(features(), "logits")
    assert same_array(np.stack([logits[i] for i in ids]), model.head(x).detach().numpy())


def test_an_empty_batch_stores_nothing(make_tracer: Any) -> None:
    tracer = make_tracer()
    output = tracer(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])
    assert output.shape == (0, 3)
    nothing_visible(tracer)
    tracer(*batch(2))
    nothing_visible(tracer, rows=2)


def test_a_forward_outside_the_call_records_nothing(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})
    model(batch(5)[0])
    tracer(*batch(2))
    model(batch(5)[0])
    nothing_visible(tracer, rows=2)


def test_calls_from_several_threads_do_not_mix(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})

    def train(thread: int) -> None:
        for i in range(20):
            x, y, ids = batch(4, 100 * thread + i)
            tracer(x, y, ids, n_epoch=thread)

    threads = [threading.Thread(target=train, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracer.flush()
    data = features()
    hidden, label = by_id(data, "hidden"), by_id(truth(), "label")
    assert len(hidden) == 320
    for thread in range(4):
        for i in range(20):
            x, y, ids = batch(4, 100 * thread + i)
            assert same_array(np.stack([hidden[k] for k in ids]), model.body(x).detach().numpy())
            assert [int(label[k]) for k in ids] == y.tolist()
