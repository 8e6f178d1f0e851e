"""``recover``: what is sound of a damaged trace, as a new one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ml_debugger.cli.options import json_option, trace_arguments
from ml_debugger.cli.output import epoch_name, print_json, shown
from ml_debugger.store import layout

if TYPE_CHECKING:
    from ml_debugger.trace.losses import LostCalls


@click.command()
@trace_arguments
@click.option(
    "--output",
    "-o",
    metavar="DIR",
    help="The new data directory; missing or empty. Default: ./<model>_<version>_recovered",
)
@json_option
@click.pass_context
def recover(
    ctx: click.Context, model: str, version: str, data_dir: Path, output: str | None, as_json: bool
) -> None:
    """Save every sound call of the damaged trace MODEL VERSION into the data directory DIR.

    The trace itself is not changed, and is never opened with LMDB. What is missing is listed and is marked as
    a gap in the new trace; the exit status is then 1. Fails while a tracer writes to the trace.
    """
    from ml_debugger.exporting.naming import safe_name
    from ml_debugger.exporting.progress import Progress
    from ml_debugger.trace.recover import recover_trace

    if output == "":
        raise click.BadParameter("expected a directory, got an empty text", param_hint="--output")
    target = layout.resolve_data_dir(output or os.path.abspath(safe_name(f"{model}_{version}", "_recovered")))
    with Progress(None, "recover") as progress:
        report = recover_trace(data_dir, model, version, target, progress.show)
    if as_json:
        names = {"model_name": model, "version_name": version, "ok": report.ok}
        document = {**names, **dataclasses.asdict(report), "directory": str(report.directory)}
        print_json(document)
    else:
        for problem in report.problems:
            click.echo(shown(f"damage: {problem.path}: {problem.problem}"))
        for lost in report.lost:
            click.echo(shown(f"lost: {_described(lost)}"))
        found = "calls are missing" if report.lost else "everything was saved"
        click.echo(
            f"{found}: {report.calls} calls, {report.rows} rows saved from {report.segments} segments to "
            + shown(str(report.directory))
        )
    ctx.exit(0 if report.ok else 1)


def _described(lost: LostCalls) -> str:
    epoch = "unknown" if lost.epoch is None else epoch_name(lost.epoch)
    where = f"rank {lost.rank}, attempt {lost.attempt}, epoch {epoch}"
    if lost.first_call is None:
        calls = "calls whose numbers are not known"
    elif lost.first_call == lost.last_call:
        calls = f"call {lost.first_call}"
    elif lost.calls == (lost.last_call or 0) - lost.first_call + 1:
        calls = f"calls {lost.first_call} to {lost.last_call}"
    else:
        calls = f"calls among {lost.first_call} to {lost.last_call}"
    rows = "an unknown number of" if lost.rows is None else str(lost.rows)
    return f"{where}, {calls}, {rows} rows: {lost.problem} ({lost.path})"
