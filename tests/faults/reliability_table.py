"""The table of `docs/reliability.md`, as the last `make test-faults` has measured it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from trials import Score

BEGIN = "<!-- table: written by make test-faults -->"
END = "<!-- end of table -->"


def as_lines(scores: Sequence[Score]) -> list[str]:
    """The table in Markdown."""
    lines = ["| fault | rounds | fired | lost | hung | corrupt |", "|---|---:|---:|---:|---:|---:|"]
    for score in scores:
        figures = (score.rounds, score.fired, score.lost, score.hung, score.corrupt)
        lines.append(f"| {score.fault} | " + " | ".join(f"{figure:,}" for figure in figures) + " |")
    return lines


def write_table(path: Path, scores: Sequence[Score]) -> None:
    """Replace the table between its two marks in a document."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    machine = f"Measured on {platform.system()} {platform.release()}, Python {platform.python_version()}."
    table = "\n".join(as_lines(scores))
    path.write_text(f"{before}{BEGIN}\n{machine}\n\n{table}\n{END}{after}", encoding="utf-8")
