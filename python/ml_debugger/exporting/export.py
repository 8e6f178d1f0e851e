"""`export_trace`: the rows of a trace as one file, replaced atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from ml_debugger.errors import InvalidInputError
from ml_debugger.exporting import manifest
from ml_debugger.exporting.naming import default_name, resolve_output
from ml_debugger.exporting.npy_zip import NpyZipWriter
from ml_debugger.exporting.parquet_tables import require_parquet, write_parquet_tables
from ml_debugger.exporting.progress import Progress, ProgressCallback
from ml_debugger.exporting.spool import SpoolPlace
from ml_debugger.exporting.tables import TablesWriter
from ml_debugger.store import layout
from ml_debugger.trace.catalog import RankSummary
from ml_debugger.trace.segment_ref import retry_vanished
from ml_debugger.trace.store_source import Choice
from ml_debugger.trace.trace import check_epoch

FORMATS = ("npy", "parquet")


def export_trace(
    trace_dir: Path,
    output_path: str | os.PathLike[str] | None,
    *,
    n_epoch: int | None = None,
    format: str = FORMATS[0],
    dedupe: bool = True,
    progress: bool | ProgressCallback | None = None,
    on_ranks: Callable[[list[RankSummary]], None] = lambda ranks: None,
) -> Path:
    """Write what is committed of a trace into a ZIP of npy or Parquet members with a `manifest.json`.

    Blocks until the file is complete and durable. Memory: some blocks of 8 MiB, 8 bytes a call and, with
    ``dedupe``, at most 24 bytes a row. Small columns, text and rows of differing shape go through temporary
    files beside the output. Two exports of the same rows are equal byte for byte.

    Args:
        trace_dir: Directory of the (model, version).
        output_path: A file that ends in ``.zip``, or a directory (made if missing); None: the current
            directory.
        n_epoch: The epoch; -1: rows without one; None: all. An epoch that is not there gives empty tables.
        format: ``"npy"``: a member a column, which plain ``numpy.load`` opens. ``"parquet"``: a member a
            table, with tensors as lists (`Trace.to_arrow` has the types); needs pyarrow and the memory of a
            row group: 32 MiB, or one call that is larger.
        dedupe: Of the rows with an epoch, keep only the newest for each (dataset_type, n_epoch, input_id).
        progress: True or False; None: a line on a terminal only; or a callable that takes (bytes done, bytes
            in all).
        on_ranks: Called with the ranks of the archive, when it is complete.

    Returns:
        The file that was written; an existing one was replaced atomically.

    Raises:
        InvalidInputError: An ``n_epoch`` below -1, an unknown format or one whose package is missing, an
            output path that leads through a file.
        InvalidTypeError: An argument of another type.
        NotFoundError: No such trace, or its epochs are dropped faster than they can be read.
        CorruptDataError: Stored bytes are not what was written.
        StorageError: The output cannot be written; or a column of several dtypes that no numpy type holds
            without loss.
    """
    epoch = check_epoch(n_epoch)
    if format not in FORMATS:
        raise InvalidInputError(
            f"there is no format {format!r}", f"pass one of {', '.join(map(repr, FORMATS))}"
        )
    if format == "parquet":
        require_parquet()
    info = layout.read_version(trace_dir)
    path = resolve_output(output_path, default_name(info.model_name, info.version_name, epoch))
    with (
        Progress(progress) as shown,
        layout.storage_errors(f"write {path}", "check that the directory is writable and has space"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A drop in the middle of it: what was written so far is thrown away, and what is left is exported.
        ranks = retry_vanished(lambda: _replace(path, trace_dir, info, epoch, format, dedupe, shown))
    on_ranks(ranks)
    return path


def _replace(
    path: Path,
    trace_dir: Path,
    info: layout.VersionInfo,
    n_epoch: int | None,
    format: str,
    dedupe: bool,
    progress: Progress,
) -> list[RankSummary]:
    with _temporary(path.parent) as (file, temporary):
        choice = Choice(trace_dir, n_epoch, None, dedupe)
        _write_archive(file, path.parent, trace_dir, info, choice, format, progress)
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
        layout.sync_directory(path.parent)
        return choice.snapshot.ranks


def _write_archive(
    file: IO[bytes],
    spool_dir: Path,
    trace_dir: Path,
    info: layout.VersionInfo,
    choice: Choice,
    format: str,
    progress: Progress,
) -> None:
    with SpoolPlace(spool_dir) as place, NpyZipWriter(file) as archive:
        document: dict[str, Any] = {
            "format_version": manifest.FORMAT_VERSION,
            "model_name": info.model_name,
            "version_name": info.version_name,
            "fingerprint": info.fingerprint,
            "tables": write_parquet_tables(archive, choice, progress)
            if format == "parquet"
            else TablesWriter(archive, choice, place).write(progress),
        }
        document |= {
            "members": archive.members,
            "rows_recorded": choice.recorded_rows,
            "rows_written": choice.kept_rows,
            "rows_deduplicated": choice.recorded_rows - choice.kept_rows,
            "discarded": manifest.discarded_entry(choice.snapshot.gaps),
            "ranks": manifest.ranks_entry(trace_dir, choice.snapshot.ranks),
        }
        with archive.member(manifest.MANIFEST_NAME) as member:
            member.write(manifest.encode(document))


@contextlib.contextmanager
def _temporary(directory: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file in ``directory``, gone afterwards unless renamed; its name is short enough anywhere."""
    path = directory / f".ml-debugger-{secrets.token_hex(8)}.tmp"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file, path
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
