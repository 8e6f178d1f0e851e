"""A short benchmark on the user's own machine and disk: which part limits recording, and what to set."""

from ml_debugger.benchmarking.benchmark import run
from ml_debugger.benchmarking.benchmark_report import BenchmarkReport

__all__ = ["BenchmarkReport", "run"]
