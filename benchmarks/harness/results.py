"""Results of a benchmark as JSON: what was asked, where, with which options, every sample and the summary."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Bar:
    """One line of a plot.

    Attributes:
        label: What was measured.
        value: The figure.
        low: Lower end of its interval; None for none.
        high: Upper end.
    """

    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Findings:
    """What a benchmark found out.

    Attributes:
        options: Everything that was chosen: sizes, numbers of rounds, directories.
        samples: Raw figures.
        summary: Medians, intervals, and counters of losses.
        unit: Of the bars.
        bars: The figures worth a look, for the plot.
        target: A value that the bars should not pass, or None.
    """

    options: dict[str, Any]
    samples: Any
    summary: dict[str, Any]
    unit: str
    bars: list[Bar]
    target: float | None = None


def write_results(
    folder: Path, name: str, question: str, machine: dict[str, Any], findings: Findings
) -> Path:
    """Write ``<name>.json``, all or nothing, and return its path."""
    document = {
        "name": name,
        "question": question,
        "machine": machine,
        **{field: getattr(findings, field) for field in ("options", "summary", "samples")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1, default=_as_json) + "\n")
    os.replace(temporary, path)
    return path


def _as_json(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
