"""Fixtures of the tests that need an NVIDIA GPU (`make test-gpu`); without one the run fails and says so.

``--rehearse-on-cpu`` runs on the CPU what does not depend on a GPU, to check the tests themselves. It shows
nothing about a GPU, so its exit status is never 0.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness.machine import missing_gpu

# cuBLAS takes it up when it is loaded: with it, two equal runs give equal bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

RING_BYTES = 64 << 20
REHEARSAL_STATUS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse-on-cpu",
        action="store_true",
        help="check the tests themselves, without a GPU; never passes",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda_only: makes no sense on a CPU, left out of a rehearsal")
    if config.getoption("--rehearse-on-cpu"):
        return
    problem = missing_gpu()
    if problem is not None:
        raise pytest.UsageError(f"the GPU tests did not run: {problem}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        # What torch and the driver of a machine that we do not know warn about is no fault of ours.
        item.add_marker(pytest.mark.filterwarnings("default"))
        if config.getoption("--rehearse-on-cpu") and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--rehearse-on-cpu") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = REHEARSAL_STATUS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--rehearse-on-cpu"):
        terminalreporter.write_line("A rehearsal on the CPU: nothing was shown about a GPU.")
    else:
        terminalreporter.write_line(f"Ran on {torch.cuda.get_device_name()}, torch {torch.__version__}.")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the models of the tests compute."""
    return torch.device("cpu" if request.config.getoption("--rehearse-on-cpu") else "cuda")


@pytest.fixture(scope="session")
def share(device: torch.device) -> float:
    """Which part of a long run is done: all of it on a GPU, a little in a rehearsal."""
    return 1.0 if device.type == "cuda" else 0.02


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from the developer's shell, a ring that is quick to pin, the same random numbers."""
    for name in [name for name in os.environ if name.startswith("MLD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLD_RING_BYTES", str(RING_BYTES))
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def data_dir(settings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of this test's own, which ``MLD_DATA_DIR`` names, also to programs that the test starts."""
    path = tmp_path / "mld_data"
    monkeypatch.setenv("MLD_DATA_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def nothing_to_report(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test in which the package logged a warning (a copy fell back, a row was lost)."""
    from ml_debugger import _core

    yield
    assert _core.device_report() == {}, "a tracer was left open"
    told = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.name.startswith("ml_debugger") and record.levelno >= logging.WARNING
    ]
    assert not told
