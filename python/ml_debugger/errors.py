"""Every exception that ml_debugger raises.

Each class has a builtin as its second base, so that ``except ValueError`` works as users expect. Messages say
what was expected, what was found and what to do; ``hint`` holds the remedy alone.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AliasNotCapturedError",
    "ArchitectureMismatchError",
    "AuthenticationError",
    "CorruptDataError",
    "DiskBudgetError",
    "InvalidInputError",
    "InvalidTypeError",
    "LayerNotFoundError",
    "MlDebuggerError",
    "NotFoundError",
    "RingOverflowError",
    "StorageError",
    "StreamCaptureError",
    "TraceInUseError",
    "TraceStallError",
    "TracerClosedError",
    "UploadError",
]


class MlDebuggerError(Exception):
    """Base of all errors of this package.

    Args:
        message: What was expected and what was found.
        hint: The remedy; it becomes the end of ``str(error)``. May be empty.

    Attributes:
        message: As given.
        hint: As given.
    """

    message: str
    hint: str

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    # KeyError prints the repr of its argument and OSError looks for an errno: both would garble a sentence.
    def __str__(self) -> str:
        if not self.hint or self.hint in self.message:
            return self.message
        return f"{self.message.rstrip('.;')}; {self.hint}" if self.message else self.hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.hint)


class InvalidInputError(MlDebuggerError, ValueError):
    """A value is out of range, misshaped, unknown, reserved or contradicts another one."""


class InvalidTypeError(MlDebuggerError, TypeError):
    """A value has a type that is not accepted here; nothing is converted silently."""


class LayerNotFoundError(MlDebuggerError, KeyError):
    """A path of ``target_layers`` names no module, or the classification head was not found."""


class AliasNotCapturedError(MlDebuggerError, RuntimeError):
    """A traced layer did not run in a call, or ran another number of times than before."""


class ArchitectureMismatchError(MlDebuggerError, ValueError):
    """The trace was recorded with a model of another architecture."""


class NotFoundError(MlDebuggerError, KeyError):
    """No such trace, column, epoch or capture."""


class TracerClosedError(MlDebuggerError, RuntimeError):
    """The tracer was closed before."""


class TraceInUseError(MlDebuggerError, RuntimeError):
    """Another process writes to this trace."""


class StorageError(MlDebuggerError, OSError):
    """The storage refused to take or to give data."""


class DiskBudgetError(StorageError):
    """The trace has reached ``TracerConfig.max_bytes``."""


class CorruptDataError(StorageError):
    """Stored bytes are not what was written."""


class RingOverflowError(MlDebuggerError, RuntimeError):
    """The ring was full and rows were discarded, or a call was refused."""


class StreamCaptureError(MlDebuggerError, RuntimeError):
    """A call ran on a stream that is being captured into a CUDA graph."""


class TraceStallError(MlDebuggerError, TimeoutError):
    """A wait made no progress within its deadline."""


class UploadError(MlDebuggerError, OSError):
    """An upload has no endpoint, or failed."""


class AuthenticationError(UploadError):
    """The endpoint refused the key."""
