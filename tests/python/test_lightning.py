"""The Lightning callback, driven by the real Trainer: every batch once, with its ids, labels and epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ml_debugger import open_trace
from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.integrations import CollateWithIds, WithIds
from ml_debugger.training import ClassificationTracer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it warns about while it is imported is not ours
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from ml_debugger.integrations.lightning import TracerCallback  # noqa: E402

SAMPLES = 10
INPUTS = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(SAMPLES) % 3
NAMES = [f"img{number}" for number in range(SAMPLES)]


class Module(pl.LightningModule):
    """An ordinary user's module: it knows nothing of a tracer."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(*, shuffle: bool = False, first: int = 0, ids: Any = None) -> DataLoader[Any]:
    dataset = WithIds(TensorDataset(INPUTS, LABELS), NAMES if ids is None else ids)
    return DataLoader(
        torch.utils.data.Subset(dataset, range(first, SAMPLES)),
        batch_size=4,
        shuffle=shuffle,
        collate_fn=CollateWithIds(),
    )


def make_callback(**options: Any) -> TracerCallback:
    options = {"ids": 2, "labels": 1, **options}
    return TracerCallback(lambda module: ClassificationTracer(module.net, "m", "v"), **options)


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{"max_epochs": 2, **quiet, **options})


def rows(data_dir: Path, **options: Any) -> dict[str, Any]:
    trace = open_trace("m", "v", data_dir=data_dir)
    features = trace.arrays("extracted_feature", **options)
    labels = trace.arrays("ground_truth", **options)
    assert set(labels["row_id"]) <= set(features["row_id"])
    by_row = dict(zip(labels["row_id"].tolist(), labels["label"].tolist(), strict=True))
    return features | {"label": [by_row.get(row) for row in features["row_id"].tolist()]}


def check_labels(found: dict[str, Any]) -> None:
    for identity, label in zip(found["input_id"].tolist(), found["label"], strict=True):
        assert label == int(LABELS[NAMES.index(identity)])


def test_fit_records_each_sample_once_an_epoch_under_shuffling(data_dir: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, str, torch.Tensor]] = []

    class Watched(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            logits = self.net(batch[0])
            seen.extend(
                (self.current_epoch, name, one.detach().clone())
                for name, one in zip(batch[2], logits, strict=True)
            )
            return nn.functional.cross_entropy(logits, batch[1])

    callback = make_callback()
    trainer = make_trainer(tmp_path, callback, max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(Watched(), loader(shuffle=True), loader(first=6))
    found = rows(data_dir, dataset_type="train")
    assert found["n_epoch"].tolist() == [epoch for epoch, *_ in seen]
    assert found["input_id"].tolist() == [name for _, name, _ in seen]
    assert np.array_equal(found["logits"], torch.stack([one for *_, one in seen]).numpy())
    check_labels(found)
    validated = rows(data_dir, dataset_type="val")
    assert validated["n_epoch"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert validated["input_id"].tolist() == NAMES[6:] * 3
    check_labels(validated)
    assert callback.tracer is not None
    assert callback.tracer.stats().rows_committed == 3 * (10 + 4)


def test_the_users_run_is_bit_for_bit_the_same(data_dir: Path, tmp_path: Path) -> None:
    def train(*callbacks: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        module = Module(nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Linear(6, 3)))
        make_trainer(tmp_path, *callbacks).fit(module, loader(shuffle=True), loader())
        return [*module.state_dict().values(), torch.get_rng_state()]

    for one, other in zip(train(), train(make_callback()), strict=True):
        assert torch.equal(one, other)


def test_evaluation_stages_are_recorded_without_an_epoch(data_dir: Path, tmp_path: Path) -> None:
    callback, module = make_callback(), Module()
    trainer = make_trainer(tmp_path, callback)
    trainer.test(module, loader(), verbose=False)
    trainer.validate(module, [loader(), loader(first=8)], verbose=False)
    trainer.predict(module, loader())
    found = rows(data_dir, n_epoch=-1)
    kinds = found["dataset_type"].tolist()
    assert {kind: kinds.count(kind) for kind in kinds} == {"test": 10, "val": 10, "val_1": 2, "predict": 10}
    predicted = np.array(kinds) == "predict"
    assert [label for label, one in zip(found["label"], predicted, strict=True) if one] == [None] * 10
    assert found["input_id"][predicted].tolist() == NAMES
    assert open_trace("m", "v", data_dir=data_dir).epochs == [-1]
    assert callback.tracer is not None and not module.net._forward_hooks


@pytest.mark.parametrize("as_type", [None, "sanity"])
def test_sanity_check_is_left_out_or_kept_apart(data_dir: Path, tmp_path: Path, as_type: str | None) -> None:
    callback = make_callback(sanity_check=as_type)
    trainer = make_trainer(tmp_path, callback, max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(Module(), loader(), loader(first=6))
    found = rows(data_dir)
    assert found["dataset_type"].tolist().count("val") == 4
    assert found["dataset_type"].tolist().count("sanity") == (0 if as_type is None else 4)
    assert set(found["n_epoch"][found["dataset_type"] == "sanity"].tolist()) <= {-1}


def test_resumed_fit_goes_on_with_its_epoch(data_dir: Path, tmp_path: Path) -> None:
    first = make_trainer(tmp_path, make_callback(), max_epochs=2)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "two.ckpt")
    second = make_trainer(tmp_path, make_callback(), max_epochs=3)
    second.fit(Module(), loader(), ckpt_path=str(tmp_path / "two.ckpt"))
    trace = open_trace("m", "v", data_dir=data_dir)
    assert trace.epochs == [0, 1, 2] and trace.attempts == [0, 1]
    assert [trace.num_rows("extracted_feature", n_epoch=epoch) for epoch in range(3)] == [10, 10, 10]


def test_mixed_precision_is_recorded_as_it_is_computed(data_dir: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, make_callback(), max_epochs=1, precision="bf16-mixed").fit(Module(), loader())
    assert (
        open_trace("m", "v", data_dir=data_dir).tensors("extracted_feature")["logits"].dtype == torch.bfloat16
    )


def test_a_failing_step_passes_its_exception_and_saves_what_is_complete(
    data_dir: Path, tmp_path: Path
) -> None:
    class OwnError(Exception):
        pass

    class Failing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 1:
                raise OwnError
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(OwnError):
        make_trainer(tmp_path, make_callback()).fit(module, loader())
    assert rows(data_dir)["input_id"].tolist() == NAMES[:4]
    assert not module.net._forward_hooks


def test_a_skipped_batch_is_not_recorded(data_dir: Path, tmp_path: Path) -> None:
    class Skipping(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None  # ends the epoch

        def on_train_epoch_end(self) -> None:
            self.net(INPUTS[4:8])  # as many samples as the batch that was skipped

    make_trainer(tmp_path, make_callback()).fit(Skipping(), loader())
    assert rows(data_dir)["input_id"].tolist() == NAMES[:4] * 2


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (lambda net, x: net(x) + net(x), InvalidInputError, "a second time"),
        (lambda net, x: net.forward(x), AliasNotCapturedError, "did not run"),
    ],
)
def test_steps_that_do_not_run_the_module_once_are_named(
    data_dir: Path, tmp_path: Path, step: Callable[..., Any], error: type[Exception], message: str
) -> None:
    class Odd(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return step(self.net, batch[0]).sum()

    with pytest.raises(error, match=message):
        make_trainer(tmp_path, make_callback()).fit(Odd(), loader())


def test_places_may_be_keys_and_callables_and_a_wrong_one_is_named(data_dir: Path, tmp_path: Path) -> None:
    class Keyed(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])

    samples: Any = [{"image": one, "label": int(label)} for one, label in zip(INPUTS, LABELS, strict=True)]
    data = DataLoader(WithIds(samples, NAMES), batch_size=4)

    def make(module: Keyed) -> ClassificationTracer:
        fields = [{"name": "mean", "type": "float"}]
        return ClassificationTracer(module.net, "m", "v", additional_fields=fields)

    callback = TracerCallback(
        make, ids="input_id", labels="label", fields={"mean": lambda batch: batch["image"].mean(1)}
    )
    make_trainer(tmp_path, callback, max_epochs=1).fit(Keyed(), data)
    found = rows(data_dir)
    assert found["input_id"].tolist() == NAMES
    assert np.allclose(found["mean"], INPUTS.mean(1).numpy())
    wrong = TracerCallback(make, ids="name", labels="label")
    with pytest.raises(InvalidInputError, match="ids should stand at 'name' of the batch, got a dict with"):
        make_trainer(tmp_path, wrong).fit(Keyed(), data)


def test_ranks_of_a_distributed_fit_record_their_own_samples(data_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, make_callback(), strategy="ddp_fork", devices=2, max_epochs=2, num_sanity_val_steps=0
    )
    trainer.fit(Module(), loader(shuffle=True), loader())
    trace = open_trace("m", "v", data_dir=data_dir)
    for epoch in range(2):
        for kind in ("train", "val"):
            found = trace.arrays("extracted_feature", n_epoch=epoch, dataset_type=kind, dedupe=True)
            assert sorted(found["input_id"]) == sorted(NAMES)
    check_labels(rows(data_dir, dedupe=True))
    assert len(list(data_dir.glob("*/*/rank-*"))) == 2


def test_the_other_lightning_package_takes_the_same_callback(data_dir: Path, tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):  # type: ignore[misc, name-defined]
        net: nn.Module
        __init__ = Module.__init__
        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    module = other.LightningModule.__new__(Other)
    other.LightningModule.__init__(module)
    module.net = nn.Linear(5, 3)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = other.Trainer(
        callbacks=[make_callback()],
        max_epochs=1,
        accelerator="cpu",
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(module, loader())
    assert rows(data_dir)["input_id"].tolist() == NAMES
