"""Opens tracers for tests, and checks what every test wants to hold of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ml_debugger import TracerConfig, TracerStats, _core, open_trace
from ml_debugger.training import ClassificationTracer

PROGRAMS = Path(__file__).parent / "programs"
TAP = {"out": "tap"}  # of patterns.Emitter


@contextmanager
def recording(
    model: nn.Module,
    device: torch.device,
    layers: Mapping[str, str] | None = TAP,
    *,
    version: str = "v1",
    additional_fields: list[dict[str, Any]] | None = None,
    additional_label_fields: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Iterator[ClassificationTracer]:
    """A tracer that must copy beside the compute stream and must not lose a row."""
    tracer = ClassificationTracer(
        model,
        "net",
        version,
        None if layers is None else dict(layers),
        additional_fields,
        additional_label_fields,
        config=TracerConfig(**options),
    )
    with tracer:
        yield tracer
        if device.type == "cuda":
            check_staged()
    check_nothing_lost(tracer.stats())


def check_staged() -> None:
    """The path under test was taken: pinned memory, no copy that waited."""
    report = _core.device_report()
    assert report["errors"] == 0, report
    assert report["pinned"], report
    assert report["copies"] > 0, report
    assert report["synchronous_copies"] == 0, report


def check_nothing_lost(stats: TracerStats) -> None:
    """Every row that was handed over is committed."""
    assert stats.rows_submitted == stats.rows_committed, stats
    assert stats.rows_discarded == stats.rows_failed == stats.rows_in_flight == 0, stats
    assert stats.bytes_submitted == stats.bytes_committed, stats


def stored(column: str, version: str = "v1", table: str = "extracted_feature") -> Any:
    """All rows of a column, in the order of the calls."""
    return open_trace("net", version).tensors(table, columns=[column])[column]


def row_ids(call: int, batch_size: int) -> list[str]:
    """An id for each sample of a call."""
    return [f"{call}-{row}" for row in range(batch_size)]


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """torch raises where it makes the host wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy(device: torch.device, seconds: float) -> None:
    """Enqueue a kernel that runs for about ``seconds`` on the current stream."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * 1.9e9))  # cycles; the clocks of these machines are near 2 GHz


def run_program(
    name: str, *arguments: str, prefix: Sequence[str] = (), timeout_s: float = 100, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of ``programs/`` as a process of its own."""
    path = os.pathsep.join([str(PROGRAMS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*prefix, sys.executable, str(PROGRAMS / name), *arguments],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def answer_of(program: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What a program printed as its last line, JSON."""
    lines = [line for line in program.stdout.splitlines() if line.startswith("{")]
    assert lines, f"status {program.returncode}\n{program.stdout}\n{program.stderr}"
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer
