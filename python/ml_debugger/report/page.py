"""The page: template, style, program and figures in one file."""

from __future__ import annotations

import html
import importlib.resources
import json
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ml_debugger.errors import StorageError
from ml_debugger.exporting.naming import safe_name
from ml_debugger.path_argument import check_path
from ml_debugger.report.document import build_document
from ml_debugger.store.files import storage_errors

if TYPE_CHECKING:
    from ml_debugger.trace import Trace

_PROGRAMS = ("elements.js", "charts.js", "sections.js")


def write_report(
    trace: Trace,
    output_path: str | os.PathLike[str] | None = None,
    *,
    layers: Sequence[str] | None = None,
    map_method: str = "pca",
    progress: Callable[[int], object] = lambda rows: None,
) -> Path:
    """Write what `Trace.analysis` says as one HTML file, which needs no network and no other file.

    Reads logits and labels once, and every layer once or twice, in bounded memory (see
    `ml_debugger.analysis.Analysis`). Whatever makes no sense for the trace is left out, with a sentence that
    says why. The file is at most some MB, whatever the size of the trace.

    Args:
        trace: From `open_trace` or `load_export`.
        output_path: The file, or an existing directory for ``<model_name>_<version_name>_report.html``;
            missing parents are made. None: the current directory. An existing file is replaced when the new
                one is complete.
        layers: Columns of features to look at; None: all, at most 4, the last of them.
        map_method: ``"pca"``, or ``"umap"`` (``pip install "ml-debugger[umap]"``).
        progress: Called with the rows of each batch that was read.

    Returns:
        The file that was written.

    Raises:
        InvalidInputError: pandas or scikit-learn is not installed (``pip install "ml-debugger[report]"``), or
            there is no such layer or method.
        InvalidTypeError: ``output_path`` is not a path.
        NotFoundError: Epochs are dropped faster than they can be read.
        CorruptDataError: Stored bytes are not what was written.
        StorageError: The file cannot be written.
    """
    path = resolve_report(output_path, trace)
    check_writable(path)
    document = build_document(trace, layers, map_method, progress)
    write_page(document, path)
    return path


def default_report_name(model_name: str, version_name: str) -> str:
    """File name ``<model_name>_<version_name>_report.html``, safe on every filesystem."""
    return safe_name(f"{model_name}_{version_name}", "_report.html")


def resolve_report(output_path: str | os.PathLike[str] | None, trace: Trace) -> Path:
    """The file to write.

    Raises:
        InvalidInputError: An empty path, or one with NUL.
        InvalidTypeError: Not a path.
        StorageError: The filesystem cannot look at it.
    """
    name = default_report_name(trace.model_name, trace.version_name)
    if output_path is None:
        return Path.cwd() / name
    text = check_path(output_path, "output_path", "a file or a directory")
    path = Path(text)
    with storage_errors(f"look at {text}", "name a path that the filesystem takes"):
        return path / name if path.is_dir() or text.endswith(os.sep) else path


def check_writable(path: Path) -> None:
    """Make the directory of a file, before hours are spent on its content.

    Raises:
        StorageError: It cannot be made, or no file in it.
    """
    problem = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = error.strerror or str(error)
    if not problem and not os.access(path.parent, os.W_OK | os.X_OK):
        problem = "the directory is not writable"
    if problem:
        raise _unwritable(path, problem)


def write_page(document: dict[str, Any], path: Path) -> None:
    """Write the page of some figures, all or nothing.

    Raises:
        StorageError: It cannot be written.
    """
    temporary = path.parent / f".ml-debugger-{secrets.token_hex(8)}.tmp"
    try:
        temporary.write_text(render(document), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, problem: str) -> StorageError:
    return StorageError(
        f"cannot write {path}: {problem}", "check that the directory is writable and has space"
    )


def render(document: dict[str, Any]) -> str:
    """The page as text. Names and ids reach it only as JSON, which the program puts into text nodes."""
    title = f"{document['model_name']} {document['version_name']}"
    # Surrogates cannot be encoded, and are none in HTML.
    title = title.encode("utf-8", "replace").decode("utf-8")
    return Template(_asset("page.html")).substitute(
        title=html.escape(title),
        style=_asset("page.css"),
        program="\n".join(map(_asset, _PROGRAMS)),
        data=script_json(document),
    )


def script_json(document: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, nor open a comment; ASCII."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return importlib.resources.files("ml_debugger.report").joinpath(name).read_text(encoding="utf-8")
