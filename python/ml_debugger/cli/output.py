"""What commands print: JSON for programs, tables for people; colours and progress on a terminal only."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_A_TERMINAL_WIDTH = 100_000


def escape_what_cannot_be_encoded() -> None:
    """Let standard output escape characters that its encoding lacks; a name may hold any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_json(document: Any) -> None:
    """Print one JSON document, in ASCII."""
    click.echo(json.dumps(document, indent=2))


def shown(text: str) -> str:
    """Text with what a terminal would act on, or cannot show, escaped."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[str] = ()
) -> None:
    """Print a table; a line a row and never cut where it is not a terminal.

    Args:
        columns: Their headings.
        rows: One value a column.
        numbers: Headings of columns that are aligned on the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if sys.stdout is None:  # closed by the shell
        return
    is_terminal = sys.stdout.isatty()
    console = Console(
        width=None if is_terminal else _NOT_A_TERMINAL_WIDTH, highlight=False, emoji=False, soft_wrap=False
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column, justify="right" if column in numbers else "left", overflow="fold", no_wrap=not is_terminal
        )
    for row in rows:
        table.add_row(*(Text(shown(str(value))) for value in row))
    console.print(table)


def human_bytes(size: int) -> str:
    """A size for people, in powers of 1000."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def epoch_name(epoch: int) -> str:
    """An epoch for people; -1 are the rows without one."""
    return "none" if epoch < 0 else str(epoch)
