"""Tracers for training runs."""

from ml_debugger.tracer.classification import ClassificationTorchTracer
from ml_debugger.training.classification import ClassificationTracer, ClassificationTrainingTorchTracer
from ml_debugger.training.training_tracer import TrainingTracer

__all__ = [
    "ClassificationTorchTracer",
    "ClassificationTracer",
    "ClassificationTrainingTorchTracer",
    "TrainingTracer",
]
