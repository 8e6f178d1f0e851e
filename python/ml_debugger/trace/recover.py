"""Saving what is sound of a damaged trace into a new one, and saying what is missing.

Whatever can be read is read with every number and every checksum verified (`ml_debugger.trace.salvage`); the
damaged trace is never changed and never opened with LMDB. What is saved is written as slices, which keep row
numbers, attempts and gaps. What is lost is found by row numbers and by the counters of segments
(`ml_debugger.trace.losses`); where the number of its rows is known it becomes a gap of cause ``damaged``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from ml_debugger import _core
from ml_debugger.errors import (
    CorruptDataError,
    InvalidInputError,
    MlDebuggerError,
    NotFoundError,
    StorageError,
    TraceInUseError,
)
from ml_debugger.store import layout
from ml_debugger.store.status import is_writing
from ml_debugger.trace.header import FEATURES, Call, Gap
from ml_debugger.trace.losses import AttemptLosses
from ml_debugger.trace.partition_remains import PartitionRecovery, Source, remains_of
from ml_debugger.trace.recovered_trace import RecoveredTrace, RecoverReport
from ml_debugger.trace.salvage import SegmentSalvage
from ml_debugger.trace.verify import Problem
from ml_debugger.uploading.slices import SliceDraft

__all__ = ["RecoverReport", "recover_trace"]


def recover_trace(
    data_dir: Path,
    model_name: str,
    version_name: str,
    output: Path,
    progress: Callable[[int, int], object] | None = None,
) -> RecoverReport:
    """Write all sound calls of a trace into a new data directory; changes nothing of the trace.

    A call is sound if the checksums of its header and of all its chunks are right and its description can be
    decoded. An interrupted run leaves files in ``output`` that are no trace yet.

    Args:
        data_dir: Where the damaged trace lies.
        model_name: Name of the model.
        version_name: Name of the version.
        output: The new ``data_dir``; missing or empty.
        progress: Called with (bytes looked at, bytes in all) of data files.

    Raises:
        NotFoundError: No such trace.
        TraceInUseError: A process records there.
        InvalidInputError: ``output`` is not empty, or lies within the trace.
        StorageError: ``output`` cannot be written to.
    """
    trace_dir = layout.trace_directory(data_dir, model_name, version_name)
    _check_places(trace_dir, output)
    report = RecoverReport(layout.trace_directory(output, model_name, version_name))
    try:
        info = layout.read_version(trace_dir)
    except (NotFoundError, CorruptDataError) as error:
        if _is_newer(trace_dir) or not layout.rank_directories(trace_dir):
            raise
        report.problems.append(
            Problem(str(trace_dir), f"{error.message}; made again from the calls, without a fingerprint")
        )
        info = _rebuilt_version(trace_dir, model_name, version_name)
    try:
        trace = RecoveredTrace(info, report)
        tag = layout.version_tag(info) if info.fingerprint else None
        _Recovery(trace_dir, trace, tag, progress or (lambda done, total: None)).run()
        _check_idle(trace_dir)
        trace.finish()
    except OSError as error:
        if isinstance(error, MlDebuggerError):
            raise
        raise StorageError(
            f"cannot write to {output}: {error.strerror or error}", "choose another output with enough space"
        ) from error
    return report


def _check_places(trace_dir: Path, output: Path) -> None:
    if not trace_dir.is_dir():
        raise NotFoundError(f"no trace at {trace_dir}", "check data_dir, model name and version name")
    _check_idle(trace_dir)
    if output.resolve().is_relative_to(trace_dir.resolve()):
        raise InvalidInputError(f"the output {output} lies within the trace", "name a directory elsewhere")
    try:
        is_used = output.exists() and any(output.iterdir())
    except OSError as error:
        raise StorageError(f"cannot list {output}: {error.strerror}", "name an empty directory") from error
    if is_used:
        raise InvalidInputError(
            f"the output {output} is not empty", "name a directory that is empty or does not exist yet"
        )


def _check_idle(trace_dir: Path) -> None:
    for _, rank_dir in layout.rank_directories(trace_dir):
        if is_writing(rank_dir):
            raise TraceInUseError(
                f"a process is recording to {rank_dir}", "end it, or wait until it has ended, and run again"
            )


def _is_newer(trace_dir: Path) -> bool:
    """Whether `version.json` is sound and of a format that this package does not know."""
    try:
        document = layout.read_version_document(trace_dir) or {}
    except CorruptDataError:
        return False
    version = document.get("format_version")
    return type(version) is int and version > layout.FORMAT_VERSION


def _rebuilt_version(trace_dir: Path, model_name: str, version_name: str) -> layout.VersionInfo:
    """What `version.json` said, as far as the columns of the calls tell."""
    columns: dict[tuple[str, str], str] = {}
    for group in remains_of(trace_dir, None):
        for source in group.sources:
            source.load()
            for _, found in group.headers(source):
                if found is not None and isinstance(found[1], Call):
                    for column in found[1].description.columns:
                        columns.setdefault((column.table, column.name), column.type)
    own = {"input_id", "logits", "label"}
    fields = {key: kind for key, kind in columns.items() if key[1] not in own}
    is_alias = {key: key[0] == FEATURES and kind == "tensor" for key, kind in fields.items()}
    specifications: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (table, name), kind in fields.items():
        if not is_alias[table, name]:
            specifications[table == FEATURES].append({"name": name, "type": kind})
    return layout.VersionInfo(
        model_name,
        version_name,
        "",
        {key[1]: None for key in fields if is_alias[key]},
        specifications[True],
        specifications[False],
    )


class _Recovery:
    """One run over all ranks."""

    def __init__(
        self, trace_dir: Path, trace: RecoveredTrace, tag: str | None, progress: Callable[[int, int], object]
    ) -> None:
        self._trace_dir = trace_dir
        self._trace = trace
        self._groups = list(remains_of(trace_dir, tag))
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(
            layout.data_bytes(source.path) for group in self._groups for source in group.sources
        )

    def run(self) -> None:
        """Save every rank."""
        self._trace.register(self._trace_dir, [(group.rank, group.attempt) for group in self._groups])
        by_attempt = sorted(self._groups, key=lambda group: (group.rank, group.attempt))
        for (rank, attempt), held in itertools.groupby(
            by_attempt, key=lambda group: (group.rank, group.attempt)
        ):
            losses = AttemptLosses(rank, attempt)
            for group in held:
                PartitionRecovery(self._trace, group, losses).run(self._looked_at)
            self._save_losses(rank, attempt, losses)

    def _looked_at(self, source: Source) -> None:
        """Count a segment."""
        self._trace.report.segments += 1
        self._done_bytes += layout.data_bytes(source.path)
        self._progress(self._done_bytes, self._total_bytes)

    def _save_losses(self, rank: int, attempt: int, losses: AttemptLosses) -> None:
        lost = losses.resolve()
        self._trace.report.lost += lost
        free = losses.first_free_call
        drafts: dict[int, SliceDraft] = {}
        for entry in sorted(lost, key=lambda entry: (entry.first_call is None, entry.first_call or 0)):
            if entry.epoch is None or not entry.rows:
                continue
            first, last = entry.first_call, entry.last_call
            if first is None or last is None:  # lost at the end, so behind all that is known
                first, last = free, free + max(entry.calls or 1, 1) - 1
                free = last + 1
            draft = drafts.get(entry.epoch)
            if draft is None:
                origin = SegmentSalvage(rank, entry.epoch, attempt, 0, self._trace_dir)
                draft = drafts[entry.epoch] = SliceDraft(origin, {})
            draft.add(first, _gap_header(first, last, entry.rows), Gap(first, entry.rows, "damaged"))
        for draft in drafts.values():
            self._trace.write(draft)


def _gap_header(first_call: int, last_call: int, rows: int) -> bytes:
    core = {"first_call": first_call, "last_call": last_call, "rows": rows, "bytes": 0, "cause": "damaged"}
    body = b"\x95" + b"".join(msgpack.packb(part) for part in (1, core, None, b""))
    return body + b"\xce" + _core.crc32c(body).to_bytes(4, "big")
