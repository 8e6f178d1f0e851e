"""Tracers of classifiers."""

from ml_debugger.tracer.classification.classification_torchtracer import ClassificationTorchTracer

__all__ = ["ClassificationTorchTracer"]
