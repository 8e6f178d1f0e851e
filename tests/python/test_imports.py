"""What an import brings along: a training run waits for what it needs, and for nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = (
    "ml_debugger.trace.trace",
    "ml_debugger.trace.export_reader",
    "ml_debugger.exporting",
    "ml_debugger.uploading.endpoint",
    "ml_debugger.uploading.process",
    "ml_debugger.uploading.upload",
    "ml_debugger.report",
    "ml_debugger.analysis",
    "ml_debugger.collector",
    "ml_debugger.cli",
    "httpx",
    "pandas",
    "pyarrow",
    "rich",
)


def modules_after(program: str) -> set[str]:
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_a_training_run_imports_neither_readers_nor_uploads_nor_reports() -> None:
    brought = modules_after("import ml_debugger.training")
    assert "ml_debugger.tracer.torch_tracer" in brought
    assert brought & set(LATER) == set()


@pytest.mark.parametrize("name", ["Trace", "open_trace", "load_export"])
def test_readers_are_there_when_they_are_asked_for(name: str) -> None:
    asked = f"import ml_debugger.trace\nassert callable(ml_debugger.trace.{name})"
    assert "ml_debugger.trace.trace" in modules_after(asked)


def test_the_package_of_readers_has_nothing_else() -> None:
    import ml_debugger.trace

    with pytest.raises(AttributeError, match="no attribute 'open_traces'"):
        ml_debugger.trace.open_traces  # noqa: B018
