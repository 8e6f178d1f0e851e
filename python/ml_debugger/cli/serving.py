"""``serve``: a collector, which takes uploads; ``serve new-key``: a key for it."""

from __future__ import annotations

import os

import click

from ml_debugger import collector
from ml_debugger.cli.options import json_option
from ml_debugger.cli.output import print_json, shown
from ml_debugger.collector import DEFAULT_PORT, KeyRing
from ml_debugger.collector.server import DEFAULT_STORAGE
from ml_debugger.collector.storage import parse_storage
from ml_debugger.errors import InvalidInputError
from ml_debugger.uploading.endpoint import is_loopback


@click.group(invoke_without_command=True, subcommand_metavar="[new-key]")
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
@click.option(
    "--keys-file",
    metavar="FILE",
    help="More keys than those of $MLD_API_KEYS, one a line; read again when it changes.",
)
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
    if ctx.invoked_subcommand is not None:
        return
    if not host:
        raise click.BadParameter("expected an address, got an empty text", param_hint="--host")
    keys = _keys(host, keys_file)
    place = _storage(storage, ctx.obj if data_dir is None else data_dir)
    collector.serve(
        host,
        port,
        place,
        keys=keys,
        on_ready=lambda url: click.echo(f"collecting into {shown(place)} at {url}"),
    )


@serve.command("new-key")
@click.option("--keys-file", metavar="FILE", required=True, help="Takes the key's hash; made if missing.")
@click.option("--quota", metavar="SIZE", help="Most that the key may leave here, as 500MB. [default: all]")
@click.option("--note", metavar="TEXT", help="Whose key it is, as a comment in the file.")
@json_option
def new_key(keys_file: str, quota: str | None, note: str | None, as_json: bool) -> None:
    """Make a key for a collector, and print it: this once, since the file takes only its hash.

    A collector that runs with this --keys-file takes the key at once.
    """
    if not keys_file:
        raise click.BadParameter("expected a file, got an empty text", param_hint="--keys-file")
    try:
        key = collector.add_key(keys_file, quota=quota, note=note)
    except InvalidInputError as error:
        raise click.UsageError(shown(str(error))) from error
    if not as_json:
        click.echo(key)
        return
    entry = KeyRing([key if quota is None else f"{key} {quota}"]).find(key)
    print_json(
        {
            "key": key,
            "hash": collector.hashed_key(key),
            "quota_bytes": None if entry is None else entry.quota_bytes,
            "note": note,
            "keys_file": os.path.abspath(keys_file),
        }
    )


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
        parse_storage(place)
    except InvalidInputError as error:
        raise click.BadParameter(shown(str(error)), param_hint="--storage") from error
    return place
