"""The health of the capture: rows, losses, waits and throughput, as store or manifest know them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_debugger.store.survey import RankSurvey, Totals, survey_trace
from ml_debugger.trace.catalog import Snapshot

_COUNTERS = ("rows_submitted", "rows_committed", "rows_discarded", "rows_failed", "rows_in_flight", "commits")


def store_health(trace_dir: Path) -> dict[str, Any]:
    """Health of a trace on disk, by its counters and headers; no rows are read.

    Returns:
        ``totals`` (figures of the whole trace), ``epochs`` and ``ranks`` (figures of each), ``lost`` (rows by
        cause) and ``writers`` (counters of the tracers that wrote last: waits and throughput too).
    """
    survey = survey_trace(trace_dir)
    lost: Counter[str] = Counter()
    for gap in Snapshot(trace_dir, None, lambda call: False).gaps:
        lost[gap.cause] += gap.rows
    return {
        "totals": {**_figures(survey.totals), "unusable_segments": len(survey.unusable)},
        "epochs": [{"n_epoch": epoch, **_figures(totals)} for epoch, totals in survey.epochs.items()],
        "ranks": [
            {
                "rank": rank.rank,
                "attempts": len(rank.attempts),
                "writing": rank.writing,
                **_figures(rank.totals),
            }
            for rank in survey.ranks
        ],
        "lost": dict(sorted(lost.items())),
        "writers": [writer for rank in survey.ranks for writer in _writers(rank)],
    }


def _figures(totals: Totals) -> dict[str, int]:
    return {
        "rows": totals.rows,
        "labelled_rows": totals.ground_truth_rows,
        "calls": totals.calls,
        "lost_rows": totals.discarded_rows,
        "disk_bytes": totals.disk_bytes,
    }


def _writers(rank: RankSurvey) -> list[dict[str, Any]]:
    return [_writer(rank.rank, counters) for counters in (rank.status or {}).get("attempts", [])]


def _writer(rank: int, counters: Mapping[str, Any]) -> dict[str, Any]:
    # Traces of an earlier writer lack the last four.
    seconds = counters.get("write_ns", 0) * 1e-9
    return {
        "rank": rank,
        "attempt": counters.get("attempt"),
        **{name: counters.get(name, 0) for name in _COUNTERS},
        "stalls": counters.get("stalls"),
        "stall_seconds": counters["stall_ns"] * 1e-9 if "stall_ns" in counters else None,
        "write_throughput_bytes_per_s": counters.get("written_bytes", 0) / seconds if seconds else None,
    }


def export_health(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of an export tells; a trace on disk knows more. See `store_health`."""
    discarded = manifest.get("discarded") or {}
    return {
        "totals": {
            "rows": manifest.get("rows_recorded", 0),
            "rows_written": manifest.get("rows_written", 0),
            "rows_deduplicated": manifest.get("rows_deduplicated", 0),
            "lost_rows": discarded.get("rows", 0),
        },
        "epochs": [],
        "ranks": [{"rank": rank["rank"], "rows": rank["rows"]} for rank in manifest.get("ranks", [])],
        "lost": dict(discarded.get("by_cause", {})),
        "writers": [],
    }
