"""``ls`` and ``info``: what traces there are, and what one of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ml_debugger.cli.options import data_dir_option, json_option, trace_arguments, trace_directory
from ml_debugger.cli.output import epoch_name, human_bytes, print_json, print_table, shown
from ml_debugger.errors import MlDebuggerError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.store.job_ranks import named
from ml_debugger.store.survey import RankSurvey, Totals, TraceSurvey, survey_trace


@click.command()
@data_dir_option
@json_option
@click.pass_context
def ls(ctx: click.Context, data_dir: Path, as_json: bool) -> None:
    """List the traces under the data directory.

    Rows and sizes are what is committed now. A trace whose files are damaged is named on standard error, and
    the exit status is 1.
    """
    surveys, damaged = _survey_all(data_dir)
    for error in damaged:
        click.echo(f"error: {shown(str(error))}", err=True)
    if as_json:
        print_json([_summary(survey) for survey in surveys])
    elif surveys:
        print_table(
            ["MODEL", "VERSION", "EPOCHS", "ROWS", "SIZE", "RANKS", "STATE"],
            [
                [
                    survey.info.model_name,
                    survey.info.version_name,
                    _epoch_range(list(survey.epochs)),
                    survey.totals.rows,
                    human_bytes(survey.totals.disk_bytes),
                    len(survey.ranks),
                    "writing" if survey.writing else "idle",
                ]
                for survey in surveys
            ],
            numbers=["ROWS", "SIZE", "RANKS"],
        )
    elif not damaged:
        click.echo(f"no traces in {shown(str(data_dir))}", err=True)
    ctx.exit(1 if damaged else 0)


def _survey_all(data_dir: Path) -> tuple[list[TraceSurvey], list[MlDebuggerError]]:
    surveys, damaged = [], []
    for directory in layout.trace_directories(data_dir):
        try:
            surveys.append(survey_trace(directory))
        except NotFoundError:  # deleted while we looked
            continue
        except MlDebuggerError as error:
            damaged.append(error)
    surveys.sort(key=lambda survey: (survey.info.model_name, survey.info.version_name))
    return surveys, damaged


def _epoch_range(epochs: list[int]) -> str:
    """Epochs as ranges, such as ``none, 0-4, 7``."""
    ranges: list[list[int]] = []
    for epoch in epochs:
        if ranges and ranges[-1][1] == epoch - 1 >= 0:
            ranges[-1][1] = epoch
        else:
            ranges.append([epoch, epoch])
    return ", ".join(epoch_name(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _summary(survey: TraceSurvey) -> dict[str, Any]:
    return {
        "model_name": survey.info.model_name,
        "version_name": survey.info.version_name,
        "directory": str(survey.directory),
        "epochs": list(survey.epochs),
        "ranks": [rank.rank for rank in survey.ranks],
        "writing": survey.writing,
        **_figures(survey.totals),
    }


def _figures(totals: Totals) -> dict[str, int]:
    return {
        "rows": totals.rows,
        "ground_truth_rows": totals.ground_truth_rows,
        "calls": totals.calls,
        "discarded_rows": totals.discarded_rows,
        "bytes": totals.disk_bytes,
    }


@click.command()
@trace_arguments
@json_option
def info(model: str, version: str, data_dir: Path, as_json: bool) -> None:
    """Show what the trace MODEL VERSION holds.

    While a tracer writes to it, in whatever process, the counters of its ranks are at most 0.2 s old.
    """
    survey = survey_trace(trace_directory(data_dir, model, version))
    if as_json:
        print_json(_details(survey))
    else:
        _print_details(survey)


def _details(survey: TraceSurvey) -> dict[str, Any]:
    recorded = survey.info
    return {
        **_summary(survey),
        "epochs": [{"n_epoch": epoch, **_figures(totals)} for epoch, totals in survey.epochs.items()],
        "attempts": sorted({attempt for rank in survey.ranks for attempt in rank.attempts}),
        "ranks": [_rank_details(rank) for rank in survey.ranks],
        "fingerprint": recorded.fingerprint,
        "target_layers": recorded.aliases,
        "additional_fields": recorded.additional_fields,
        "additional_label_fields": recorded.additional_label_fields,
        "missing_ranks": survey.missing_ranks,
        "unusable_segments": [str(path) for path in survey.unusable],
    }


def _rank_details(rank: RankSurvey) -> dict[str, Any]:
    status = rank.status or {}
    return {
        "rank": rank.rank,
        "writing": rank.writing,
        "pid": status.get("pid") if rank.writing else None,
        "attempts": rank.attempts,
        **_figures(rank.totals),
        # What the writer says of the attempts that it has open: rows submitted, committed, in flight, ...
        "counters": status.get("attempts", []) if rank.writing else [],
    }


def _print_live(ranks: list[RankSurvey]) -> None:
    if not ranks:
        return
    counters = ["submitted", "committed", "in_flight", "discarded", "failed"]
    headings = ["RANK", "PID", "ATTEMPT", *(name.replace("_", " ").upper() for name in counters)]
    rows = []
    for rank in ranks:
        status = rank.status or {}
        for one in status.get("attempts", []):
            rows.append(
                [rank.rank, status.get("pid"), one["attempt"], *(one[f"rows_{name}"] for name in counters)]
            )
    click.echo()
    print_table(headings, rows, numbers=headings)


def _print_details(survey: TraceSurvey) -> None:
    recorded, totals = survey.info, survey.totals
    lines = {
        "model": recorded.model_name,
        "version": recorded.version_name,
        "directory": survey.directory,
        "layers": ", ".join(f"{alias} ({path or 'head'})" for alias, path in recorded.aliases.items()) or "-",
        "fields": ", ".join(
            f"{field['name']} ({field['type']})"
            for field in (*recorded.additional_fields, *recorded.additional_label_fields)
        )
        or "-",
        "rows": f"{totals.rows} ({totals.ground_truth_rows} with ground truth)",
        "lost rows": totals.discarded_rows,
        "size": human_bytes(totals.disk_bytes),
    }
    for name, value in lines.items():
        click.echo(f"{name:<10} {shown(str(value))}")
    if survey.epochs:
        click.echo()
        print_table(
            ["EPOCH", "ROWS", "LABELLED", "CALLS", "SIZE"],
            [
                [epoch_name(epoch), one.rows, one.ground_truth_rows, one.calls, human_bytes(one.disk_bytes)]
                for epoch, one in survey.epochs.items()
            ],
            numbers=["ROWS", "LABELLED", "CALLS", "SIZE"],
        )
    _print_live([rank for rank in survey.ranks if rank.writing and rank.status])
    if survey.missing_ranks:
        missing = named(survey.missing_ranks)
        click.echo(f"warning: {missing} of the newest job left nothing here", err=True)
    for path in survey.unusable:
        click.echo(f"warning: {shown(str(path))} was open when the machine lost power", err=True)
