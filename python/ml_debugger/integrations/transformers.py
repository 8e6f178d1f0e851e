"""Hugging Face transformers: a mixin for `Trainer` that records the batches of training and evaluation.

A `TrainerCallback` never sees a batch, so it cannot know which samples a step is given. Here the ids travel
in the batch itself, beside what the collator makes, and are taken out before the model sees it. Around each
step the mixin opens `TorchTracer.recording`, which takes the forward that the step runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ml_debugger.errors import InvalidInputError
from ml_debugger.extras import require
from ml_debugger.integrations.batches import Place, take
from ml_debugger.integrations.sample_ids import KEY, CollateWithIds
from ml_debugger.tracer.recording import Recording
from ml_debugger.training import TrainingTracer

__all__ = ["TracedTrainer", "TracerMixin"]

_transformers = require("transformers", "transformers", "TracedTrainer")
# The Trainer itself says which packages it misses.
_Trainer: Any = _transformers.Trainer
_TrainerCallback: Any = importlib.import_module("transformers.trainer_callback").TrainerCallback


class TracerMixin:
    """Put in front of `Trainer` or a subclass: ``class MyTrainer(TracerMixin, Trainer)``.

    Each sample of the datasets needs an id, in a column or under a key of its own: an int or a str, as
    `WithIds` gives it. ``remove_unused_columns`` keeps that column, the collator does not see it, and neither
    does the model.

    Training batches are recorded as ``dataset_type`` ``"train"``, those of `evaluate` and `predict` under the
    prefix of their metrics, with ``"val"`` for ``"eval"`` (so also ``"val_<name>"`` for one of several
    evaluation sets). ``n_epoch`` counts from 0, after a resume too; an evaluation within `train` has the
    epoch that it comes in or after, one outside of it has none.

    Make the tracer on the very model that the Trainer is given, and close it after the training. With several
    GPUs start one process for each: `nn.DataParallel` runs copies of the model, which are not recorded.

    Args:
        *args: Of the Trainer.
        tracer: Of the model.
        ids: The key of the ids. Default ``"input_id"`` (which is not ``input_ids``, the tokens).
        labels: Where the labels stand in a batch: a key, or a callable that is given the batch. Default
            ``"labels"``; a batch without that key is recorded without labels. None records none.
        fields: Additional fields of the tracer, ``{name: place}``.
        **kwargs: Of the Trainer.

    Raises:
        InvalidInputError: By a step: a sample has no id; the step runs the model twice.
        AliasNotCapturedError: By a step: it did not run the model of the tracer.
        MlDebuggerError: By a step: what else a call of the tracer raises.
    """

    def __init__(
        self,
        *args: Any,
        tracer: TrainingTracer,
        ids: str = KEY,
        labels: Place | None = "labels",
        fields: Mapping[str, Place] | None = None,
        **kwargs: Any,
    ) -> None:
        self._tracer = tracer
        self._id_key = ids
        self._label_place = labels
        self._field_places = dict(fields or {})
        self._epoch: int | None = None
        self._evaluation = "val"
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.data_collator = CollateWithIds(trainer.data_collator, ids)
        trainer.add_callback(_EpochCount(self))

    def _set_signature_columns_if_needed(self) -> None:
        parent: Any = super()
        parent._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        if self._id_key not in columns:
            self._signature_columns = [*columns, self._id_key]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of the Trainer, recorded."""
        parent: Any = super()
        with self._recording(inputs, "train"):
            return parent.training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """A step of an evaluation, recorded."""
        parent: Any = super()
        with self._recording(inputs, self._evaluation):
            return parent.prediction_step(model, inputs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """An evaluation of the Trainer."""
        first, separator, rest = metric_key_prefix.partition("_")
        self._evaluation = ("val" if first == "eval" else first) + separator + rest
        parent: Any = super()
        return parent.evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )

    def _recording(self, inputs: Any, dataset_type: str) -> Recording:
        """A block for one step; the ids leave ``inputs``."""
        if self._id_key not in inputs:
            raise InvalidInputError(
                f"the batch has no ids under {self._id_key!r}, it has {', '.join(map(repr, inputs))}",
                "give the dataset such a column, or wrap it in WithIds; a collator of your own goes to the "
                "Trainer as data_collator, not into a loader",
            )
        ids = inputs.pop(self._id_key)
        place = self._label_place
        has_labels = place is not None and (callable(place) or place in inputs)
        labels = take(inputs, place, "labels") if has_labels and place is not None else None
        fields = {name: take(inputs, where, f"field {name!r}") for name, where in self._field_places.items()}
        return self._tracer.recording(labels, ids, dataset_type, self._epoch, **fields)


class _EpochCount(_TrainerCallback):  # type: ignore[misc]
    """Tells the epoch; the Trainer's own figure is a fraction of steps, which a stream may not know."""

    def __init__(self, trainer: TracerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._epoch = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = self._trainer._epoch
        self._trainer._epoch = int(state.epoch or 0) if before is None else before + 1

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._epoch = None


class TracedTrainer(TracerMixin, _Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with `TracerMixin`."""
