"""What a trace says about samples, training and capture: passes over it, each in bounded memory."""

from ml_debugger.analysis.analysis import Analysis

__all__ = ["Analysis"]
