"""The group of all commands. A command's module is imported when the command is used: starting is quick."""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ml_debugger import __version__
from ml_debugger.cli.output import shown
from ml_debugger.errors import InvalidTypeError, MlDebuggerError

# Command: (module, one line of help). The order is that of ``--help``.
_COMMANDS = {
    "ls": ("ml_debugger.cli.listing", "List the traces."),
    "info": ("ml_debugger.cli.listing", "Show what a trace holds, live while a tracer writes to it."),
    "export": ("ml_debugger.cli.exporting", "Write a trace into a ZIP of npy or Parquet files."),
    "upload": ("ml_debugger.cli.uploading", "Send a trace to an endpoint; only what that does not hold."),
    "drop": ("ml_debugger.cli.dropping", "Delete an epoch, or all rows, of a trace."),
    "verify": ("ml_debugger.cli.verifying", "Check every byte of a trace; exit status 1 if one is damaged."),
    "recover": ("ml_debugger.cli.recovering", "Save what is sound of a damaged trace into a new one."),
    "merge": ("ml_debugger.cli.merging", "Put data directories of several nodes together."),
    "report": ("ml_debugger.cli.reporting", "Write what a trace says into one HTML file."),
    "bench": ("ml_debugger.cli.benchmarking", "Measure what recording costs on this machine and disk."),
    "serve": ("ml_debugger.cli.serving", "Run a collector, which takes uploads."),
}


class _LazyGroup(click.Group):
    """Knows the names of its commands, and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = getattr(importlib.import_module(_COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with _plain_errors():
            return super().invoke(ctx)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors of ours, and of the system, become one sentence and exit status 1; warnings a sentence too."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        click.echo(f"warning: {shown(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except InvalidTypeError:  # the command line gives only text: a fault of ours
            raise
        except MlDebuggerError as error:
            click.echo(f"error: {shown(str(error))}", err=True)
            sys.exit(1)
        except OSError as error:  # such as a full disk behind standard output
            if error.errno == errno.EPIPE:  # click ends quietly: nobody reads any more
                raise
            click.echo(f"error: {shown(str(error))}", err=True)
            sys.exit(1)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "--data-dir",
    metavar="DIR",
    help="Where traces live, for every command. [default: $MLD_DATA_DIR or ./mld_data]",
)
@click.pass_context
def cli(ctx: click.Context, data_dir: str | None) -> None:
    """Look at what a training run has recorded, export it, send it, check it, delete it.

    A trace is named by its MODEL and its VERSION. Figures come as JSON with --json. Exit status: 0 fine, 1
    failed, damage found or unknown trace, 2 wrong usage.

    Completion: eval "$(_ML_DEBUGGER_COMPLETE=bash_source ml-debugger)"; likewise zsh_source, fish_source.
    """
    ctx.obj = data_dir
