"""The trace that a recovery writes, and the report about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_debugger.errors import (
    CorruptDataError,
    MlDebuggerError,
)
from ml_debugger.store import layout
from ml_debugger.trace.header import Gap
from ml_debugger.trace.losses import LostCalls
from ml_debugger.trace.verify import Problem
from ml_debugger.uploading.slices import SliceDraft, cut_slice


@dataclass
class RecoverReport:
    """What was saved, and what was not.

    Attributes:
        directory: Where the new trace lies.
        segments: Segments and slices looked at.
        calls: Calls that were saved.
        rows: Their rows.
        ground_truth_rows: Those of them that have labels.
        discarded_rows: Rows of gaps that were saved: lost while recording.
        attempts: Attempts of the new trace.
        problems: All damage that was met, also such that has cost nothing.
        lost: Calls that could not be saved; empty if everything was.
    """

    directory: Path
    segments: int = 0
    calls: int = 0
    rows: int = 0
    ground_truth_rows: int = 0
    discarded_rows: int = 0
    attempts: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lost: list[LostCalls] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is missing."""
        return not self.lost


class RecoveredTrace:
    """Takes slices; it is no trace yet until `version.json` is written, by `finish`.

    Args:
        info: What the trace consists of.
        report: Counts what is taken.
    """

    def __init__(self, info: layout.VersionInfo, report: RecoverReport) -> None:
        self.report = report
        self._info = info
        self._directory = report.directory
        self._entries: dict[int, dict[int, dict[str, Any]]] = {}
        layout.make_directory(self._directory)

    def register(self, trace_dir: Path, found: Iterable[tuple[int, int]]) -> None:
        """Write `attempts.json` of every rank of ``trace_dir``: what it says, and every attempt ``found``.

        Args:
            trace_dir: The damaged trace.
            found: (rank, attempt) of all segments.
        """
        for rank, rank_dir in layout.rank_directories(trace_dir):
            entries: dict[int, dict[str, Any]] = {}
            try:
                for entry in layout.attempt_entries(rank_dir):
                    number = entry["attempt"]
                    if type(number) is not int or not 0 <= number < layout.MAX_ATTEMPTS:
                        raise CorruptDataError(f"{rank_dir}: attempt {number!r} cannot be", "")
                    entries[number] = entry
            except MlDebuggerError as error:
                self.note(rank_dir, error.message)
            for of_rank, attempt in found:
                if of_rank == rank and attempt not in entries:
                    self.note(rank_dir, f"attempt {attempt} was not in attempts.json")
                    entries[attempt] = {"attempt": attempt, "started_unix_s": 0.0, "pid": 0}
            self._entries[rank] = entries
            target = layout.rank_directory(self._directory, rank)
            layout.make_directory(target)
            layout.write_attempts(target, [entries[number] for number in sorted(entries)])
        self.report.attempts = sorted({attempt for entries in self._entries.values() for attempt in entries})

    def write(self, draft: SliceDraft) -> None:
        """Store a slice."""
        entry = self._entries[draft.ref.rank][draft.ref.attempt]
        partition = layout.partition_directory(
            layout.rank_directory(self._directory, draft.ref.rank), draft.ref.epoch
        )
        layout.make_directory(partition)
        piece = cut_slice(draft, self._info, entry, partition)
        try:
            piece.file.seek(0)
            temporary = partition / f".{piece.name}.tmp"
            with temporary.open("xb") as file:
                shutil.copyfileobj(piece.file, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, partition / str(piece.name))
            layout.sync_directory(partition)
        finally:
            piece.close()
        self.report.calls += draft.calls
        self.report.rows += draft.rows
        self.report.ground_truth_rows += draft.ground_truth_rows

    def note(self, path: Path, problem: str) -> None:
        """Note damage."""
        self.report.problems.append(Problem(str(path), problem))

    def note_gap(self, gap: Gap) -> None:
        """Count rows that were lost while recording."""
        self.report.discarded_rows += gap.rows

    def finish(self) -> None:
        """Make it a trace."""
        layout.write_version(self._directory, self._info)
