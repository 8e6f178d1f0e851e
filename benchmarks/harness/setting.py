"""Where and how large the benchmarks run, and what each checks of what it recorded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import filesystem_of
from ml_debugger import _core, open_trace
from ml_debugger.training import ClassificationTracer


class WrongDataError(Exception):
    """What was stored is not what the layer returned: such a run has no figure."""


@dataclass(frozen=True)
class Setting:
    """Options of a run.

    Attributes:
        device: Where the models compute.
        is_quick: Tiny sizes, to see that the code runs.
        memory_dir: Empty folder on tmpfs, for the software's own cost.
        disk_dir: Empty folder on a disk.
        seed: Of orders and contents.
        is_full: More of everything; takes an hour rather than minutes.
    """

    device: torch.device
    is_quick: bool
    memory_dir: Path
    disk_dir: Path
    seed: int
    is_full: bool = False

    def described(self) -> dict[str, Any]:
        """For the results."""
        return {
            "device": str(self.device),
            "quick": self.is_quick,
            "full": self.is_full,
            "seed": self.seed,
            "memory_filesystem": filesystem_of(self.memory_dir),
            "disk_filesystem": filesystem_of(self.disk_dir),
        }


def empty_folder(folder: Path) -> None:
    """Remove what a benchmark has recorded."""
    for entry in folder.iterdir():
        shutil.rmtree(entry)


def losses_of(tracer: ClassificationTracer) -> dict[str, Any]:
    """What became of the rows, and how the copies went; call it before the tracer is closed."""
    stats = dataclasses.asdict(tracer.stats())
    stats["discarded_by_cause"] = dict(stats["discarded_by_cause"])
    return {**stats, "device": _core.device_report()}


def check_nothing_lost(losses: Mapping[str, Any], what: str) -> None:
    """Every row is committed, and came by the path that is to be measured.

    Raises:
        WrongDataError: Rows were lost, or copies from the device waited on the host.
    """
    if losses["rows_submitted"] != losses["rows_committed"]:
        raise WrongDataError(f"{what} lost rows: {losses}")
    device = losses["device"]
    if device["errors"] or device["synchronous_copies"] or (device["copies"] and not device["pinned"]):
        raise WrongDataError(f"{what}: the copies from the device were not asynchronous: {device}")


def check_equal(stored: Any, expected: torch.Tensor, what: str) -> None:
    """Bit for bit.

    Raises:
        WrongDataError: It is not.
    """
    if not isinstance(stored, torch.Tensor) or stored.shape != expected.shape:
        raise WrongDataError(f"{what}: expected shape {tuple(expected.shape)}, got {stored!r:.200}")
    left, right = (value.detach().cpu().contiguous().reshape(-1) for value in (stored, expected))
    if left.dtype != right.dtype or not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
        raise WrongDataError(f"{what} reads back different from what the layer returned")


def read_column(data_dir: Path, version: str, column: str, **selection: Any) -> Any:
    """All rows of a column of a benchmark's trace, in the order of the calls."""
    table = "ground_truth" if column == "label" else "extracted_feature"
    trace = open_trace("benchmark", version, data_dir=data_dir)
    return trace.tensors(table, columns=[column], **selection)[column]
