"""What the primary rank does about the other ranks before and after it exports."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ml_debugger.errors import MlDebuggerError
from ml_debugger.job import Job
from ml_debugger.store import job_ranks, layout

if TYPE_CHECKING:
    from ml_debugger.trace.catalog import RankSummary


class Gathering:
    """The rows of all ranks, as far as they can be had; what cannot is named in a warning.

    Args:
        trace_dir: Directory of the (model, version).
        rank: The rank that exports.
        job: Its job.
    """

    def __init__(self, trace_dir: Path, rank: int, job: Job) -> None:
        self._trace_dir = trace_dir
        self._rank = rank
        self._job = job

    def settle(self, timeout_s: float) -> None:
        """Wait for what the other ranks have handed over; see `job_ranks.settle_other_ranks`."""
        for found in job_ranks.settle_other_ranks(self._trace_dir, self._rank, self._job, timeout_s):
            _warn(f"the export is not complete: {found}")

    def warn_of_missing(self, ranks: list[RankSummary]) -> None:
        """Warn about ranks of the job that have no rows among those that were exported."""
        exported = {summary.rank for summary in ranks if summary.rows}
        here = {
            rank for rank, rank_dir in layout.rank_directories(self._trace_dir) if self._has_begun(rank_dir)
        }
        # Where nobody has rows, only those are missing that never came.
        present = here & exported if exported else here
        missing = job_ranks.absent_ranks(self._job.world_size, {self._rank, *present})
        if missing:
            _warn(
                f"the export has no rows of {job_ranks.named(missing)}, of the {self._job.world_size} ranks "
                f"of this job (looked in {self._trace_dir}); if they recorded into another data_dir, "
                "`ml-debugger merge` puts the directories together"
            )

    def _has_begun(self, rank_dir: Path) -> bool:
        """Whether a rank has recorded as part of this job."""
        try:
            entries = layout.attempt_entries(rank_dir)
        except MlDebuggerError:
            return True
        return any(entry.get("job") == self._job.job_id for entry in entries)


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
