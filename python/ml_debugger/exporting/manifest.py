"""`manifest.json` of an export: what was recorded, what was written, what is missing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ml_debugger.store import layout
from ml_debugger.store.status import is_writing
from ml_debugger.trace.catalog import RankSummary
from ml_debugger.trace.header import Gap
from ml_debugger.trace.npy_member import FORMAT_VERSION, MANIFEST_NAME
from ml_debugger.trace.schema import ColumnSchema, recorded_label

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "column_entry",
    "discarded_entry",
    "encode",
    "list_entry",
    "ranks_entry",
]


def column_entry(schema: ColumnSchema, written: np.dtype[Any], *, one_shape: bool) -> dict[str, Any]:
    """A column in the manifest: recorded type, written dtype, shape of one row (null if it varies)."""
    return {
        "recorded": recorded_label(schema),
        "written": written.str if written.kind == "U" else written.name,
        "shape": list(schema.row_shape) if one_shape else None,
    }


def list_entry(schema: ColumnSchema) -> dict[str, Any]:
    """A column of text or bytes that is written as such, one value a row."""
    return {
        "recorded": recorded_label(schema),
        "written": "string" if schema.is_text else "binary",
        "shape": [],
    }


def discarded_entry(gaps: list[Gap]) -> dict[str, Any]:
    """Rows that were handed over and are in no segment, by cause."""
    by_cause: Counter[str] = Counter()
    for gap in gaps:
        by_cause[gap.cause] += gap.rows
    return {"rows": by_cause.total(), "by_cause": dict(sorted(by_cause.items()))}


def ranks_entry(trace_dir: Path, ranks: list[RankSummary]) -> list[dict[str, Any]]:
    """One entry a rank; ``writing`` tells whether a process still records there."""
    return [
        {
            "rank": summary.rank,
            "rows": summary.rows,
            "last_call": summary.last_call,
            "writing": is_writing(layout.rank_directory(trace_dir, summary.rank)),
        }
        for summary in ranks
    ]


def encode(document: dict[str, Any]) -> bytes:
    """The manifest's bytes; equal documents give equal bytes."""
    return (json.dumps(document, indent=1) + "\n").encode("ascii")
