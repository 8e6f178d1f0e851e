"""PyTorch Lightning: a callback that records the batches of every stage.

The user's steps stay as they are. Around each step the callback opens `TorchTracer.recording`, which takes
the forward that the step runs. Works with ``lightning.pytorch`` and ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ml_debugger.errors import InvalidInputError
from ml_debugger.extras import require
from ml_debugger.integrations.batches import Place, take
from ml_debugger.tracer.recording import Recording
from ml_debugger.training import TrainingTracer

__all__ = ["TracerCallback"]


def _callback_class() -> Any:
    """`Callback` of the package that is in use; both have the same."""
    if "pytorch_lightning" not in sys.modules:
        try:
            return importlib.import_module("lightning.pytorch").Callback
        except ImportError:
            pass
    return require("pytorch_lightning", "lightning", "TracerCallback").Callback


_Callback: Any = _callback_class()


class TracerCallback(_Callback):  # type: ignore[misc]
    """Records every train, validation, test and predict batch of a Lightning Trainer.

    ::

        callback = TracerCallback(
            lambda module: ClassificationTracer(module.net, "resnet18", "v1"), ids="id", labels="label"
        )
        Trainer(callbacks=[callback]).fit(module, datamodule=data)

    Each step must call the traced module exactly once, by ``self.net(images)``. Trace a module inside of the
    LightningModule rather than that itself: strategies such as DDP call the LightningModule for a step too.

    The stages are recorded as ``dataset_type`` ``"train"``, ``"val"``, ``"test"`` and ``"predict"``; batches
    of a second and further dataloader as ``"val_1"``, and so on. Batches of `fit` have the Trainer's
    ``current_epoch``, after a resume too; those of `validate`, `test` and `predict` have no epoch. Predict
    batches are recorded without labels. The sanity check before a fit is not recorded.

    A tracer is made when a stage begins and strategy and ranks are set up; it is closed when the stage ends
    or fails.

    Args:
        make_tracer: Is given the LightningModule and returns a new tracer of the module to watch. Called for
            each `fit`, `validate`, `test` or `predict`.
        ids: Where the sample ids stand in a batch: a key, a position, or a callable that is given the batch.
        labels: The labels, likewise; None records none.
        fields: Additional fields of the tracer, ``{name: place}``.
        sanity_check: Record the sanity check, as this ``dataset_type`` and without an epoch. Default None.

    Attributes:
        tracer: The newest tracer, closed between stages (when `stats` and `export` still work); None before.

    Raises:
        InvalidInputError: By the Trainer: nothing stands at a place that was named; the module runs twice in
            a step.
        AliasNotCapturedError: By the Trainer: a step did not call the module.
        MlDebuggerError: By the Trainer: what else a call of the tracer raises.
    """

    def __init__(
        self,
        make_tracer: Callable[[Any], TrainingTracer],
        *,
        ids: Place,
        labels: Place | None = None,
        fields: Mapping[str, Place] | None = None,
        sanity_check: str | None = None,
    ) -> None:
        super().__init__()
        self._make_tracer = make_tracer
        self._ids = ids
        self._labels = labels
        self._fields = dict(fields or {})
        self._sanity_check = sanity_check
        self._recording: Recording | None = None
        self.tracer: TrainingTracer | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A stage begins."""
        self.tracer = self._make_tracer(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A stage has ended."""
        self._abandon()
        if self.tracer is not None:
            self.tracer.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A stage has failed: what is complete is saved, and the exception stays the news."""
        self._end(exception)
        if self.tracer is not None:
            self.tracer.__exit__(type(exception), exception, exception.__traceback__)

    def _begin(self, batch: Any, dataset_type: str, n_epoch: int | None, *, labelled: bool = True) -> None:
        if self.tracer is None:
            raise InvalidInputError(
                "a batch came before setup() of this callback", "pass the callback to the Trainer"
            )
        self._abandon()
        labels = take(batch, self._labels, "labels") if labelled and self._labels is not None else None
        fields = {name: take(batch, place, f"field {name!r}") for name, place in self._fields.items()}
        recording = self.tracer.recording(
            labels, take(batch, self._ids, "ids"), dataset_type, n_epoch, **fields
        )
        recording.__enter__()
        self._recording = recording

    def _end(self, exception: BaseException | None = None) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.__exit__(None if exception is None else type(exception), exception, None)

    def _abandon(self) -> None:
        """Close the block of a batch that a hook made the Trainer skip: no other forward belongs to it."""
        self._end(GeneratorExit())

    # The Trainer's words for a batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A training step begins."""
        self._begin(batch, "train", trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """It has ended, with its backward."""
        self._end()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch has ended, perhaps by a batch that was skipped."""
        self._abandon()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation step begins."""
        if trainer.sanity_checking:
            if self._sanity_check is not None:
                self._begin(batch, _numbered(self._sanity_check, dataloader_idx), None)
            return
        epoch = trainer.current_epoch if trainer.state.fn == "fit" else None
        self._begin(batch, _numbered("val", dataloader_idx), epoch)

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """It has ended."""
        self._end()

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A test step begins."""
        self._begin(batch, _numbered("test", dataloader_idx), None)

    on_test_batch_end = on_validation_batch_end

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A predict step begins."""
        self._begin(batch, _numbered("predict", dataloader_idx), None, labelled=False)

    on_predict_batch_end = on_validation_batch_end


def _numbered(stage: str, dataloader: int) -> str:
    return f"{stage}_{dataloader}" if dataloader else stage
