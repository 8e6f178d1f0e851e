"""The tables of docs/model_support.md that the matrix of models generates: reading and writing them."""

from __future__ import annotations

from pathlib import Path

from matrix_models import KINDS
from model_matrix import ALL_CELLS, MODES, WRAPPERS, Cell

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model_support.md"
BEGIN, END = "<!-- begin: written by `make matrix` -->", "<!-- end: written by `make matrix` -->"
UNKNOWN = "·"  # the cell has not run yet


def generated_part(page: Path = PAGE) -> str:
    text = page.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


def read(page: Path = PAGE) -> dict[Cell, str]:
    """What the page says of each cell; cells that it lacks are unknown."""
    found = dict.fromkeys(ALL_CELLS, UNKNOWN)
    models = {kind.words: name for name, kind in KINDS.items()}
    modes = {mode.words: name for name, mode in MODES.items()}
    wrappers = {words: name for name, words in WRAPPERS.items()}
    wrapper, columns = "", [""]
    for line in generated_part(page).splitlines():
        if line.startswith("**"):
            wrapper = wrappers.get(line.strip("*"), "")
        elif line.startswith("| |"):
            columns = [modes.get(words, "") for words in split(line)[1:]]
        elif line.startswith("|") and split(line)[0] in models:
            model, *texts = split(line)
            for mode, text in zip(columns, texts, strict=True):
                found[Cell(models[model], mode, wrapper)] = text
    return {cell: found[cell] for cell in ALL_CELLS}


def split(line: str) -> list[str]:
    return [text.strip() for text in line.strip().strip("|").split("|")]


def render(cells: dict[Cell, str]) -> str:
    lines = [""]
    for wrapper, words in WRAPPERS.items():
        lines += ["", f"**{words}**", ""]
        lines.append("| | " + " | ".join(mode.words for mode in MODES.values()) + " |")
        lines.append("|---|" + ":-:|" * len(MODES))
        for model, kind in KINDS.items():
            texts = (cells[Cell(model, mode, wrapper)] for mode in MODES)
            lines.append(f"| {kind.words} | " + " | ".join(texts) + " |")
    return "\n".join([*lines[1:], "", ""])


def write(cells: dict[Cell, str], page: Path = PAGE) -> None:
    """Put what was found in these cells on the page, and leave the others."""
    text = page.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(before + render({**read(page), **cells}) + after, encoding="utf-8")
