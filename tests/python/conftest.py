"""Fixtures of all Python tests: a data directory, a small ring, a watch on what a test leaves behind."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

RING_BYTES = 8 << 20
OWN_THREADS = "mld-"  # the core's threads are named so
LEFT_BEHIND_DEADLINE_S = 2.0
SETTINGS_OF_USERS = "MLD_"


def open_in_this_process() -> set[str]:
    """The core's threads and the LMDB files that this process has open; empty where there is no /proc."""
    found = set()
    for task in Path("/proc/self/task").glob("*"):
        try:
            name = (task / "comm").read_text().strip()
        except OSError:  # ended while we looked
            continue
        if name.startswith(OWN_THREADS):
            found.add(f"thread {name} ({task.name})")
    for descriptor in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.removesuffix(" (deleted)").endswith(".mdb"):
            found.add(f"descriptor {descriptor.name}: {target}")
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out unless ``-m`` names them."""
    if "soak" in (config.option.markexpr or ""):
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    if soaks:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves threads or files of the core open; only what was not there before counts.

    What the core leaks on purpose after a missed deadline is excused by the marker ``leaves_core_behind``.
    """
    before = open_in_this_process()
    yield
    if request.node.get_closest_marker("leaves_core_behind"):
        return
    # A joined thread leaves /proc a moment after the join.
    deadline = time.monotonic() + LEFT_BEHIND_DEADLINE_S
    while (left := open_in_this_process() - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    if left:
        pytest.fail("the test left behind: " + ", ".join(sorted(left)), pytrace=False)


@pytest.fixture(autouse=True)
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from the developer's shell, and a ring that is quick to make; a test may say otherwise."""
    for name in [name for name in os.environ if name.startswith(SETTINGS_OF_USERS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLD_RING_BYTES", str(RING_BYTES))


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of this test's own, which ``MLD_DATA_DIR`` names; the tracer makes it."""
    path = tmp_path / "mld_data"
    monkeypatch.setenv("MLD_DATA_DIR", str(path))
    return path


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests that compile: inductor writes into a directory of this session, and starts no processes."""
    import torch._inductor.config

    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(compile_threads=1):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def trace(data_dir: Path) -> Iterator[Callable[..., Any]]:
    """Makes tracers, (model, target_layers, version, options of TracerConfig), and closes them."""
    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    made = []

    def factory(model: Any, layers: Any, version: str = "v1", **options: Any) -> Any:
        config = TracerConfig(**{"durability": "process", **options})
        made.append(ClassificationTracer(model, "net", version, layers, config=config))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


@pytest.fixture
def make(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Makes tracers, each of a version of its own, and closes them."""
    numbers = itertools.count()
    return lambda model, layers, **options: trace(model, layers, f"v{next(numbers)}", **options)


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    """For tests that compile: the compiler knows nothing of the tests before, and counts from zero."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Tests share the machine, and the order of sums does not depend on its number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix",
        choices=["all", "write"],
        help="run every cell of the matrix of models; write: and put it into docs/model_support.md",
    )
