"""One rank's rows on their way to one endpoint."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_debugger.errors import MlDebuggerError, StorageError, UploadError
from ml_debugger.store import layout
from ml_debugger.trace.catalog import VanishedError
from ml_debugger.uploading.backlog import Backlog
from ml_debugger.uploading.documents import Documents
from ml_debugger.uploading.endpoint import Endpoint, folder_of
from ml_debugger.uploading.ledger import Entry, Ledger, runs_of
from ml_debugger.uploading.slice_memory import SliceMemory
from ml_debugger.uploading.slices import Slice, SliceDraft, cut_slice
from ml_debugger.uploading.transports import Item, Transport


@dataclass
class Tally:
    """What was done."""

    segments_sent: int = 0
    segments_skipped: int = 0
    bytes_sent: int = 0


class RankUpload:
    """Sends what an endpoint does not hold of a rank.

    Args:
        trace_dir: Directory of the (model, version).
        rank: Whose rows.
        endpoint: Where to.
        transport: How.
        stall_timeout_s: Longest wait for another uploader of the rank that makes no progress.
        on_bytes: Called with a number of bytes after they have travelled.
    """

    def __init__(
        self,
        trace_dir: Path,
        rank: int,
        endpoint: Endpoint,
        transport: Transport,
        *,
        stall_timeout_s: float,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._trace_dir = trace_dir
        self._trace = f"{trace_dir.parent.name}/{trace_dir.name}"
        self._rank_dir = layout.rank_directory(trace_dir, rank)
        self._transport = transport
        self._stall_timeout_s = stall_timeout_s
        self._on_bytes = on_bytes
        self._ledger = Ledger(self._rank_dir, endpoint.identity)
        self._documents = Documents(transport, trace_dir, self._trace, rank, self._ledger)
        self._backlog = Backlog(rank, self._rank_dir)
        self._is_loaded = False
        self._attempts: dict[int, dict[str, Any]] = {}
        self._info: layout.VersionInfo | None = None
        self._tally = Tally()
        if endpoint.kind == "folder" and folder_of(endpoint) / self._trace == trace_dir:
            raise UploadError(
                f"the endpoint {endpoint.address!r} is the trace's own data_dir", "name another folder"
            )

    def run(self, n_epoch: int | None, *, force: bool) -> Tally:
        """Ask the endpoint what it holds of an epoch (-1: rows without one, None: all), and send the rest.

        Raises:
            UploadError: It failed; what has arrived is not sent again the next time.
            MlDebuggerError: The trace cannot be read.
        """
        self._tally = Tally()
        with self._ledger.locked(timeout_s=self._stall_timeout_s, on_progress=self._on_bytes):
            entries = self._load()
            chosen = [entry for entry in entries if n_epoch is None or entry.epoch == n_epoch]
            self._start()
            if chosen:
                self._renew(chosen, force)
            self._send_backlog(n_epoch, 0.0)
        return self._tally

    def advance(self, tail_age_s: float, *, patience_s: float = 0.0) -> bool:
        """Send what was committed since; False if another uploader is at it.

        Args:
            tail_age_s: What does not fill a slice waits as long as this for more.
            patience_s: How long to wait for another uploader that makes no progress.

        Raises:
            As `run`.
        """
        self._tally = Tally()
        with self._ledger.locked(timeout_s=patience_s, on_progress=self._on_bytes) as is_mine:
            if not is_mine:
                self._is_loaded = False  # what the other one sends is in the ledger only
                return False
            self._start()
            if not self._is_loaded:
                entries = self._load()
                pending = [entry for entry in entries if not entry.sent]
                if pending:
                    self._renew(pending, force=False)
            self._send_backlog(None, tail_age_s)
        return True

    def _load(self) -> list[Entry]:
        entries = self._ledger.entries()
        self._backlog.reset(entries)
        self._is_loaded = True
        return entries

    def _start(self) -> None:
        """What is known of the endpoint's documents is asked for anew, when the first slice needs it."""
        self._attempts, self._info = {}, None

    def _prepare(self, attempt: int) -> tuple[layout.VersionInfo, dict[str, Any]]:
        """Before a slice goes, the endpoint knows its version and its attempt."""
        if self._info is None:
            info = layout.read_version(self._trace_dir)
            self._documents.send_version(info)
            self._info = info
        if attempt not in self._attempts:
            self._attempts = self._documents.attempts()
        if attempt not in self._attempts:
            raise StorageError(
                f"{self._rank_dir / 'attempts.json'} does not list attempt {attempt}",
                "restore it from a copy",
            )
        return self._info, self._attempts[attempt]

    # Slices that were cut before

    def _renew(self, entries: list[Entry], force: bool) -> None:
        urls = {self._path(entry): entry.url for entry in entries if entry.url is not None}
        held = self._transport.held(self._trace, urls)
        if held or any(entry.sent for entry in entries):
            for attempt in sorted({entry.attempt for entry in entries}):
                self._prepare(attempt)  # the documents may have vanished too
        for entry in entries:
            is_held = held.get(self._path(entry)) == entry.length_bytes
            if is_held and not entry.sent:
                self._ledger.put(entry.confirmed())
            if is_held and not force:
                self._tally.segments_skipped += 1
                continue
            self._send_again(entry, begins_anew=entry.sent)

    def _send_again(self, entry: Entry, *, begins_anew: bool) -> None:
        draft = self._backlog.draft_of(entry)
        if draft is None:  # dropped here since: what the endpoint has of it stays
            if not entry.sent:
                if entry.url is not None:
                    self._transport.discard(entry.url)
                self._ledger.remove(entry)
            return
        piece = self._cut(draft, *self._prepare(draft.ref.attempt))
        if piece is not None:
            self._send(piece, draft, None if begins_anew else entry.url, entry)

    # New ones

    def _send_backlog(self, n_epoch: int | None, tail_age_s: float) -> None:
        try:
            with (
                contextlib.closing(SliceMemory()) as memory,
                ThreadPoolExecutor(1, "ml-debugger-cut") as cutter,
            ):
                self._send_drafts(self._backlog.drafts(n_epoch, tail_age_s=tail_age_s), cutter, memory)
        except VanishedError:
            # Dropped under us. What else was committed comes with the next look.
            if tail_age_s == 0:
                self._send_backlog(n_epoch, tail_age_s)
        except BaseException:
            self._is_loaded = False  # calls count as covered before they are sent; the ledger knows better
            raise

    def _send_drafts(
        self, drafts: Iterator[SliceDraft], cutter: ThreadPoolExecutor, memory: SliceMemory
    ) -> None:
        """While one slice travels, the next one is cut."""
        ahead: deque[tuple[SliceDraft, Future[Slice | None]]] = deque()
        try:
            for draft in drafts:
                self._backlog.cover_keys(draft.ref.epoch, draft.ref.attempt, draft.keys)
                prepared = self._prepare(draft.ref.attempt)
                ahead.append((draft, cutter.submit(self._cut, draft, *prepared, memory)))
                if len(ahead) > 1:
                    self._send_next(ahead)
            while ahead:
                self._send_next(ahead)
        finally:
            for _, future in ahead:
                future.add_done_callback(_close_slice)

    def _send_next(self, ahead: deque[tuple[SliceDraft, Future[Slice | None]]]) -> None:
        draft, future = ahead.popleft()
        piece = future.result()
        if piece is not None:
            self._send(piece, draft, None, None)

    def _cut(
        self,
        draft: SliceDraft,
        info: layout.VersionInfo,
        attempt: dict[str, Any],
        memory: SliceMemory | None = None,
    ) -> Slice | None:
        """Cut a slice; None if its rows were dropped meanwhile."""
        try:
            return cut_slice(draft, info, attempt, self._ledger.directory, memory)
        except VanishedError:
            return None
        except OSError as error:
            if isinstance(error, MlDebuggerError):
                raise
            raise UploadError(
                f"cannot write into {self._ledger.directory}: {error.strerror}", "free disk space"
            ) from error

    def _send(self, piece: Slice, draft: SliceDraft, url: str | None, before: Entry | None) -> None:
        try:
            self._send_slice(piece, draft, url, before)
        finally:
            piece.close()

    def _send_slice(self, piece: Slice, draft: SliceDraft, url: str | None, before: Entry | None) -> None:
        ref = draft.ref
        entry = Entry(
            ref.epoch,
            ref.attempt,
            ref.sequence,
            str(piece.name),
            piece.length_bytes,
            runs_of(draft.keys),
            url=url,
        )
        if before is not None and before.name != entry.name:
            self._ledger.remove(before)  # the endpoint has lost its documents, and numbers attempts anew
            entry = entry.at(None)
        self._ledger.put(entry)

        def on_url(place: str) -> None:
            nonlocal entry
            entry = entry.at(place)
            self._ledger.put(entry)

        self._transport.send(
            Item(
                self._path(entry),
                piece.file,
                piece.length_bytes,
                piece.name.sha256,
                entry.url,
                on_url,
                self._count,
            )
        )
        self._ledger.put(entry.confirmed())
        self._tally.segments_sent += 1

    def _count(self, length_bytes: int) -> None:
        self._tally.bytes_sent += length_bytes
        self._ledger.touch()
        self._on_bytes(length_bytes)

    def _path(self, entry: Entry) -> str:
        partition = layout.partition_directory(self._rank_dir, entry.epoch).name
        return f"{self._trace}/{self._rank_dir.name}/{partition}/{entry.name}"


def _close_slice(future: Future[Slice | None]) -> None:
    if not future.cancelled() and future.exception() is None and (piece := future.result()) is not None:
        piece.close()
