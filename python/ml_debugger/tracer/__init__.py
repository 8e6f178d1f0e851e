"""Watching a model: hooks, layers, fields, and the recording side of a trace."""

from ml_debugger.tracer.torch_tracer import TorchTracer

__all__ = ["TorchTracer"]
