"""The judge of a trace after a fault: reads it with the public API, compares it with the ledgers bit for bit.

Runs in a process of its own (`fork_server`), since a damaged store must not be able to take the judge along.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acknowledgements import DROP_BEGUN, DROPPED, NEVER, REFUSED, RETURNED, Ledger, Promise
from ml_debugger import open_trace
from ml_debugger.errors import NotFoundError
from recorder import crc_of_call, version_of

Found = dict[tuple[int, int, int], int]  # (round, lane, call) -> rows present


class Verdict:
    """What is wrong with a store, by kind; all empty is sound."""

    KINDS = ("lost", "torn", "wrong", "invented", "undead", "half_dropped", "accounts", "structure")

    def __init__(self) -> None:
        self.findings: dict[str, list[str]] = {kind: [] for kind in self.KINDS}
        self.rows = 0

    def add(self, kind: str, text: str) -> None:
        if len(self.findings[kind]) < 10:
            self.findings[kind].append(text)

    def as_json(self) -> dict[str, Any]:
        return {"rows": self.rows, **{kind: texts for kind, texts in self.findings.items() if texts}}


def read_version(data_dir: str, version: str) -> list[tuple[str, Any, Any, Any, int, int]]:
    """Rows of a trace as (id, features, logits, label, epoch, call), in row order; [] if there is none."""
    try:
        trace = open_trace("net", version, data_dir=data_dir)
    except NotFoundError:
        return []
    features = trace.tensors("extracted_feature")
    truth = trace.tensors("ground_truth")
    labels = dict(zip(_numbers(truth["row_id"]), _numbers(truth["label"]), strict=True)) if truth else {}
    rows = []
    columns = [features[name] for name in ("input_id", "features", "logits", "row_id", "n_epoch", "call")]
    for key, x, logits, row_id, epoch, call in zip(*columns, strict=True):
        rows.append((str(key), x, logits, labels.get(int(row_id)), int(epoch), int(call)))
    return rows


def _numbers(column: Any) -> list[int]:
    return [int(value) for value in column]


def judge(data_dir: str, promises: list[Promise], tracers: int) -> Verdict:
    """Compare what can be read with what was submitted and acknowledged."""
    verdict = Verdict()
    ledgers = {promise.number: (promise, promise.open()) for promise in promises}
    # A later round may drop what an earlier one has recorded.
    drops = np.max([ledger.drops for _, ledger in ledgers.values()], axis=0)
    for tracer in range(tracers):
        found = _compare_rows(verdict, read_version(data_dir, version_of(tracer)), tracer, ledgers)
        for promise, ledger in ledgers.values():
            _look_for_losses(verdict, promise, ledger, tracer, found, drops[tracer])
            _check_accounts(verdict, promise, ledger, tracer, found, drops[tracer])
    _verify_structure(verdict, Path(data_dir))
    return verdict


def _compare_rows(
    verdict: Verdict, rows: list[Any], tracer: int, ledgers: dict[int, tuple[Promise, Ledger]]
) -> Found:
    calls: dict[tuple[int, int, int], list[Any]] = defaultdict(list)
    for row in rows:
        number, lane, call, _ = map(int, row[0].split("."))
        calls[number, lane, call].append(row)
    verdict.rows += len(rows)
    found: Found = {}
    for (number, lane, call), members in calls.items():
        name = f"v{tracer}: call {number}.{lane}.{call}"
        if number not in ledgers or ledgers[number][1].calls["state"][lane][call] == NEVER:
            verdict.add("invented", f"{name} was never submitted")
            continue
        ledger = ledgers[number][1]
        if lane // ledger.shape.threads != tracer:
            verdict.add("invented", f"{name} belongs to another tracer")
        note = ledger.calls[lane][call]
        found[number, lane, call] = len(members)
        if len(members) != note["rows"]:
            verdict.add("torn", f"{name} has {len(members)} of {note['rows']} rows")
            continue
        if note["state"] == REFUSED:
            verdict.add("undead", f"{name} raised, and is there")
        if crc_of_members(members) != note["crc"]:
            verdict.add("wrong", f"{name} has other bytes")
        if any(member[4] != note["epoch"] or member[5] != call for member in members):
            verdict.add("wrong", f"{name} has another epoch or field")
    return found


def crc_of_members(members: list[Any]) -> int:
    """The number under which a call was submitted, from its rows as read."""
    members = sorted(members, key=lambda row: int(row[0].rsplit(".", 1)[1]))
    if any(member[3] is None for member in members):
        return -1
    return crc_of_call(
        [member[0] for member in members],
        torch.stack([member[1] for member in members]).numpy().tobytes(),
        torch.stack([member[2] for member in members]).numpy().tobytes(),
        np.array([member[3] for member in members], np.int64).tobytes(),
    )


def _look_for_losses(
    verdict: Verdict, promise: Promise, ledger: Ledger, tracer: int, found: Found, drops: Any
) -> None:
    """Whatever was acknowledged is there; a drop has taken all of an epoch or nothing."""
    present: dict[int, int] = defaultdict(int)
    missing: dict[int, list[str]] = defaultdict(list)
    watermark = ledger.lanes[promise.survives]
    for lane in range(tracer * ledger.shape.threads, (tracer + 1) * ledger.shape.threads):
        notes = ledger.calls[lane]
        for call in np.flatnonzero(notes["state"] != NEVER).tolist():
            epoch = int(notes["epoch"][call])
            if (promise.number, lane, call) in found:
                present[epoch] += 1
            elif call < watermark[lane] and notes["state"][call] == RETURNED:
                missing[epoch].append(f"v{tracer}: call {promise.number}.{lane}.{call} of epoch {epoch}")
    for epoch in {*present, *missing}:
        drop, name = drops[epoch], f"v{tracer}: epoch {epoch}"
        if drop == DROPPED and present[epoch]:
            verdict.add("half_dropped", f"{name} was dropped, {present[epoch]} calls are there")
        elif drop == DROP_BEGUN and present[epoch] and missing[epoch]:
            verdict.add("half_dropped", f"{name} is dropped in part: {missing[epoch][0]} is gone")
        elif drop not in (DROPPED, DROP_BEGUN):
            for text in missing[epoch]:
                verdict.add("lost", text)


def _check_accounts(
    verdict: Verdict, promise: Promise, ledger: Ledger, tracer: int, found: Found, drops: Any
) -> None:
    """The figures of `stats` add up, and agree with what is on disk."""
    cell = ledger.tracers[tracer]
    name = f"v{tracer}, round {promise.number}"
    if cell["law_broken"]:
        verdict.add("accounts", f"{name}: stats() did not add up")
    lanes = range(tracer * ledger.shape.threads, (tracer + 1) * ledger.shape.threads)
    notes = ledger.calls[lanes.start : lanes.stop]
    if drops[notes["epoch"][notes["state"] != NEVER]].any() or promise.survives != "flushed":
        return
    present = sum(
        rows for (number, lane, _), rows in found.items() if number == promise.number and lane in lanes
    )
    if present < cell["committed"]:
        verdict.add("lost", f"{name}: {present} rows are there, stats() had {cell['committed']} committed")
    if not cell["closed"]:
        return
    figures = dict(zip(cell.dtype.names, cell.tolist(), strict=True))
    handed_over = int(notes["rows"][notes["state"] == RETURNED].sum())
    refused = int(notes["rows"][notes["state"] == REFUSED].sum())
    unsure = figures["failed"] + figures["in_flight"]
    # A commit whose outcome nobody was told may be on disk beside what is counted.
    if not figures["committed"] <= present <= figures["committed"] + unsure:
        verdict.add("accounts", f"{name}: {present} rows are there, stats() had {figures}")
    if not handed_over <= figures["submitted"] <= handed_over + refused:
        verdict.add("accounts", f"{name}: {handed_over} rows were handed over, stats() had {figures}")
    if handed_over - present > figures["discarded"] + unsure:
        verdict.add("accounts", f"{name}: {handed_over - present} rows are missing, stats() had {figures}")


def _verify_structure(verdict: Verdict, data_dir: Path) -> None:
    """Stock lmdb's offline check of every segment that a reader may open."""
    try:
        from lmdb.verify import VerifyError, verify
    except ImportError:
        return
    from ml_debugger.store import layout

    for rank_dir in data_dir.glob("*/*/rank-*"):
        for partition in layout.partitions(rank_dir):
            for segment in layout.segments(partition.path):
                if not segment.usable or segment.path.is_file():  # a slice is none of LMDB's
                    continue
                try:
                    verify(str(segment.path))
                except VerifyError as error:
                    verdict.add("structure", f"{segment.path}: {error}")
