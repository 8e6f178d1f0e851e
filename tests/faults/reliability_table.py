"""The table of `docs/reliability.md`, as the last `make test-faults` has measured it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from trials import Score

BEGIN = "<!-- table: written by make test-faults -->"
END = "<!-- end of table -->"
HEAD = ("| fault | rounds | fired | lost | hung | corrupt |", "|---|---:|---:|---:|---:|---:|")


def as_lines(scores: Sequence[Score]) -> list[str]:
    """The table in Markdown."""
    return [*HEAD, *map(_as_line, scores)]


def _as_line(score: Score) -> str:
    figures = (score.rounds, score.fired, score.lost, score.hung, score.corrupt)
    return f"| {score.fault} | " + " | ".join(f"{figure:,}" for figure in figures) + " |"


def write_table(path: Path, scores: Sequence[Score]) -> None:
    """Write the lines of this run into the table of a document; those of other faults stay."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = {line.split(" | ")[0]: line for line in table.splitlines() if line.startswith("| ")}
    lines.pop(HEAD[0].split(" | ")[0], None)
    lines.update((line.split(" | ")[0], line) for line in map(_as_line, scores))
    machine = f"Measured on {platform.system()} {platform.release()}, Python {platform.python_version()}."
    content = "\n".join([BEGIN, machine, "", *HEAD, *lines.values(), END])
    path.write_text(f"{before}{content}{after}", encoding="utf-8")
