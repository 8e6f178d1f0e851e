"""``drop``: deleting rows of a trace that nobody records to."""

from __future__ import annotations

from pathlib import Path

import click

from ml_debugger.cli.options import json_option, trace_arguments, trace_directory
from ml_debugger.cli.output import print_json
from ml_debugger.store.dropping import drop_rows


@click.command()
@trace_arguments
@click.option("--epoch", type=click.IntRange(min=-1), help="Delete this epoch; -1: the rows without one.")
@click.option("--all", "everything", is_flag=True, help="Delete all rows; needs --yes.")
@click.option("--yes", is_flag=True, help="Confirm --all.")
@json_option
def drop(
    model: str, version: str, data_dir: Path, epoch: int | None, everything: bool, yes: bool, as_json: bool
) -> None:
    """Delete rows of the trace MODEL VERSION, of all its ranks; the disk space is given back at once.

    Needs --epoch N, or --all --yes. Fails, and deletes nothing, while a tracer writes to the trace.
    """
    if everything and epoch is not None:
        raise click.UsageError("--epoch and --all exclude one another")
    if not everything and epoch is None:
        raise click.UsageError("say what to delete: --epoch N, or --all --yes")
    if everything and not yes:
        raise click.UsageError("--all deletes every row of the trace: confirm it with --yes")
    dropped = drop_rows(trace_directory(data_dir, model, version), None if everything else epoch)
    if as_json:
        print_json(dropped)
        return
    click.echo(
        f"deleted {dropped['extracted_feature']} rows, {dropped['ground_truth']} of them with ground truth"
    )
