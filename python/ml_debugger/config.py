"""`TracerConfig`: how a tracer records, and where."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.job import process_rank
from ml_debugger.memory import usable_memory_bytes
from ml_debugger.path_argument import check_path

__all__ = ["TracerConfig"]

Reduction = Literal["mean", "max", "flatten"] | Callable[[Any], Any]

_MIB = 1 << 20
_RING_BYTES = 256 * _MIB
_DEVICE_RING_BYTES = 64 * _MIB
_MAX_RANK = (1 << 14) - 1
_MAX_INT64 = (1 << 63) - 1
_NONE_IS_DEFAULT = ("data_dir", "ring_bytes", "data_rank")
_REDUCTIONS = ("mean", "max", "flatten")


class _Unset:
    """Stands for "no argument given", so that an explicit None beats the environment."""

    def __repr__(self) -> str:
        return "<from MLD_<FIELD>, else the default>"


_UNSET: Any = _Unset()
_T = TypeVar("_T")


@dataclass(frozen=True)
class TracerConfig:
    """How a tracer records. Immutable; checked when it is made.

    Every field also reads ``MLD_<FIELD>`` from the environment when the object is made (mappings as JSON); an
    argument beats the environment, which beats the default.

    Behaviour:
        data_dir: Directory of all traces. Default ``./mld_data``.
        mode: ``"enabled"`` (default), or ``"disabled"``: a call is the plain forward, nothing is written.
        overflow: When the ring is full: ``"block"`` (default) waits, at most ``stall_timeout_s``, then
            `TraceStallError`; ``"discard"`` loses the whole call and counts it; ``"raise"`` raises
            `RingOverflowError`.
        durability: What a committed row survives: ``"power"`` (default) a power cut; ``"process"`` kill -9,
            while a power cut may cost the open segment.
        on_error: When the storage failed for good: ``"raise"`` (default) `StorageError` at the next call,
            ``"warn"`` once, stop recording, count and keep training.
        capture_dtype: Cast floating layer outputs to ``"float16"`` or ``"bfloat16"`` before they are copied.
            Default None.
        reduce: ``{alias: "mean" | "max" | "flatten" | callable}``, applied before the copy. Default None.
            ``"mean"`` and ``"max"`` pool every dimension behind dimension 1 (the channel); tokens (B, T, C)
            need a callable. It takes the tensor (detached, samples first, to be left unchanged) and returns
            one with as many samples; a sparse, nested, quantized or distributed tensor it gets as it is.
        repeat: A layer that runs several times in a forward: record its ``"last"`` run (default) or
            ``"all"``.
        batch_dim: ``{alias: dimension}`` for outputs whose samples do not lie along dimension 0, and for
            ``"logits"``. Default None. Name every sequence-first layer here (``nn.LSTM`` and
            ``nn.TransformerEncoder`` without ``batch_first``: 1). Without it a call whose sequences are as
            long as the batch is large (T == B) cannot be told from a batch-first one: its time steps are
            stored as samples, while every other call raises.
        every_n_calls: Record calls 1, n+1, 2n+1, ... of the tracer. Default 1.
        sample_fraction: Record this fraction of samples, in (0, 1], chosen by a hash of the id. Default 1.0.
            Ids in a GPU tensor are waited for.
        max_bytes: Disk budget of a trace in bytes, for each rank; reaching it is a `DiskBudgetError`. Default
            None.
        keep_epochs: Drop older epochs as new ones begin, so that this many stay. Default None.
        data_rank: Number under which this process records; -1 records nothing. Default: the process's rank.

    Performance:
        ring_bytes: Staging memory between hooks and writer, one for the process. Default 256 MiB, at most 1/8
            of the memory that the process may use.
        commit_bytes: Payload of a group commit, in bytes. Default 32 MiB.
        commit_interval_s: Longest time between a call and its commit while the disk keeps up. Default 0.5 s.
        device_ring_bytes: Device staging in bytes. Default 64 MiB, at most 1 % of the device.
        staging_dir: Local directory for data being written when ``data_dir`` is on a network filesystem,
            which is refused without it. Sealed segments move to ``data_dir``: full ones, those of an epoch
            that rests for 5 s, and all at ``close()``. Default None.
        stall_timeout_s: Longest wait without progress. Default 300 s.
        close_timeout_s: Longest wait of ``close()`` and of the process's end. Default 60 s.

    Raises:
        InvalidInputError: A value is out of range or not one of the choices, or the environment holds
            garbage.
        InvalidTypeError: A value has the wrong type.
    """

    data_dir: Path = _UNSET
    mode: Literal["enabled", "disabled"] = _UNSET
    ring_bytes: int = _UNSET
    overflow: Literal["block", "discard", "raise"] = _UNSET
    durability: Literal["power", "process"] = _UNSET
    commit_bytes: int = _UNSET
    commit_interval_s: float = _UNSET
    on_error: Literal["raise", "warn"] = _UNSET
    capture_dtype: Literal["float16", "bfloat16"] | None = _UNSET
    reduce: Mapping[str, Reduction] | None = _UNSET
    repeat: Literal["last", "all"] = _UNSET
    batch_dim: Mapping[str, int] | None = _UNSET
    every_n_calls: int = _UNSET
    sample_fraction: float = _UNSET
    max_bytes: int | None = _UNSET
    keep_epochs: int | None = _UNSET
    device_ring_bytes: int = _UNSET
    staging_dir: Path | None = _UNSET
    data_rank: int = _UNSET
    stall_timeout_s: float = _UNSET
    close_timeout_s: float = _UNSET

    def __post_init__(self) -> None:
        for entry in fields(self):
            given = getattr(self, entry.name)
            check, default, from_text = _RULES[entry.name]
            if given is _UNSET or (given is None and entry.name in _NONE_IS_DEFAULT):
                variable = f"MLD_{entry.name.upper()}"
                text = os.environ.get(variable, "")
                given = from_text(text, variable) if text else default()
                name = variable if text else entry.name
                if entry.name == "data_rank" and not text:
                    # Remembered: a config made before the process group is judged again when a tracer is
                    # made.
                    object.__setattr__(self, "_rank_is_default", True)
            else:
                name = entry.name
            object.__setattr__(self, entry.name, check(given, name))

    @property
    def rank(self) -> int:
        """``data_rank``, or the process's rank as of now if none was given."""
        return process_rank() if self.has_default_rank else self.data_rank

    @property
    def has_default_rank(self) -> bool:
        """Whether neither an argument nor ``MLD_DATA_RANK`` chose ``data_rank``."""
        return bool(getattr(self, "_rank_is_default", False))


def _default_ring_bytes() -> int:
    usable = usable_memory_bytes()
    return _RING_BYTES if usable is None else max(_MIB, min(_RING_BYTES, usable // 8))


# Checks. Each takes the value and the name to blame, and returns the value in its final form.


def _check_path(value: object, name: str) -> Path:
    return Path(check_path(value, name)).expanduser()


def _check_optional_path(value: object, name: str) -> Path | None:
    return None if value is None else _check_path(value, name)


def _check_integer(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidTypeError(f"{name} must be an int, got {type(value).__name__} {value!r}", "pass an int")
    number = value.__index__()
    if not low <= number <= high:
        limit = f"at least {low}" if high == _MAX_INT64 else f"from {low} to {high}"
        raise InvalidInputError(f"{name} must be {limit}, got {number}", "pass an int in that range")
    return int(number)


def _integer(low: int, high: int = _MAX_INT64) -> Callable[[object, str], int]:
    return lambda value, name: _check_integer(value, name, low, high)


def _optional_integer(low: int) -> Callable[[object, str], int | None]:
    return lambda value, name: None if value is None else _check_integer(value, name, low, _MAX_INT64)


def _check_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if not hasattr(value, "dtype") or getattr(value, "ndim", 1) != 0 or not hasattr(value, "__float__"):
            raise InvalidTypeError(
                f"{name} must be a number, got {type(value).__name__} {value!r}", "pass a float"
            )
        value = float(value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidInputError(f"{name} must be finite, got {value}", "pass a finite number")
    return number


def _check_seconds(value: object, name: str) -> float:
    number = _check_number(value, name)
    if number <= 0:
        raise InvalidInputError(f"{name} must be more than 0 seconds, got {number}", "pass a positive number")
    return number


def _check_fraction(value: object, name: str) -> float:
    number = _check_number(value, name)
    if not 0 < number <= 1:
        raise InvalidInputError(
            f"{name} must be more than 0 and at most 1, got {number}", 'to record nothing use mode="disabled"'
        )
    return number


def _choice(*choices: str) -> Callable[[object, str], str]:
    def check(value: object, name: str) -> str:
        listed = ", ".join(map(repr, choices))
        if not isinstance(value, str):
            raise InvalidTypeError(
                f"{name} must be one of {listed}, got {type(value).__name__} {value!r}", "pass a str"
            )
        if value not in choices:
            raise InvalidInputError(f"{name} must be one of {listed}, got {value!r}", "pick one of them")
        return str(value)

    return check


_check_dtype_name = _choice("float16", "bfloat16")


def _check_capture_dtype(value: object, name: str) -> str | None:
    if value is None:
        return None
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        value = str(value).removeprefix("torch.")
    return _check_dtype_name(value, name)


def _check_mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidTypeError(
            f"{name} must be a mapping by alias, got {type(value).__name__}", "pass a dict or None"
        )
    for key in value:
        if not isinstance(key, str):
            raise InvalidTypeError(
                f"{name} has the key {key!r}, expected an alias", "use aliases of target_layers"
            )
    return dict(value)


def _check_reduce(value: object, name: str) -> dict[str, Reduction] | None:
    if value is None:
        return None
    mapping = _check_mapping(value, name)
    for alias, reduction in mapping.items():
        if callable(reduction):
            continue
        if not isinstance(reduction, str):
            raise InvalidTypeError(
                f"{name}[{alias!r}] must be one of {_REDUCTIONS} or a callable, "
                f"got {type(reduction).__name__}",
                "name a reduction or pass a function",
            )
        if reduction not in _REDUCTIONS:
            raise InvalidInputError(
                f"{name}[{alias!r}] must be one of {_REDUCTIONS} or a callable, got {reduction!r}",
                "pick one of them",
            )
    return mapping


def _check_batch_dim(value: object, name: str) -> dict[str, int] | None:
    if value is None:
        return None
    mapping = _check_mapping(value, name)
    return {
        alias: _check_integer(dimension, f"{name}[{alias!r}]", -64, 63)
        for alias, dimension in mapping.items()
    }


# Environment texts.


def _as_text(text: str, variable: str) -> str:
    return text


def _as_integer(text: str, variable: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(
            f"{variable} must be an int, got {text!r}", f"correct or unset {variable}"
        ) from None


def _as_float(text: str, variable: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInputError(
            f"{variable} must be a number, got {text!r}", f"correct or unset {variable}"
        ) from None


def _as_json(text: str, variable: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{variable} must be JSON: {error}", f"correct or unset {variable}") from None


def _constant(value: _T) -> Callable[[], _T]:
    return lambda: value


# field: (check, default, parser of the environment's text)
_RULES: dict[str, tuple[Callable[[object, str], Any], Callable[[], Any], Callable[[str, str], Any]]] = {
    "data_dir": (_check_path, _constant("mld_data"), _as_text),
    "mode": (_choice("enabled", "disabled"), _constant("enabled"), _as_text),
    "ring_bytes": (_integer(1), _default_ring_bytes, _as_integer),
    "overflow": (_choice("block", "discard", "raise"), _constant("block"), _as_text),
    "durability": (_choice("power", "process"), _constant("power"), _as_text),
    "commit_bytes": (_integer(1), _constant(32 * _MIB), _as_integer),
    "commit_interval_s": (_check_seconds, _constant(0.5), _as_float),
    "on_error": (_choice("raise", "warn"), _constant("raise"), _as_text),
    "capture_dtype": (_check_capture_dtype, _constant(None), _as_text),
    "reduce": (_check_reduce, _constant(None), _as_json),
    "repeat": (_choice("last", "all"), _constant("last"), _as_text),
    "batch_dim": (_check_batch_dim, _constant(None), _as_json),
    "every_n_calls": (_integer(1), _constant(1), _as_integer),
    "sample_fraction": (_check_fraction, _constant(1.0), _as_float),
    "max_bytes": (_optional_integer(1), _constant(None), _as_integer),
    "keep_epochs": (_optional_integer(1), _constant(None), _as_integer),
    "device_ring_bytes": (_integer(1), _constant(_DEVICE_RING_BYTES), _as_integer),
    "staging_dir": (_check_optional_path, _constant(None), _as_text),
    "data_rank": (_integer(-1, _MAX_RANK), process_rank, _as_integer),
    "stall_timeout_s": (_check_seconds, _constant(300.0), _as_float),
    "close_timeout_s": (_check_seconds, _constant(60.0), _as_float),
}
