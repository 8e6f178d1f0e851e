"""Data directories of the nodes of a job put together as one, by hard links where that is possible.

What is merged is sealed or at rest, and never changed afterwards, so a link is as good as a copy. Everything
is compared before anything is made. A segment appears whole, under its name, by one rename; a trace that was
not there appears with its `version.json`, which comes last. So an interrupted merge leaves nothing half
there, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_debugger.errors import (
    ArchitectureMismatchError,
    CorruptDataError,
    InvalidInputError,
    NotFoundError,
    TraceInUseError,
)
from ml_debugger.job import run_of
from ml_debugger.store import layout
from ml_debugger.store.status import is_writing

# What is named so is ignored by readers, and deleted by the next tracer or merge.
_TEMPORARY = "trash-merge-"
_IDENTITY = ("attempt", "started_unix_s", "pid")
# A link cannot cross filesystems; some filesystems have none, or count them narrowly.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


@dataclass
class MergeReport:
    """What a merge has done.

    Attributes:
        traces: Traces of the output that the sources hold.
        ranks: Ranks of these, counted a trace.
        segments_linked: Segments and slices that are in the output by a hard link.
        segments_copied: Those that had to be copied, since they lie on another filesystem.
        segments_present: Those that were there already.
        bytes_copied: Bytes of the copies.
        set_aside: Segments that no reader opens, since a power cut may have torn them. They were taken over
            as they are; ``ml-debugger recover`` saves what they hold.
    """

    traces: int = 0
    ranks: int = 0
    segments_linked: int = 0
    segments_copied: int = 0
    segments_present: int = 0
    bytes_copied: int = 0
    set_aside: list[str] = field(default_factory=list)


@dataclass
class _Rank:
    """One rank of a trace: where it lies in the sources, and the attempts of all of them."""

    places: list[Path] = field(default_factory=list)
    attempts: dict[int, tuple[dict[str, Any], Path]] = field(default_factory=dict)


@dataclass
class _Trace:
    """One trace: its description, and its ranks in all sources."""

    info: layout.VersionInfo
    place: Path
    runs: set[str]
    ranks: dict[int, _Rank] = field(default_factory=dict)


def merge_data_dirs(
    sources: Sequence[Path], output: Path, progress: Callable[[int, int], object] | None = None
) -> MergeReport:
    """Make one data directory of several; the sources are not changed.

    Args:
        sources: Data directories, such as one a node.
        output: The data directory that gets all of them; missing, or what an earlier merge has made.
        progress: Called with (bytes done, bytes in all) of data files.

    Raises:
        NotFoundError: A source is not there, or no source holds a trace.
        InvalidInputError: One trace was recorded by different jobs, with other aliases or fields, or a rank
            has two different attempts of one number; ``output`` is a source. Nothing was changed.
        ArchitectureMismatchError: One trace has different fingerprints. Nothing was changed.
        TraceInUseError: A tracer records into a source or the output, or another merge runs.
        CorruptDataError: A small file is damaged, or a segment of the output is not the source's.
        StorageError: The output cannot be written.
    """
    _check_places(sources, output)
    report = MergeReport()
    found: dict[Path, _Trace] = {}
    for source in sources:
        for trace_dir in layout.trace_directories(source):
            _add(found, trace_dir.relative_to(source), trace_dir)
    if not found:
        raise NotFoundError(
            f"there is no trace in {', '.join(map(str, sources))}", "name data directories that hold traces"
        )
    for name in found:
        target = output / name
        if layout.rank_directories(target):  # of an earlier merge, which may have been interrupted
            _add(found, name, target, is_output=True)
    places = [place for trace in found.values() for rank in trace.ranks.values() for place in rank.places]
    total = sum(_length(path) for place in places for _, path in _items(place))
    done = 0
    for name, trace in sorted(found.items()):
        report.traces += 1
        report.ranks += len(trace.ranks)
        with layout.storage_errors(f"merge into {output}", "check that it is writable and has space"):
            for number in sorted(trace.ranks):
                target = layout.rank_directory(output / name, number)
                for length in _merge_rank(trace.ranks[number], target, report):
                    done += length
                    if progress is not None:
                        progress(done, total)
            layout.write_version(output / name, trace.info)
    return report


def _check_places(sources: Sequence[Path], output: Path) -> None:
    places: dict[Path, Path] = {}
    for source in sources:
        if not source.is_dir():
            raise NotFoundError(f"there is no directory {source}", "name the data directories to merge")
        real = source.resolve()
        if real in places:
            raise InvalidInputError(
                f"{source} and {places[real]} are one directory", "name each directory once"
            )
        places[real] = source
    target = output.resolve()
    for real, source in places.items():
        if target == real or target.is_relative_to(real) or real.is_relative_to(target):
            raise InvalidInputError(
                f"the output {output} and the source {source} overlap",
                "choose a directory outside of the sources",
            )


def _add(found: dict[Path, _Trace], name: Path, trace_dir: Path, *, is_output: bool = False) -> None:
    """Take in one place where a trace lies, compared with the other ones."""
    ranks = layout.rank_directories(trace_dir)
    entries = {rank: layout.attempt_entries(rank_dir) for rank, rank_dir in ranks}
    runs = {run for rank in entries for entry in entries[rank] if (run := run_of(entry.get("job")))}
    try:
        info = layout.read_version(trace_dir)
    except NotFoundError:  # an interrupted merge
        info = found[name].info
    trace = found.setdefault(name, _Trace(info, trace_dir, runs))
    _check_same(trace, info, runs, trace_dir)
    trace.runs |= runs
    for rank, rank_dir in ranks:
        if is_writing(rank_dir):
            raise TraceInUseError(
                f"a process is recording into {rank_dir}", "merge when the job has ended, or upload instead"
            )
        merged = trace.ranks.setdefault(rank, _Rank())
        if not is_output:
            merged.places.append(rank_dir)
        for entry in entries[rank]:
            _add_attempt(merged, entry, rank_dir)


def _check_same(trace: _Trace, info: layout.VersionInfo, runs: set[str], place: Path) -> None:
    there = f"the trace {info.model_name!r} / {info.version_name!r} in {trace.place} and the one in {place}"
    if trace.info.fingerprint != info.fingerprint:
        raise ArchitectureMismatchError(
            f"{there} were recorded with different architectures: fingerprints "
            f"{trace.info.fingerprint[:12]} and {info.fingerprint[:12]}",
            "merge directories of one job",
        )
    if trace.info != info:
        raise InvalidInputError(f"{there} have different aliases or fields", "merge directories of one job")
    if trace.runs and runs and not trace.runs & runs:
        raise InvalidInputError(
            f"{there} were recorded by different jobs: {', '.join(sorted(trace.runs))} and "
            f"{', '.join(sorted(runs))}",
            "merge directories of one job",
        )


def _add_attempt(rank: _Rank, entry: dict[str, Any], place: Path) -> None:
    number = int(entry["attempt"])
    known, where = rank.attempts.setdefault(number, (entry, place))
    if any(known.get(key) != entry.get(key) for key in _IDENTITY):
        raise InvalidInputError(
            f"{where} and {place} both hold an attempt {number}, of different processes",
            "`ml-debugger upload --endpoint DIR` of each brings them together, with new attempt numbers",
        )


def _items(rank_dir: Path) -> Iterator[tuple[layout.Partition, Path]]:
    """Segments and slices of a rank; what was being made when its process died is left out."""
    for partition in layout.partitions(rank_dir):
        for _, _, path in layout.segment_directories(partition.path):
            if path.is_dir() and (path / layout.SEGMENT_FILE).exists():
                yield partition, path
        for _, path in layout.slice_files(partition.path):
            yield partition, path


def _merge_rank(rank: _Rank, target: Path, report: MergeReport) -> Iterator[int]:
    layout.make_directory(target)
    with _locked(target):
        _forget_interrupted(target)
        # Before the rows, which verify looks up here.
        layout.write_attempts(target, [rank.attempts[number][0] for number in sorted(rank.attempts)])
        for place in rank.places:
            for partition, path in _items(place):
                home = layout.partition_directory(target, partition.epoch)
                layout.make_directory(home)
                _merge_item(path, home / path.name, report)
                yield _length(path)


def _forget_interrupted(rank_dir: Path) -> None:
    for left in (*rank_dir.glob(f"{_TEMPORARY}*"), *rank_dir.glob(".*.tmp")):  # the latter of small files
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _merge_item(source: Path, target: Path, report: MergeReport) -> None:
    if target.exists():
        if _length(source) != _length(target):
            raise CorruptDataError(
                f"{target} is not {source}: {_length(target)} bytes instead of {_length(source)}",
                "merge into a new directory",
            )
        report.segments_present += 1
        return
    temporary = target.parent.parent / f"{_TEMPORARY}{os.urandom(8).hex()}"
    try:
        copied = (
            _link_or_copy(source, temporary) if source.is_file() else _take_segment(source, temporary, report)
        )
        os.rename(temporary, target)
    except BaseException:
        _forget_interrupted(temporary.parent)
        raise
    layout.sync_directory(target.parent)
    report.segments_linked += copied is None
    report.segments_copied += copied is not None
    report.bytes_copied += copied or 0


def _take_segment(source: Path, temporary: Path, report: MergeReport) -> int | None:
    """Make a segment that no process writes to, sealed unless a power cut may have torn it."""
    temporary.mkdir(mode=0o700)
    copied = _link_or_copy(source / layout.DATA_FILE, temporary / layout.DATA_FILE)
    description = layout.read_json(source / layout.SEGMENT_FILE) or {}
    layout.write_json(temporary / layout.SEGMENT_FILE, description)
    sealed = layout.read_json(source / layout.SEALED_FILE)
    if sealed is None and layout.is_torn(description):
        report.set_aside.append(str(source))
    else:
        if sealed is None:  # of a process that was killed
            _sync(temporary / layout.DATA_FILE)
        layout.write_json(temporary / layout.SEALED_FILE, sealed or {"format_version": layout.FORMAT_VERSION})
    layout.sync_directory(temporary)
    return copied


def _link_or_copy(source: Path, target: Path) -> int | None:
    """Bytes that were copied; None for a link."""
    try:
        os.link(source, target)
        return None
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    with (
        source.open("rb") as old,
        open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new,
    ):
        shutil.copyfileobj(old, new, 8 << 20)
        new.flush()
        os.fsync(new.fileno())
        return new.tell()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _length(path: Path) -> int:
    return os.stat(path if path.is_file() else path / layout.DATA_FILE).st_size


@contextlib.contextmanager
def _locked(rank_dir: Path) -> Iterator[None]:
    """Be the only process that writes to a rank of the output."""
    descriptor = os.open(rank_dir / layout.LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TraceInUseError(f"another process writes to {rank_dir}", "wait for its end") from None
        yield
    finally:
        os.close(descriptor)
