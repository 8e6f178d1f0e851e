"""Tracers for the training of classifiers."""

from ml_debugger.training.classification.classification_torchtracer import (
    ClassificationTracer,
    ClassificationTrainingTorchTracer,
)

__all__ = ["ClassificationTracer", "ClassificationTrainingTorchTracer"]
