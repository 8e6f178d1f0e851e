"""The job that this process is a rank of: by ``torch.distributed``, else by torchrun's environment, else one.

Reads only what is there already: nothing here communicates, waits, or imports torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

# torchrun's run id where none was given: every such job has it.
_NO_RUN_ID = "none"


@dataclass(frozen=True)
class Job:
    """What the ranks of one job have in common.

    Attributes:
        job_id: Torchrun's run id, else master address and port, with the restart count, such as
            ``"run7#1"``; None where nothing of that is known.
        world_size: Number of processes, each of which records under its own rank; None where that is not
            known because ``data_rank`` was given.
    """

    job_id: str | None
    world_size: int | None

    @property
    def run(self) -> str | None:
        """The id without the restart count: what all restarts of the job have in common."""
        return run_of(self.job_id)

    def entry(self) -> dict[str, Any]:
        """What an entry of `attempts.json` says of it."""
        return {"job": self.job_id, "world_size": self.world_size}


def current_job(*, is_default_rank: bool) -> Job:
    """The job of this process as of now; ``is_default_rank`` when it records under its rank in the job."""
    world_size = process_world_size()
    is_known = is_default_rank and process_rank() < world_size  # RANK may be set without WORLD_SIZE
    return Job(_job_id(), world_size if is_known else None)


def run_of(job_id: str | None) -> str | None:
    """A job id without its restart count."""
    return None if job_id is None else job_id.rpartition("#")[0]


def process_rank() -> int:
    """Rank of this process in its job: from ``torch.distributed``, else ``RANK``, else 0."""
    distributed = _initialized()
    return int(distributed.get_rank()) if distributed is not None else _number("RANK", 0)


def process_world_size() -> int:
    """Number of processes of its job: from ``torch.distributed``, else ``WORLD_SIZE``, else 1."""
    distributed = _initialized()
    return int(distributed.get_world_size()) if distributed is not None else max(1, _number("WORLD_SIZE", 1))


def _initialized() -> Any:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed
    return None


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else default


def _job_id() -> str | None:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run in ("", _NO_RUN_ID):
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        run = f"{address}:{port}" if address and port else ""
    return f"{run}#{_number('TORCHELASTIC_RESTART_COUNT', 0)}" if run else None
