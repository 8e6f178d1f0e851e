"""Fixtures of the contract suite: every test has its own store, a small ring, and a check of the
conservation law."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from contract_children import Child, Finished, run_script  # noqa: E402
from contract_models import Net, check_law  # noqa: E402

from ml_debugger.training import ClassificationTracer  # noqa: E402

RING_BYTES = 8 << 20


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: minutes long; runs only when -m names it")
    config.addinivalue_line(
        "markers", "timeout(seconds): limit of one test, where pytest-timeout is installed"
    )
    config.addinivalue_line("markers", "leaves_core_behind: a wait of ours misses its deadline on purpose")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" in (config.option.markexpr or ""):
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    if soaks:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory of this test, set by the environment as a user would."""
    for name in [n for n in os.environ if n.startswith("MLD_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "data"
    monkeypatch.setenv("MLD_DATA_DIR", str(folder))
    monkeypatch.setenv("MLD_RING_BYTES", str(RING_BYTES))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return folder


@pytest.fixture
def make_tracer() -> Iterator[Callable[..., ClassificationTracer]]:
    """Makes tracers of the trace ("net", "v1"); closes them and checks the conservation law at the end."""
    made: list[ClassificationTracer] = []

    def make(
        model: Any = None, name: str = "net", version: str = "v1", **kwargs: Any
    ) -> ClassificationTracer:
        layers = kwargs.pop("layers", {"hidden": "body"} if model is None else None)
        cls = kwargs.pop("cls", ClassificationTracer)
        tracer = cls(Net() if model is None else model, name, version, layers, **kwargs)
        made.append(tracer)
        return tracer

    yield make
    for tracer in made:
        tracer.close()
        stats = tracer.stats()
        check_law(stats)
        assert stats.rows_in_flight == 0


@pytest.fixture
def run_child(tmp_path: Path) -> Callable[..., Finished]:
    """Runs a script in a child Python with a deadline."""

    def run(source: str, *args: object, **kwargs: Any) -> Finished:
        return run_script(tmp_path / "scripts", source, *args, **kwargs)

    return run


@pytest.fixture
def start_child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts scripts to talk with; none outlives the test."""
    children: list[Child] = []

    def start(source: str, *args: object, **kwargs: Any) -> Child:
        child = Child(tmp_path / "scripts", source, *args, **kwargs)
        children.append(child)
        return child

    yield start
    for child in children:
        child.__exit__(None, None, None)


@pytest.fixture
def foreign_read(tmp_path: Path, store: Path) -> Callable[..., dict[str, Any]]:
    """Reads a trace with stock lmdb and msgpack in another process."""
    import msgpack

    def read(name: str = "net", version: str = "v1", data_dir: Path | None = None) -> dict[str, Any]:
        out = tmp_path / "foreign.msgpack"
        command = [
            sys.executable,
            str(HERE / "contract_foreign_reader.py"),
            str(data_dir or store),
            name,
            version,
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = msgpack.unpackb(out.read_bytes())
        return found

    return read


class Gate:
    """Keeps the core from committing while it is shut."""

    def __init__(self, data_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "contract_gate.py"), str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.held = self._process.stdout.readline().strip()
        assert self.held.startswith("held ") and self.held != "held 0", (
            f"no live segment to hold: {self.held}"
        )

    def open(self) -> None:
        """Let the writer go on; idempotent."""
        if self._process.poll() is None:
            self._process.communicate("\n", timeout=30)


@pytest.fixture
def shut_gate(store: Path) -> Iterator[Callable[[], Gate]]:
    """Holds up every commit into the segments that are live now, without a sleep anywhere."""
    gates: list[Gate] = []

    def shut() -> Gate:
        gates.append(Gate(store))
        return gates[-1]

    yield shut
    for gate in gates:
        gate.open()
