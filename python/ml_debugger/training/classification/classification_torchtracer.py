"""`ClassificationTracer`: records what a classifier computes during training."""

from __future__ import annotations

from ml_debugger.tracer.classification.classification_torchtracer import ClassificationTorchTracer
from ml_debugger.training.training_tracer import TrainingTracer

__all__ = ["ClassificationTracer", "ClassificationTrainingTorchTracer"]


class ClassificationTrainingTorchTracer(TrainingTracer, ClassificationTorchTracer):
    """Records layer outputs, logits and labels of every sample while a classifier is trained.

    Wrap the model, call the tracer in place of it, and close it at the end::

        with ClassificationTracer(model, "resnet18", "v1", {"features": "avgpool"}) as tracer:
            for images, labels, ids in loader:
                logits = tracer(images, labels, ids, dataset_type="train", n_epoch=epoch)

    Arguments as `TrainingTracer`.
    """


ClassificationTracer = ClassificationTrainingTorchTracer
