"""``serve``: a collector, which takes uploads."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

import click

from ml_debugger import collector
from ml_debugger.cli.output import shown
from ml_debugger.collector import DEFAULT_PORT, KeyRing
from ml_debugger.collector.server import DEFAULT_STORAGE
from ml_debugger.errors import InvalidInputError, UploadError
from ml_debugger.uploading.endpoint import is_loopback, parse_endpoint, shown_endpoint


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--storage",
    metavar="DIR",
    help=f"A folder, s3://, gs:// or az://, that takes the traces. [default: {DEFAULT_STORAGE}]",
)
@click.option("--keys-file", metavar="FILE", help="More keys than those of $MLD_API_KEYS, one a line.")
@click.option("--data-dir", metavar="DIR", help="Where the default of --storage lies. [default: here]")
@click.pass_context
def serve(
    ctx: click.Context, host: str, port: int, storage: str | None, keys_file: str | None, data_dir: str | None
) -> None:
    """Run a collector until SIGINT or SIGTERM; prints its address when it takes connections.

    Who comes in shows a key: one of $MLD_API_KEYS, separated by commas, or of --keys-file; no argument takes
    one. Without keys it listens on this machine only. What it took opens with --data-dir DIR like a local
    trace.
    """
    if not host:
        raise click.BadParameter("expected an address, got an empty text", param_hint="--host")
    keys = _keys(host, keys_file)
    place = _storage(storage, ctx.obj if data_dir is None else data_dir)
    # The server gives a signal back when it has closed: to the handler that was there before, so to this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    collector.serve(
        host,
        port,
        place,
        keys=keys,
        on_ready=lambda url: click.echo(f"collecting into {shown(place)} at {url}"),
    )


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def _keys(host: str, keys_file: str | None) -> KeyRing:
    """The keys; that they are malformed, or missing where others come in, is wrong usage."""
    try:
        keys = KeyRing.from_environment(keys_file)
    except InvalidInputError as error:
        raise click.UsageError(shown(str(error))) from error
    if not keys and not is_loopback(host):
        raise click.UsageError(
            f"a collector on {shown(host)} can be reached by others and needs keys: set MLD_API_KEYS, name a "
            "--keys-file, or listen on 127.0.0.1"
        )
    return keys


def _storage(storage: str | None, data_dir: str | None) -> str:
    """Where traces go; the default is a folder of its own, never that in which tracers write."""
    for name, value in (("--storage", storage), ("--data-dir", data_dir)):
        if value == "":
            raise click.BadParameter("expected a directory, got an empty text", param_hint=name)
    place = storage or os.path.join(data_dir or "", DEFAULT_STORAGE)
    try:
        kind = parse_endpoint(place, has_key=False).kind
    except UploadError as error:
        raise click.BadParameter(shown(str(error)), param_hint="--storage") from error
    if kind not in ("folder", "objects"):
        raise click.BadParameter(
            f"expected a folder or an object store, got {shown(shown_endpoint(place))}",
            param_hint="--storage",
        )
    return place
