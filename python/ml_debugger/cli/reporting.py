"""``report``: what a trace says, as one HTML file."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ml_debugger.cli.options import json_option, trace_arguments, trace_directory
from ml_debugger.cli.output import print_json, shown
from ml_debugger.errors import InvalidInputError


@click.command()
@trace_arguments
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    help="The file, or an existing directory. [default: MODEL_VERSION_report.html in the current directory]",
)
@click.option(
    "--layer",
    "layers",
    metavar="ALIAS",
    multiple=True,
    help="A layer to look at; may be repeated. Neighbours of likely wrong labels are those of the last. "
    "[default: all, at most 4]",
)
@click.option(
    "--map",
    "map_method",
    type=click.Choice(["pca", "umap"]),
    default="pca",
    show_default=True,
    help="How maps are made; umap needs umap-learn.",
)
@json_option
def report(
    model: str,
    version: str,
    data_dir: Path,
    output: str | None,
    layers: tuple[str, ...],
    map_method: str,
    as_json: bool,
) -> None:
    """Write a report on the trace MODEL VERSION into one HTML file, and print its path.

    Accuracy, loss and confusion, maps of layers, training dynamics, labels that are likely wrong,
    near-duplicates, outliers, drift, and the health of the recording. Works while a tracer writes, and opens
    without a network. Needs pip install "ml-debugger[report]".
    """
    from tqdm import tqdm

    trace_directory(data_dir, model, version)
    if output == "":
        raise click.BadParameter("expected a file, got an empty text", param_hint="--output")
    from ml_debugger.report.document import build_document
    from ml_debugger.report.page import check_writable, resolve_report, write_page
    from ml_debugger.trace import open_trace

    trace = open_trace(model, version, data_dir)
    path = resolve_report(output, trace)
    check_writable(path)
    analysis = trace.analysis
    try:
        for name in layers:
            analysis.check_layer(name)
    except InvalidInputError as error:
        raise click.BadParameter(str(error), param_hint="--layer") from error
    started = time.monotonic()
    with tqdm(desc="report", unit=" rows", disable=None) as progress:
        document = build_document(trace, layers or None, map_method, progress.update)
    write_page(document, path)
    if not as_json:
        click.echo(shown(str(path)))
        return
    figures = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "seconds": round(time.monotonic() - started, 3),
    }
    # The points of maps and charts are a picture; `Trace.analysis` has them as numbers.
    layers_found = [
        {name: value for name, value in one.items() if name != "map"} for one in document["layers"]
    ]
    dynamics = {name: value for name, value in document["dynamics"].items() if name != "points"}
    print_json({**figures, **document, "layers": layers_found, "dynamics": dynamics})
