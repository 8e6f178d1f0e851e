"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ml_debugger.errors import MlDebuggerError
from ml_debugger.store import layout

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _data_dir(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Path:
    """The option of the command, else that of the group, else the environment, else ``./mld_data``."""
    chosen = value if value is not None else ctx.obj
    if chosen == "":
        raise click.BadParameter("expected a directory, got an empty text")
    return layout.resolve_data_dir(chosen)


data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    callback=_data_dir,
    help="Where traces live. [default: $MLD_DATA_DIR or ./mld_data]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def _name(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("expected a name, got an empty text")
    return value


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names that are recorded; of versions, those of the model that was named."""
    parent = ctx.parent.params if ctx.parent is not None else {}
    data_dir = layout.resolve_data_dir(ctx.params.get("data_dir") or parent.get("data_dir"))
    names = set()
    for directory in layout.trace_directories(data_dir):
        try:
            recorded = layout.read_version(directory)
        except MlDebuggerError:
            continue
        if parameter.name == "model":
            names.add(recorded.model_name)
        elif recorded.model_name == ctx.params.get("model"):
            names.add(recorded.version_name)
    return sorted(name for name in names if name.startswith(incomplete))


def trace_arguments(command: _Command) -> _Command:
    """The two positionals that name a trace, and where it lies."""
    command = data_dir_option(command)
    command = click.argument("version", callback=_name, shell_complete=_complete)(command)
    return click.argument("model", callback=_name, shell_complete=_complete)(command)


def trace_directory(data_dir: Path, model: str, version: str) -> Path:
    """Directory of a trace that is there.

    Raises:
        NotFoundError: There is no such trace.
        CorruptDataError: Its `version.json` is damaged.
    """
    directory = layout.trace_directory(data_dir, model, version)
    layout.read_version(directory)
    return directory
