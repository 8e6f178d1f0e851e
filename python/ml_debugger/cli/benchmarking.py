"""``bench``: what recording costs on this machine and disk."""

from __future__ import annotations

from pathlib import Path

import click

from ml_debugger.cli.options import data_dir_option, json_option
from ml_debugger.cli.output import print_json


@click.command()
@data_dir_option
@click.option("--quick", is_flag=True, help="Fewer bytes and calls: some seconds, rougher figures.")
@json_option
def bench(data_dir: Path, quick: bool, as_json: bool) -> None:
    """Measure recording on this machine: which part limits (hook, ring or disk), and what to set.

    Takes about half a minute. Writes up to 600 MB (--quick: 100) into a directory of its own where traces
    live, and removes it.
    """
    from ml_debugger.benchmarking import run  # imports torch

    report = run(quick=quick, data_dir=data_dir)
    if as_json:
        print_json(report.as_dict())
    else:
        click.echo(str(report))
