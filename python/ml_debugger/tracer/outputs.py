"""From what a layer returns to the tensor that is stored."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch

from ml_debugger.errors import InvalidInputError, MlDebuggerError

PathKey = int | str

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BATCH_HINT = 'give one id a sample, pick another output with [i] or ["key"], or set TracerConfig.batch_dim'


class CallState(threading.local):
    """What the hooks need to know of the calling thread's current call. Holds no tensor between calls.

    Attributes:
        batch_size: Samples in the call; 0 when there is none.
        rows: Positions of the samples to keep; None keeps all.
        is_compiler_ready: Whether code that this thread compiles knows of the hooks.
    """

    batch_size: int = 0
    rows: list[int] | None = None
    is_compiler_ready: bool = False


class OutputPicker:
    """``prepare`` of one column: turns any output into the plain tensor to store.

    Order: pick by path, find the first tensor with the batch size, batch dimension to the front, reduce,
        cast, keep the
    sampled rows. Never changes the output, and holds no reference to it or to the tracer.
    """

    def __init__(
        self,
        alias: str,
        state: CallState,
        *,
        picks: tuple[PathKey, ...] = (),
        batch_dim: int = 0,
        reduction: str | Callable[[Any], Any] | None = None,
        capture_dtype: str | None = None,
        sampled: bool = False,
    ) -> None:
        self._alias = alias
        self._state = state
        self._picks = picks
        self._batch_dim = batch_dim
        self._reduction = reduction
        self._capture_dtype: torch.dtype | None = getattr(torch, capture_dtype) if capture_dtype else None
        self._sampled = sampled

    @property
    def always(self) -> bool:
        """Whether even a plain tensor with the batch size in front needs this picker."""
        changed = self._picks or self._batch_dim or self._reduction or self._capture_dtype or self._sampled
        return bool(changed)

    def __call__(self, output: Any) -> torch.Tensor:
        """Return the tensor to store: dense, contiguous, detached, samples first.

        Raises:
            InvalidInputError: Nothing in ``output`` has the batch size, or the tensor cannot be copied as
                bytes.
        """
        tensor = self._find(output)
        with torch.no_grad():
            tensor = plain_tensor(tensor, f"the output of layer {self._alias!r}")
            if self._batch_dim:
                tensor = tensor.movedim(self._batch_dim, 0)
            if self._reduction is not None:
                tensor = self._reduce(tensor)
            if self._capture_dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self._capture_dtype)
            return select_rows(tensor, self._state.rows).contiguous()

    def _find(self, output: Any) -> torch.Tensor:
        for key in self._picks:
            output = pick(output, key, self._alias)
        batch_size = self._state.batch_size
        shapes = []
        for tensor in iterate_tensors(output):
            if has_batch_size(tensor, batch_size, self._batch_dim):
                return tensor
            shapes.append(_shape_of(tensor))
        found = (
            f"tensors of shape {', '.join(map(str, shapes))}"
            if shapes
            else f"no tensor ({type(output).__name__})"
        )
        raise InvalidInputError(
            f"layer {self._alias!r} returned {found}, expected {batch_size} samples (one for each input id) "
            f"along dimension {self._batch_dim}",
            _BATCH_HINT,
        )

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0]
        try:
            reduced = reduce_tensor(tensor, self._reduction)
        except MlDebuggerError:
            raise
        except RuntimeError as error:
            raise InvalidInputError(
                f"reduce[{self._alias!r}] failed on a {dtype_name(tensor.dtype)} tensor of shape "
                f"{tuple(tensor.shape)}: {error}",
                "reduce that layer with a callable of your own",
            ) from error
        if not isinstance(reduced, torch.Tensor) or reduced.ndim == 0 or reduced.shape[0] != rows:
            found = tuple(reduced.shape) if isinstance(reduced, torch.Tensor) else type(reduced).__name__
            raise InvalidInputError(
                f"reduce[{self._alias!r}] must return a tensor with {rows} samples in front, got {found}",
                "keep dimension 0 in the callable",
            )
        return plain_tensor(reduced, f"reduce[{self._alias!r}]")


def reduce_tensor(tensor: torch.Tensor, reduction: str | Callable[[Any], Any] | None) -> Any:
    """Apply one entry of ``TracerConfig.reduce``; ``"mean"`` and ``"max"`` pool all behind dimension 1."""
    if callable(reduction):
        return reduction(tensor)
    if reduction == "flatten":
        return tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.flatten(1)
    if tensor.ndim <= 2:
        return tensor
    pooled = tensor.flatten(2)
    return pooled.mean(2) if reduction == "mean" else pooled.amax(2)


def iterate_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in a nest of tuples, lists, mappings and dataclasses (``ModelOutput`` too), depth first."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from iterate_tensors(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from iterate_tensors(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from iterate_tensors(getattr(value, field.name, None))


def has_batch_size(tensor: torch.Tensor, batch_size: int, dimension: int = 0) -> bool:
    """Whether ``tensor`` has ``batch_size`` entries along ``dimension``."""
    if tensor.is_nested:
        return dimension == 0 and tensor.size(0) == batch_size
    shape = tensor.shape
    return -len(shape) <= dimension < len(shape) and shape[dimension] == batch_size


def find_logits(model_output: Any, batch_size: int, dimension: int = 0) -> torch.Tensor | None:
    """The logits in an output: the output itself, its ``logits``, or its first tensor with the batch size."""
    named = None
    if isinstance(model_output, Mapping):
        named = model_output.get("logits")
    elif not isinstance(model_output, torch.Tensor):
        named = getattr(model_output, "logits", None)
    for tensor in iterate_tensors(model_output if named is None else named):
        if has_batch_size(tensor, batch_size, dimension):
            return tensor
    return None


def plain_tensor(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """Return ``tensor`` as an exact, detached, dense, contiguous ``torch.Tensor`` with the same values.

    Raises:
        InvalidInputError: Sparse, nested, quantized, on the meta device, or without memory of its own.
    """
    if type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter:
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(torch.Tensor)
    reason = _refusal(tensor)
    if reason is not None:
        raise InvalidInputError(
            f"{what} is {reason}, expected a dense tensor", "turn it into a dense tensor before"
        )
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous()


def _refusal(tensor: torch.Tensor) -> str | None:
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"of layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_meta:
        return "on the meta device"
    return None


def select_rows(tensor: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    """The kept samples of a tensor whose dimension 0 is the batch; ``rows=None`` keeps all."""
    if rows is None:
        return tensor
    index = torch.tensor(rows, dtype=torch.int64).to(tensor.device, non_blocking=True)
    bits = _BITS.get(tensor.dtype.itemsize)
    if bits is None:
        return tensor.index_select(0, index)
    # As integers: not every dtype (float8, uint16) has an indexing kernel, and the bits are all that matters.
    return tensor.view(bits).index_select(0, index).view(tensor.dtype)


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Name of a torch dtype as the record format spells it: without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def _shape_of(tensor: torch.Tensor) -> tuple[int, ...] | str:
    return "nested" if tensor.is_nested else tuple(tensor.shape)


def pick(output: Any, key: PathKey, alias: str) -> Any:
    """One ``[key]`` of a layer path.

    Raises:
        InvalidInputError: The output has no such entry.
    """
    try:
        if isinstance(output, torch.Tensor):
            raise TypeError
        if isinstance(key, str) and not isinstance(output, Mapping):
            return getattr(output, key)
        if isinstance(key, int) and isinstance(output, Mapping) and key not in output:
            return list(output.values())[key]
        if isinstance(key, int) and dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
            return getattr(output, dataclasses.fields(output)[key].name)
        return output[key]
    except (KeyError, IndexError, AttributeError, TypeError):
        raise InvalidInputError(
            f"layer {alias!r} returned {_summary(output)}, which has no [{key!r}]",
            "correct the path in target_layers",
        ) from None


def _summary(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {_shape_of(output)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with the keys {list(output)}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of length {len(output)}"
    if dataclasses.is_dataclass(output):
        return (
            f"{type(output).__name__} with the fields {[field.name for field in dataclasses.fields(output)]}"
        )
    return f"a {type(output).__name__}"
