"""From what a layer returns to the tensor that is stored."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from ml_debugger import _core
from ml_debugger.errors import InvalidInputError, MlDebuggerError

PathKey = int | str

# Dtypes of the record format that this torch has; everything else is refused by name.
STORABLE_DTYPES = frozenset(
    dtype
    for name in (
        "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
        "bfloat16", "float16", "float32", "float64", "complex32", "complex64", "complex128",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
    if (dtype := getattr(torch, name, None)) is not None
)  # fmt: skip

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WITHOUT_KERNELS = (torch.uint16, torch.uint32, torch.uint64)
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_PLAIN_HINT = "turn it into a dense tensor before, for example by t -> {call}"
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
    cast, keep the sampled rows. Never changes the output, and holds no reference to it or to the tracer.
    A reduction that is a callable also gets what has no dense form of its own (sparse, nested, quantized,
    distributed tensors), as the layer gave it.
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
        with torch.no_grad(), without_modes():
            with torch._C.DisableTorchFunctionSubclass():
                tensor = self._find(output)
                refusal = _refusal(tensor) if callable(self._reduction) else None
            if refusal is None:
                tensor = plain_tensor(tensor, f"the output of layer {self._alias!r}", self._plain_hint)
            if self._batch_dim:
                tensor = tensor.movedim(self._batch_dim, 0)
            if self._reduction is not None:
                tensor = self._reduce(tensor)
            if self._capture_dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(self._capture_dtype)
            return select_rows(tensor, self._state.rows).contiguous()

    @property
    def _plain_hint(self) -> str:
        return f"trace another layer, or set TracerConfig.reduce = {{{self._alias!r}: lambda t: {{call}}}}"

    def _find(self, output: Any) -> torch.Tensor:
        for key in self._picks:
            output = pick(output, key, self._alias)
        batch_size = self._state.batch_size
        others = []
        for tensor in iterate_tensors(output):
            if has_batch_size(tensor, batch_size, self._batch_dim):
                return tensor
            others.append(tensor)
        raise self._no_batch(output, others)

    def _no_batch(self, output: Any, tensors: list[torch.Tensor]) -> InvalidInputError:
        found = f"no tensor ({type(output).__name__})"
        if tensors:
            found = f"tensors of shape {', '.join(map(str, map(_shape_of, tensors)))}"
        hint = _BATCH_HINT
        refusals = [refusal for tensor in tensors if (refusal := _refusal(tensor)) is not None]
        if refusals:
            # A tensor inside of vmap, or a shard, shows another shape than the user has in mind.
            found += f" ({refusals[0].reason})"
            hint = refusals[0].hint(self._plain_hint)
        return InvalidInputError(
            f"layer {self._alias!r} returned {found}, expected {self._state.batch_size} samples "
            f"(one for each input id) along dimension {self._batch_dim}",
            hint,
        )

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = self._state.batch_size
        counts_writes = type(tensor) in _PLAIN_TYPES and not tensor.is_inference()
        version = tensor._version if counts_writes else 0
        try:
            reduced = reduce_tensor(tensor, self._reduction)
        except MlDebuggerError:
            raise
        except Exception as error:
            raise InvalidInputError(
                f"reduce[{self._alias!r}] failed on a {dtype_name(tensor.dtype)} tensor of shape "
                f"{_shape_of(tensor)}: {error}",
                "reduce that layer with a callable that fits it",
            ) from error
        if counts_writes and tensor._version != version:
            raise InvalidInputError(
                f"reduce[{self._alias!r}] changed its argument in place, and so the model's own tensor",
                "let the callable return a new tensor",
            )
        if isinstance(reduced, torch.Tensor):
            reduced = plain_tensor(reduced, f"the result of reduce[{self._alias!r}]")
        if not isinstance(reduced, torch.Tensor) or reduced.ndim == 0 or reduced.shape[0] != rows:
            found = tuple(reduced.shape) if isinstance(reduced, torch.Tensor) else type(reduced).__name__
            raise InvalidInputError(
                f"reduce[{self._alias!r}] must return a tensor with {rows} samples in front, got {found}",
                "keep dimension 0 in the callable",
            )
        return reduced


def without_modes() -> AbstractContextManager[Any]:
    """Hides what runs inside from ``TorchDispatchMode`` s of the user's run.

    Selective activation checkpointing counts the calls of each operator; ours would shift its cache.
    """
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


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


def is_plain_batch(value: Any, batch_size: int) -> bool:
    """Whether ``value`` is a dense tensor, no subclass, with ``batch_size`` samples along dimension 0."""
    return _core.is_dense(value) and value.ndim > 0 and value.shape[0] == batch_size


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


class Refusal(NamedTuple):
    """Why a tensor cannot be stored as it stands.

    Attributes:
        reason: Completes "it is ...".
        call: Python that makes a dense tensor of ``t``; empty where nothing does.
        remedy: What else helps; only without ``call``.
    """

    reason: str
    call: str = ""
    remedy: str = ""

    def hint(self, template: str) -> str:
        """``template`` with the call filled in, or the remedy."""
        return template.replace("{call}", self.call) if self.call else self.remedy


def plain_tensor(tensor: torch.Tensor, what: str, hint: str = _PLAIN_HINT) -> torch.Tensor:
    """Return ``tensor`` as an exact, detached, dense, contiguous ``torch.Tensor`` with the same values.

    Args:
        tensor: Any tensor.
        what: Names it in the error.
        hint: Remedy where a call makes the tensor dense; ``{call}`` stands for that call.

    Raises:
        InvalidInputError: Sparse, nested, quantized, on the meta device, inside of a ``torch.func``
            transform, of a dtype or subclass without a dense form.
    """
    if _core.is_dense(tensor):
        return tensor.detach() if tensor.requires_grad else tensor
    if type(tensor) in _PLAIN_TYPES:
        refusal = _refusal(tensor)
    else:
        with torch._C.DisableTorchFunctionSubclass():
            refusal = _refusal(tensor)
            if refusal is None:
                tensor = _without_subclass(tensor)
    if refusal is not None:
        raise InvalidInputError(f"{what} is {refusal.reason}, expected a dense tensor", refusal.hint(hint))
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous()


def _without_subclass(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that a subclass stands for; the subclass itself if it does not say."""
    try:
        # The result of a collective that may still be under way, as tensor-parallel layers return it.
        waited = getattr(tensor, "trigger_wait", None)
        plain = tensor.as_subclass(torch.Tensor) if waited is None else waited()
    except Exception:  # its own __torch_dispatch__ answers, or fails as it likes
        return tensor
    same = plain.shape == tensor.shape and plain.dtype == tensor.dtype
    return plain if type(plain) is torch.Tensor and same else tensor


def _refusal_of_subclass(tensor: torch.Tensor) -> Refusal:
    reason = f"a {type(tensor).__name__}, which has no memory of its own"
    for method, call in (("to_local", "t.to_local()"), ("get_data", "t.get_data()")):
        if hasattr(tensor, method):
            return Refusal(reason, call)
    return Refusal(reason, "<a plain tensor made of t>")


# Private, but without another way to ask; where it is missing the core refuses such tensors without a hint.
_is_functorch_wrapped: Callable[[torch.Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", lambda tensor: False
)


def _refusal(tensor: torch.Tensor) -> Refusal | None:
    """Why ``tensor`` has no dense bytes to store; None if it has.

    Of a subclass that overrides ``__torch_function__`` this must be asked with that switched off.
    """
    if tensor.is_nested:
        return Refusal("a nested tensor", "t.to_padded_tensor(0.0)")
    if tensor.layout is not torch.strided:
        return Refusal(f"of layout {str(tensor.layout).removeprefix('torch.')}", "t.to_dense()")
    if _is_functorch_wrapped(tensor) or torch._is_functional_tensor(tensor):
        return Refusal(
            "inside of a torch.func transform (vmap, grad, jvp, ...)",
            remedy="call the tracer outside of the transform, and trace layers that run outside of it",
        )
    if tensor.is_meta:
        return Refusal("on the meta device", remedy="run the model on a device that computes values")
    if tensor.dtype not in STORABLE_DTYPES:
        if tensor.is_quantized:
            return Refusal("quantized", "t.dequantize()")
        return Refusal(f"of dtype {dtype_name(tensor.dtype)}, which is not stored", "t.view(torch.uint8)")
    if type(tensor) not in _PLAIN_TYPES and type(_without_subclass(tensor)) is not torch.Tensor:
        return _refusal_of_subclass(tensor)
    return None


def select_rows(tensor: torch.Tensor, rows: list[int] | None) -> torch.Tensor:
    """The kept samples of a tensor whose dimension 0 is the batch; ``rows=None`` keeps all. Never waits."""
    if rows is None:
        return tensor
    # From pageable memory the driver may wait for the stream ("API synchronization behavior" in NVIDIA's
    # reference). torch keeps the pinned memory from being used again until the copy is done.
    index = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=tensor.is_cuda)
    index = index.to(tensor.device, non_blocking=True)
    bits = _BITS.get(tensor.dtype.itemsize)
    if bits is None:
        return tensor.index_select(0, index)
    # As integers: not every dtype (float8, uint16) has an indexing kernel, and the bits are all that matters.
    return tensor.view(bits).index_select(0, index).view(tensor.dtype)


def stack_tensors(values: Sequence[Any]) -> torch.Tensor | None:
    """Dense tensors of one dtype, shape and device as one, on that device.

    None where ``values`` are anything else, or of a dtype that has no kernel for it everywhere: uint16 to
    uint64, and floats of 8 bits.
    """
    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    first = values[0]
    if _refusal(first) is not None or first.dtype in _WITHOUT_KERNELS:
        return None
    if first.dtype.itemsize == 1 and first.is_floating_point():
        return None
    alike = first.dtype, first.shape, first.device
    if any((value.dtype, value.shape, value.device) != alike for value in values):
        return None
    with torch.no_grad():
        return torch.stack(tuple(values))


def tensor_of_array(array: np.ndarray[Any, Any], dtype: str | None = None) -> torch.Tensor:
    """A copy of a numeric array, in C order; ``dtype`` is numpy's name of the wanted one, None keeps it."""
    return torch.from_numpy(np.array(array, dtype or array.dtype.newbyteorder("="), order="C"))


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
