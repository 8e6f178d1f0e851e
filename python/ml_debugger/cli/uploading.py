"""``upload``: sending what an endpoint does not hold."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import click

from ml_debugger.cli.options import json_option, trace_arguments, trace_directory
from ml_debugger.cli.output import human_bytes, print_json, shown
from ml_debugger.errors import UploadError


@click.command()
@trace_arguments
@click.option(
    "--endpoint",
    metavar="URL",
    help="A folder, file://, http(s)://, tus+http(s)://, s3://, gs:// or az://. [default: $MLD_API_ENDPOINT]",
)
@click.option(
    "--epoch", type=click.IntRange(min=-1), help="Only this epoch; -1: the rows without one. [default: all]"
)
@click.option("--force", is_flag=True, help="Send again what the endpoint holds already.")
@json_option
def upload(
    model: str,
    version: str,
    data_dir: Path,
    endpoint: str | None,
    epoch: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Send the committed rows of the trace MODEL VERSION, of all its ranks, to an endpoint.

    What the endpoint holds is not sent again, and what was interrupted goes on where it stopped. Works while
    a tracer writes. The key is that of $MLD_API_KEY; no argument takes it.
    """
    if endpoint == "":
        raise click.BadParameter("expected an address, got an empty text", param_hint="--endpoint")
    address = endpoint or os.environ.get("MLD_API_ENDPOINT")
    if not address:
        raise click.UsageError("there is no endpoint to upload to: pass --endpoint or set MLD_API_ENDPOINT")
    from ml_debugger.uploading.endpoint import parse_endpoint

    try:
        target = parse_endpoint(address, has_key=bool(os.environ.get("MLD_API_KEY")))
    except UploadError as error:
        where = "MLD_API_ENDPOINT" if endpoint is None else "--endpoint"
        raise click.BadParameter(shown(str(error)), param_hint=where) from error
    trace_directory(data_dir, model, version)
    from ml_debugger.uploading import upload_trace

    report = upload_trace(model, version, data_dir=data_dir, endpoint=address, n_epoch=epoch, force=force)
    if as_json:
        names = {"model_name": model, "version_name": version, "endpoint": target.address}
        print_json({**names, **dataclasses.asdict(report)})
        return
    click.echo(
        f"sent {report.segments_sent} segments, {human_bytes(report.bytes_sent)}, in {report.seconds:.1f} s; "
        f"{report.segments_skipped} were there already"
    )
