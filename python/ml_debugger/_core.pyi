"""The C++ core: byte ring, writer thread, store. Private; the public face is in the Python modules."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

from typing_extensions import Buffer

FORMAT_VERSION: int
LMDB_VERSION: str
MAX_RANKS: int
MAX_ATTEMPTS: int

@final
class Store:
    """The write side of one (trace, rank): lock and partitions; shared by path within a process."""

    def __init__(
        self,
        directory: str,
        *,
        rank: int,
        durability: Literal["power", "process"],
        max_bytes: int | None = None,
        segment_bytes: int = 4 << 30,
        owner: str = "",
        staging: str = "",
    ) -> None:
        """Take the writer lock of ``directory`` (made if missing), or share it with handles of this process.

        ``owner`` is written into the lock file, for who asks whose it is. Segments are written to ``staging``
        where it is given, and stay there until somebody moves them.

        Raises TraceInUseError (another process writes there), StorageError (unwritable, full, on a network),
        InvalidInputError (shared with other ``durability`` or ``max_bytes``).
        """

    @property
    def directory(self) -> str: ...
    @property
    def disk_bytes(self) -> int:
        """Bytes that the segments of this rank take on disk, as last seen by the writer."""

    def recorder(
        self,
        attempt: int,
        *,
        overflow: Literal["block", "discard", "raise"],
        on_error: Literal["raise", "warn"],
        ring_bytes: int,
        commit_bytes: int,
        commit_interval_s: float,
        stall_timeout_s: float,
        device_ring_bytes: int | None = None,
    ) -> Recorder:
        """Open the recording side of one attempt; the first one starts the ring and the writer thread."""

    def drop_epoch(self, epoch: int, *, attempt: int | None, timeout_s: float) -> tuple[int, int]:
        """Delete an epoch (-1: rows without one) of this rank; returns its (feature, ground-truth) rows.

        The trace stays locked until it is done, also if the handle is closed meanwhile.
        """

    def drop_all(self, *, timeout_s: float) -> None:
        """Delete every epoch of this rank."""

    def close(self) -> None:
        """Let go of this handle; the last one of the process releases the lock. Idempotent."""

@final
class Recorder:
    """One attempt: where the hooks of one tracer put what they see. Every thread has its own current call.

    What waits does so without the GIL. A thread for which an ending interpreter has no GIL any more sleeps.
    """

    @property
    def attempt(self) -> int: ...
    @property
    def inert(self) -> bool:
        """True in a forked child, where every method but ``counters`` does nothing."""

    @property
    def failed(self) -> bool:
        """True when the writer has given up on this attempt's storage."""

    def begin_call(self, epoch: int, batch_size: int) -> int:
        """Start the calling thread's call (epoch -1: none); returns its number in the attempt, from 0.

        Raises StorageError when the writer has failed and ``on_error="raise"``.
        """

    def capture(self, column: int, tensor: Any) -> None:
        """Copy one torch tensor into the current call; blocks only as ``overflow`` says.

        Of a CUDA tensor the copy is only enqueued. Raises StreamCaptureError on a stream that is captured.
        """

    def capture_buffer(self, column: int, data: Buffer) -> None:
        """Copy bytes into the current call, listed by ``captures`` as dtype ``uint8`` with shape ``(n,)``."""

    def captures(self) -> list[tuple[int, str, tuple[int, ...], int]]:
        """(column, dtype, shape, device) of the current call's captures; the index is the capture number.

        ``device`` is the index of the CUDA device where the tensor lay, -1 for the host.
        """

    def end_call(self, description: bytes, rows: int, ground_truth_rows: int) -> bool:
        """Hand the call over with its msgpack description; False if it was discarded or failed (counted)."""

    def abort_call(self) -> None:
        """Forget the calling thread's call; nothing of it becomes visible or is counted."""

    def read_back(self, capture: int) -> bytearray:
        """Bytes of one capture of the calling thread's current call, or of its last ended one.

        Raises NotFoundError when there is none (aborted, discarded, dropped).
        """

    def flush(self, timeout_s: float | None) -> None:
        """Return when every call ended before is committed; None waits as long as there is progress.

        Raises StorageError (failed for good), TraceStallError (deadline or no progress).
        """

    def raise_failure(self) -> None:
        """Raise the StorageError for which the writer has given up; nothing if it has not."""

    def counters(self) -> dict[str, Any]:
        """The fields of TracerStats, by name."""

    def close(self, timeout_s: float) -> bool:
        """Flush, seal and let go; False if the deadline passed and the core was left behind. Idempotent."""

@final
class CaptureHook:
    """Forward hook of one column: copies the layer's output into the calling thread's call, if it has one.

    Does nothing inside of a backward, where activation checkpointing runs layers again.
    """

    # Set by tracer/compiled.py.
    alias: str
    number: int
    picks: tuple[int | str, ...]
    target: CaptureHook

    def __new__(
        cls, recorder: Recorder, column: int, prepare: Callable[[Any], Any], *, always_prepare: bool = False
    ) -> CaptureHook:
        """``prepare(output)`` turns any output into the tensor to store.

        It is skipped, unless ``always_prepare``, for a dense tensor whose first dimension is the batch.
        Raises TypeError for a ``recorder`` that is none.
        """

    def __call__(self, module: Any, args: Any, output: Any = ...) -> None: ...
    @classmethod
    def extend(cls, attributes: dict[str, Any], /) -> None:
        """Set attributes of the type and leave its slots: ``__call__`` as others see it, not as it runs."""

    def __copy__(self) -> Callable[..., None]: ...
    def __deepcopy__(self, memo: object, /) -> Callable[..., None]: ...

@final
class Segment:
    """Read access to one LMDB segment; the handle is shared with a writer in this process."""

    def __init__(self, path: str, *, sealed: bool) -> None:
        """Open for reading; NotFoundError if it is gone, CorruptDataError if it is not a segment."""

    def meta(self) -> bytes:
        """The segment's counters, msgpack; one short transaction."""

    def headers(self, after: int | None = None, limit: int = 1024) -> list[tuple[int, bytes]]:
        """(key, value) of up to ``limit`` headers behind key ``after``, in key order, checksums verified."""

    def scan(
        self, after: int | None, limit: int, *, rank: int, attempt: int, epoch: int, sequence: int
    ) -> dict[str, Any]:
        """As ``headers``, as columns: int64 arrays as bytes, and lists of bytes.

        ``keys``, ``rows``, ``ground_truth_rows``, ``first_rows``, ``chunk_bytes`` (outside of the header),
        ``lengths`` (32 a header: bytes of each capture), ``description`` (index in ``descriptions``; -1: the
        next of ``others``, whole values: gaps, calls with chunks elsewhere, and large ones).
        """

    def gather(self, keys: Buffer, targets: Sequence[tuple[int, Buffer]]) -> None:
        """Fill (capture, out) with that capture of the calls ``keys`` (uint64), one after the other.

        Without the GIL. Raises CorruptDataError on wrong checksums, and if a buffer is not filled exactly.
        """

    def read(self, chunks: Sequence[tuple[int, int, int, int]], out: Buffer) -> None:
        """Copy chunks (key, offset in ``out``, bytes, crc32c) to ``out``: one transaction, without the GIL.

        Raises CorruptDataError on a wrong length or checksum.
        """

    def close(self) -> None:
        """Let go of the segment, once what other threads read of it is read. Idempotent; does not wait."""

def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of ``data``, continued from ``crc``."""

def device_report() -> dict[str, Any]:
    """Copies from CUDA devices by kind, driver errors, whether the ring is pinned; {} without a ring."""

def is_dense(tensor: object) -> bool:
    """Whether this is exactly a torch.Tensor whose bytes can be stored as they stand; else look closer."""

def is_locked(path: str) -> bool:
    """Whether a process holds the writer lock file ``path``; False if there is none."""
