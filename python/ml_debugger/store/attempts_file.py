"""`attempts.json`: the attempts of a rank, and the number of the next one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ml_debugger.errors import CorruptDataError, StorageError
from ml_debugger.job import Job
from ml_debugger.store.files import FORMAT_VERSION, check_format_version, read_json, write_json
from ml_debugger.store.partition import segment_directories, slice_files
from ml_debugger.store.paths import partitions, rank_directories

MAX_ATTEMPTS = 1 << 13

_ATTEMPTS_FILE = "attempts.json"


def attempts(rank_dir: Path) -> list[int]:
    """Numbers of the attempts of a rank, rising."""
    return [int(entry["attempt"]) for entry in attempt_entries(rank_dir)]


def attempt_entries(rank_dir: Path) -> list[dict[str, Any]]:
    """The entries of `attempts.json`; empty where there is none.

    Raises:
        CorruptDataError: Not readable as one.
    """
    path = rank_dir / _ATTEMPTS_FILE
    document = read_json(path)
    if document is None:
        return []
    check_format_version(document, path)
    entries = document.get("attempts")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "attempt" in entry for entry in entries
    ):
        raise CorruptDataError(f"{path} holds no list of attempts", "restore the file from a copy")
    return entries


def write_attempts(rank_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Replace `attempts.json`, atomic and durable."""
    write_json(rank_dir / _ATTEMPTS_FILE, {"format_version": FORMAT_VERSION, "attempts": entries})


def register_attempt(rank_dir: Path, job: Job | None = None) -> int:
    """Give out the next attempt number of a rank and record it durably.

    The ranks of one job get one number for their first attempts, one for their second ones, and so on: by
    it readers tell which rows are newer, whichever rank recorded them.

    REQUIRES: the caller holds the rank's writer lock.

    Args:
        rank_dir: Directory of the rank.
        job: The job of this process; without one (or without its id) the rank counts by itself.

    Raises:
        StorageError: The numbers are used up, or the directory cannot be written.
    """
    entries = attempt_entries(rank_dir)
    found = [int(entry["attempt"]) for entry in entries]
    # Segments count too: a lost attempts.json must not hand a number out twice, row ids would repeat.
    for partition in partitions(rank_dir):
        found += [number for number, _, _ in segment_directories(partition.path)]
        found += [name.attempt for name, _ in slice_files(partition.path)]
    attempt = max(found, default=-1) + 1
    if job is not None and job.job_id is not None:
        attempt = _attempt_of_job(rank_dir, job.job_id, entries, attempt)
    if attempt >= MAX_ATTEMPTS:
        raise StorageError(
            f"{rank_dir} has had {MAX_ATTEMPTS} attempts, the most that fit a row_id",
            "use another version_name",
        )
    entry = {"attempt": attempt, "started_unix_s": round(time.time(), 3), "pid": os.getpid()}
    entries.append(entry if job is None else {**entry, **job.entry()})
    write_attempts(rank_dir, entries)
    return attempt


def _attempt_of_job(rank_dir: Path, job_id: str, own: list[dict[str, Any]], lowest: int) -> int:
    """The number that the other ranks of a job gave to the same attempt, else one above all there are."""
    others = [
        attempt_entries(directory)
        for _, directory in rank_directories(rank_dir.parent)
        if directory != rank_dir
    ]
    # A fixed master port gives every start of a script the same job id. What belongs to this start was done
    # by the last process of a rank; where that is a process of an earlier start, its numbers are lower.
    before = len([entry for entry in own if entry.get("job") == job_id and entry.get("pid") == os.getpid()])
    shared = -1
    for entries in others:
        of_job = [entry for entry in entries if entry.get("job") == job_id]
        of_process = [int(entry["attempt"]) for entry in of_job if entry.get("pid") == of_job[-1].get("pid")]
        shared = max([shared, *of_process[before : before + 1]])
    if shared >= lowest:
        return shared
    highest = max((int(entry["attempt"]) for entries in others for entry in entries), default=-1)
    return max(lowest, highest + 1)
