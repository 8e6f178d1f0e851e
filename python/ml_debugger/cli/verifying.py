"""``verify``: is every byte of a trace what was written?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ml_debugger.cli.options import json_option, trace_arguments
from ml_debugger.cli.output import human_bytes, print_json, shown
from ml_debugger.store import layout
from ml_debugger.store.job_ranks import named


@click.command()
@trace_arguments
@json_option
@click.pass_context
def verify(ctx: click.Context, model: str, version: str, data_dir: Path, as_json: bool) -> None:
    """Check every header, chunk and counter of the trace MODEL VERSION; nothing is changed.

    Works while a tracer writes. Where the package lmdb is installed, the pages of LMDB's files are checked
    too. Damage is listed, and the exit status is 1.
    """
    from ml_debugger.exporting.progress import Progress
    from ml_debugger.trace.verify import verify_trace

    directory = layout.trace_directory(data_dir, model, version)
    with Progress(None, "verify") as progress:
        report = verify_trace(directory, progress.show)
    if as_json:
        names = {"model_name": model, "version_name": version, "ok": report.ok}
        print_json({**names, **dataclasses.asdict(report)})
    else:
        for problem in report.problems:
            click.echo(shown(f"damage: {problem.path}: {problem.problem}"))
        if report.missing_ranks:
            click.echo(f"missing: {named(report.missing_ranks)} of the newest job left nothing here")
        count = len(report.problems)
        found = f"{count} problem{'s' if count > 1 else ''}" if count else "sound"
        click.echo(
            f"{found}: {report.segments} segments, {report.calls} calls, {report.rows} rows, "
            f"{report.chunks} chunks, {human_bytes(report.bytes_checked)}; "
            f"{report.discarded_rows} rows were lost while recording"
        )
        if not report.structure_checked:
            click.echo('LMDB pages were not checked: pip install "ml-debugger[verify]"', err=True)
    ctx.exit(0 if report.ok else 1)
