"""`TracedTrainer`: the real Trainer, with ids that travel in the batch."""

from __future__ import annotations

import importlib.util
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ml_debugger import open_trace
from ml_debugger.errors import InvalidInputError
from ml_debugger.integrations import WithIds
from ml_debugger.training import ClassificationTracer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what they warn about while they are imported is not ours
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    Trainer, TrainingArguments = transformers.Trainer, transformers.TrainingArguments

from ml_debugger.integrations.transformers import TracedTrainer, TracerMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SAMPLES = 10
INPUTS = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(SAMPLES) % 3
NAMES = [f"text-{number}" for number in range(SAMPLES)]


class Model(nn.Module):
    """Like a model of transformers: keywords, a loss if there are labels, a mapping as output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)
        self.given: list[set[str]] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(x).relu())
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Samples(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": INPUTS[index], "labels": int(LABELS[index]), "source": "a column that nobody uses"}


DATA: Any = WithIds(Samples(), NAMES)


def arguments(folder: Path, **options: Any) -> Any:
    fixed = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        "seed": 1,
    }
    return TrainingArguments(**{**fixed, **options})


def rows(data_dir: Path, **options: Any) -> dict[str, Any]:
    trace = open_trace("m", "v", data_dir=data_dir)
    features, truth = (trace.arrays(table, **options) for table in ("extracted_feature", "ground_truth"))
    assert np.array_equal(features["row_id"], truth["row_id"])
    found = features | {"label": truth["label"]}
    positions = [NAMES.index(identity) for identity in found["input_id"]]
    assert np.array_equal(found["label"], LABELS[positions].numpy())  # the ids are those of the samples
    return found


def test_training_and_evaluation_are_recorded_with_the_right_ids(data_dir: Path, tmp_path: Path) -> None:
    model = Model()
    body: list[torch.Tensor] = []
    model.body.register_forward_pre_hook(lambda _, given: body.append(given[0].clone()))
    with ClassificationTracer(model, "m", "v", {"body": "body"}) as tracer:
        trainer = TracedTrainer(
            model,
            arguments(tmp_path, num_train_epochs=3, gradient_accumulation_steps=2, eval_strategy="epoch"),
            train_dataset=DATA,
            eval_dataset={"near": DATA, "far": torch.utils.data.Subset(DATA, [7, 2])},
            tracer=tracer,
        )
        trainer.train()
        assert tracer.stats().rows_submitted == 3 * (10 + 10 + 2)
    trained = rows(data_dir, dataset_type="train")
    orders = [trained["input_id"][trained["n_epoch"] == epoch].tolist() for epoch in range(3)]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    assert orders[0] != orders[1] != orders[2]  # shuffled
    seen = torch.cat(body)
    everything = open_trace("m", "v", data_dir=data_dir).arrays("extracted_feature")
    assert np.array_equal(INPUTS[[NAMES.index(one) for one in everything["input_id"]]].numpy(), seen.numpy())
    far = rows(data_dir, dataset_type="val_far")
    assert far["n_epoch"].tolist() == [0, 0, 1, 1, 2, 2]
    assert far["input_id"].tolist() == [NAMES[7], NAMES[2]] * 3
    assert len(rows(data_dir, dataset_type="val_near")["label"]) == 30


def test_the_users_run_is_bit_for_bit_the_same(data_dir: Path, tmp_path: Path) -> None:
    def train(traced: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = Model()
        options = {"train_dataset": DATA if traced else Samples(), "eval_dataset": None}
        if traced:
            with ClassificationTracer(model, "m", "v") as tracer:
                TracedTrainer(model, arguments(tmp_path), tracer=tracer, **options).train()
        else:
            Trainer(model, arguments(tmp_path), **options).train()
        return list(model.state_dict().values())

    for one, other in zip(train(False), train(True), strict=True):
        assert torch.equal(one, other)


def test_evaluate_and_predict_alone_have_no_epoch(data_dir: Path, tmp_path: Path) -> None:
    model = Model()
    with ClassificationTracer(model, "m", "v") as tracer:
        trainer = TracedTrainer(model, arguments(tmp_path), eval_dataset=DATA, tracer=tracer)
        metrics = trainer.evaluate()
        predicted = trainer.predict(torch.utils.data.Subset(DATA, [4, 1]))
    assert np.isfinite(metrics["eval_loss"])
    found = rows(data_dir, n_epoch=-1)
    assert found["dataset_type"].tolist() == ["val"] * 10 + ["test"] * 2
    assert found["input_id"].tolist() == [*NAMES, NAMES[4], NAMES[1]]
    assert np.array_equal(found["logits"][10:], predicted.predictions)


def test_a_resumed_training_goes_on_with_its_epoch(data_dir: Path, tmp_path: Path) -> None:
    def train(*resume: bool) -> None:
        torch.manual_seed(0)
        model = Model()
        with ClassificationTracer(model, "m", "v") as tracer:
            options = arguments(tmp_path, num_train_epochs=2 if resume else 1, save_strategy="epoch")
            TracedTrainer(model, options, train_dataset=DATA, tracer=tracer).train(*resume)

    train()
    train(True)
    trace = open_trace("m", "v", data_dir=data_dir)
    assert [(epoch, trace.num_rows("ground_truth", n_epoch=epoch)) for epoch in trace.epochs] == [
        (0, 10),
        (1, 10),
    ]


@pytest.mark.parametrize("remove", [True, False])
def test_own_collators_and_mixins_see_no_ids(data_dir: Path, tmp_path: Path, remove: bool) -> None:
    given: list[set[str]] = []

    def collate(samples: list[dict[str, Any]]) -> Any:
        given.append(set(samples[0]))
        return UserDict(
            {
                "x": torch.stack([sample["x"] for sample in samples]),
                "labels": torch.tensor([sample["labels"] for sample in samples]),
            }
        )

    class Own(TracerMixin, Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            assert set(inputs) == {"x", "labels"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = Model()
    fields = [{"name": "norm", "type": "float"}]
    with ClassificationTracer(model, "m", "v", additional_fields=fields) as tracer:
        Own(
            model,
            arguments(tmp_path, remove_unused_columns=remove, num_train_epochs=1),
            train_dataset=WithIds(Samples(), NAMES, key="name"),
            data_collator=collate,
            tracer=tracer,
            ids="name",
            fields={"norm": lambda batch: batch["x"].norm(dim=1)},
        ).train()
    assert given[0] == ({"x", "labels"} if remove else {"x", "labels", "source"})
    found = rows(data_dir)
    positions = [NAMES.index(identity) for identity in found["input_id"]]
    assert np.allclose(found["norm"], INPUTS[positions].norm(dim=1).numpy())


def test_samples_without_ids_are_refused_by_name(data_dir: Path, tmp_path: Path) -> None:
    model = Model()
    with ClassificationTracer(model, "m", "v") as tracer:
        trainer = TracedTrainer(model, arguments(tmp_path), train_dataset=Samples(), tracer=tracer)
        with pytest.raises(InvalidInputError, match="a sample has no id: expected a mapping with the key"):
            trainer.train()
        assert tracer.stats().rows_submitted == 0


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="datasets is not installed")
def test_a_column_of_a_hugging_face_dataset_is_kept(data_dir: Path, tmp_path: Path) -> None:
    import datasets

    columns = {"x": INPUTS.tolist(), "labels": LABELS.tolist(), "id": NAMES, "unused": NAMES}
    model = Model()
    with ClassificationTracer(model, "m", "v") as tracer:
        TracedTrainer(
            model,
            arguments(tmp_path),
            train_dataset=datasets.Dataset.from_dict(columns),
            tracer=tracer,
            ids="id",
        ).train()
    assert sorted(rows(data_dir, n_epoch=1)["input_id"]) == sorted(NAMES)
