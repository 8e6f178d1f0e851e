"""``merge``: the data directories of several nodes as one."""

from __future__ import annotations

import dataclasses

import click

from ml_debugger.cli.options import json_option
from ml_debugger.cli.output import human_bytes, print_json, shown
from ml_debugger.store import layout


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True)
@click.option(
    "--output", "-o", required=True, metavar="DIR", help="The data directory that gets all of them."
)
@json_option
def merge(directories: tuple[str, ...], output: str, as_json: bool) -> None:
    """Put the data directories DIR... of a job's nodes together, so that its ranks read as one trace.

    By hard links where the filesystem allows it, else by copies; the directories are not changed. Run again,
    it adds what is new. Refuses traces of different jobs or architectures, before it changes anything.
    """
    from ml_debugger.exporting.progress import Progress
    from ml_debugger.store.merging import merge_data_dirs

    for value, hint in ((output, "--output"), *((directory, "DIR") for directory in directories)):
        if not value:
            raise click.BadParameter("expected a directory, got an empty text", param_hint=hint)
    with Progress(None, "merge") as progress:
        report = merge_data_dirs(
            [layout.resolve_data_dir(directory) for directory in directories],
            layout.resolve_data_dir(output),
            progress.show,
        )
    if as_json:
        print_json({"directory": str(layout.resolve_data_dir(output)), **dataclasses.asdict(report)})
        return
    for path in report.set_aside:
        click.echo(f"warning: {shown(path)} was not closed; a power cut may have torn it", err=True)
    click.echo(
        f"{report.traces} traces, {report.ranks} ranks: {report.segments_linked} segments linked, "
        f"{report.segments_copied} copied ({human_bytes(report.bytes_copied)}), "
        f"{report.segments_present} there already"
    )
