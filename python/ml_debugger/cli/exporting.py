"""``export``: a trace as a ZIP."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ml_debugger.cli.options import json_option, trace_arguments, trace_directory
from ml_debugger.cli.output import print_json, shown
from ml_debugger.errors import InvalidInputError


@click.command()
@trace_arguments
@click.option(
    "--output",
    "-o",
    metavar="PATH",
    help="A file that ends in .zip, or a directory. [default: the current directory]",
)
@click.option(
    "--epoch", type=click.IntRange(min=-1), help="Only this epoch; -1: the rows without one. [default: all]"
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["npy", "parquet"]),
    default="npy",
    show_default=True,
    help="npy: opens with numpy.load; parquet: with pandas, polars and DuckDB.",
)
@click.option("--no-dedupe", is_flag=True, help="Keep every row, not only the newest one of a sample.")
@json_option
def export(
    model: str,
    version: str,
    data_dir: Path,
    output: str | None,
    epoch: int | None,
    format_name: str,
    no_dedupe: bool,
    as_json: bool,
) -> None:
    """Write the committed rows of the trace MODEL VERSION into a ZIP, and print its path.

    Works while a tracer writes. An existing file is replaced when the new one is complete.
    """
    directory = trace_directory(data_dir, model, version)
    from ml_debugger.exporting import export_trace
    from ml_debugger.exporting.naming import resolve_output

    try:
        resolve_output(output, "export.zip")
    except InvalidInputError as error:
        raise click.BadParameter(str(error), param_hint="--output") from error
    started = time.monotonic()
    path = export_trace(directory, output, n_epoch=epoch, format=format_name, dedupe=not no_dedupe)
    seconds = time.monotonic() - started
    if not as_json:
        click.echo(shown(str(path)))
        return
    from ml_debugger.trace.npy_member import ExportArchive

    manifest = ExportArchive(path).manifest
    names = ("rows_recorded", "rows_written", "rows_deduplicated", "discarded")
    figures = {name: manifest[name] for name in names}
    print_json({"path": str(path), "bytes": path.stat().st_size, "seconds": round(seconds, 3), **figures})
