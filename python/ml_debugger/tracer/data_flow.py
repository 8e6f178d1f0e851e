"""Follows the data of one forward: which runs of modules made a tensor.

The functions that are called tell. Where one combines data with parameters, something new is made, by the
innermost module that runs at that moment, whoever owns the parameter. What only rescales data with parameters
(a norm, a bias, a temperature) or moves it (a class token in front) makes nothing new. Everything else passes
on what its inputs were made by.

This looks on from Python and not below the dispatcher, whose modes make some functions take another way, with
other roundings. It needs no autograd graph, so it is the same for frozen parameters, under autocast and in
inference mode.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from ml_debugger.tracer.outputs import iterate_tensors

# Functions that place tensors beside each other.
_MOVES = frozenset(
    (
        "broadcast_tensors",
        "cat",
        "concat",
        "concatenate",
        "copy",
        "dstack",
        "hstack",
        "index_copy",
        "index_put",
    )
    + ("masked_scatter", "meshgrid", "scatter", "select_scatter", "setitem", "slice_scatter", "stack", "to")
    + ("vstack", "where")
)
_ELEMENTWISE = frozenset(
    (
        "add",
        "addcdiv",
        "addcmul",
        "atan2",
        "clamp",
        "clip",
        "div",
        "divide",
        "fmod",
        "ldexp",
        "lerp",
        "logaddexp",
    )
    + ("maximum", "minimum", "mul", "multiply", "pow", "prelu", "remainder", "sub", "subtract", "true_divide")
    + ("truediv", "xlogy")
)
# Results whose contents come from elsewhere, or that somebody writes whom we do not see.
_UNSEEN = frozenset(
    (
        "as_tensor",
        "empty",
        "empty_like",
        "empty_strided",
        "from_dlpack",
        "from_numpy",
        "frombuffer",
        "new_empty",
    )
    + ("new_empty_strided", "new_tensor", "tensor")
)


@dataclass(eq=False)
class Run:
    """One run of a module.

    Attributes:
        path: The module's path, without wrapper prefixes.
        module: The module.
        start: Counts runs; later ones have larger numbers.
        given: Its first input with the batch size, while it runs.
        version: Of ``given`` when it came; None if torch does not count.
        input: A copy of ``given`` from before the module could change it; None if not kept.
        by_keyword: Whether that came as a keyword argument.
        given_shapes: Of all its tensor inputs.
        output_shape: Of its first tensor output.
        combines: Here or inside, data met parameters.
        makes: Here, not inside, something new was made.
        made_inside: A module inside made something new.
        last_inside: Path of the module inside that ended last.
        before: ``last_inside`` when this run itself made something new.
    """

    path: str
    module: torch.nn.Module | None
    start: int = -1
    given: torch.Tensor | None = None
    version: int | None = None
    input: torch.Tensor | None = None
    by_keyword: bool = False
    given_shapes: tuple[tuple[int, ...], ...] = ()
    output_shape: tuple[int, ...] = ()
    combines: bool = False
    makes: bool = False
    made_inside: bool = False
    last_inside: str | None = None
    before: str | None = None


# Made where we cannot look: kernels that bypass the dispatcher, memory that came from elsewhere.
UNKNOWN = Run("", None, makes=True)


class _Fixed(Enum):
    """What holds no data of the call."""

    PARAMETER = auto()
    CONSTANT = auto()


_Makers = frozenset[Run]
_Origin = _Makers | _Fixed


_weak_reference: Callable[[torch.UntypedStorage], StorageWeakRef] = StorageWeakRef  # untyped in torch


class DataFlow(TorchFunctionMode):
    """Knows of every tensor what made it, while active; by storage, so that views share it.

    Args:
        model: Its parameters and buffers are no data.

    Attributes:
        running: The runs that have begun and not ended, outermost first.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.running: list[Run] = []
        # The weak reference keeps a storage's address from being used again.
        self._origins: dict[int, tuple[StorageWeakRef, _Origin]] = {}
        self._registered: set[int] = set()
        self._register(model.parameters(), _Fixed.PARAMETER)
        self._register(model.buffers(), _Fixed.CONSTANT)

    def register(self, module: torch.nn.Module) -> None:
        """Note what a module computes with now, just before it runs.

        Sharding and lazy modules put other parameters in the place of those that were there, sharding and
        replicating also plain tensors.
        """
        self._register(
            [value for value in module._parameters.values() if value is not None], _Fixed.PARAMETER
        )
        plain = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        self._register([value for value in plain if not self._is_known(value)], _Fixed.PARAMETER)

    def mark_input(self, given: Any) -> None:
        """Note tensors as the data that all begins with."""
        self._assign(given, frozenset())

    def mark_output(self, output: Any, run: Run) -> None:
        """Note the output of ``run`` as its own: what happened inside was not seen."""
        self._made_by(run)
        self._assign(output, frozenset([run]))

    def is_unseen(self, output: Any) -> bool:
        """Whether something in ``output`` was made where we cannot look."""
        return any(UNKNOWN in self.makers(tensor) for tensor in iterate_tensors(output))

    def is_data(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor holds data of the call."""
        return not isinstance(self._origin(tensor), _Fixed)

    def makers(self, tensor: torch.Tensor) -> _Makers:
        """The runs that made ``tensor``: those from which nothing else new was made on the way to it."""
        origin = self._origin(tensor)
        return frozenset() if isinstance(origin, _Fixed) else origin

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Do not look on inside; code that asks whether somebody does goes its usual way."""
        # Untyped in torch.
        current_mode: Callable[[], Any] = _get_current_function_mode
        with _pop_mode_temporarily() if current_mode() is self else contextlib.nullcontext():
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function as it is, and note what its outputs were made by."""
        kwargs = kwargs or {}
        inputs = [(tensor, self._origin(tensor)) for tensor in iterate_tensors((args, kwargs))]
        aliased = {storage._cdata for tensor, _ in inputs for storage in _storages(tensor)}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        outputs = list(iterate_tensors(args[0] if name == "__setitem__" else output))
        if outputs:
            # Quantized weights come packed.
            packed = any(isinstance(value, torch.ScriptObject) for value in args)
            origin = self._of_call(name, inputs, outputs, packed)
            writes = name in ("__setitem__", "__set__") or _is_in_place(name) or "out" in kwargs
            for tensor in outputs:
                for storage in _storages(tensor):
                    # A view has the origin of what it views; parameters stay parameters whatever is written.
                    if storage._cdata not in aliased or (writes and storage._cdata not in self._registered):
                        self._set(storage, origin)
        return output

    def _of_call(
        self,
        name: str,
        inputs: list[tuple[torch.Tensor, _Origin]],
        outputs: list[torch.Tensor],
        packed: bool,
    ) -> _Origin:
        if name in _UNSEEN:
            return frozenset([UNKNOWN]) if _numel(outputs[0]) > 1 else _Fixed.CONSTANT
        data = [(tensor, origin) for tensor, origin in inputs if not isinstance(origin, _Fixed)]
        has_parameters = packed or any(origin is _Fixed.PARAMETER for _, origin in inputs)
        if not data:
            return _Fixed.PARAMETER if has_parameters else _Fixed.CONSTANT
        makers: _Makers = frozenset().union(*(origin for _, origin in data))
        if not has_parameters or not self.running:
            return makers
        for run in self.running:
            run.combines = True
        run = self.running[-1]
        if not _only_changes(name, [tensor for tensor, _ in data], outputs):
            self._made_by(run)
            return frozenset([run])
        # A model that does nothing but rescale has no other head than that.
        return makers if any(maker.makes for maker in makers) else frozenset([run])

    def _register(self, tensors: Iterable[torch.Tensor], kind: _Fixed) -> None:
        for tensor in tensors:
            for storage in _storages(tensor):
                if storage._cdata not in self._registered:
                    self._set(storage, kind)
                    self._registered.add(storage._cdata)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return any(storage._cdata in self._origins for storage in _storages(tensor))

    def _made_by(self, run: Run) -> None:
        run.makes, run.before = True, run.last_inside
        for outer in self.running:
            if outer is not run:
                outer.made_inside = True
                outer.input = None

    def _origin(self, tensor: torch.Tensor) -> _Origin:
        known = [self._origins.get(storage._cdata) for storage in _storages(tensor)]
        origins = [entry[1] for entry in known if entry is not None]
        makers = [origin for origin in origins if not isinstance(origin, _Fixed)]
        if makers:
            return frozenset().union(*makers)
        if origins:
            return _Fixed.PARAMETER if _Fixed.PARAMETER in origins else _Fixed.CONSTANT
        return frozenset([UNKNOWN]) if _numel(tensor) > 1 else _Fixed.CONSTANT

    def _assign(self, value: Any, origin: _Origin) -> None:
        for tensor in iterate_tensors(value):
            for storage in _storages(tensor):
                if storage._cdata not in self._registered:
                    self._set(storage, origin)

    def _set(self, storage: torch.UntypedStorage, origin: _Origin) -> None:
        known = self._origins.get(storage._cdata)
        reference = _weak_reference(storage) if known is None else known[0]
        self._origins[storage._cdata] = (reference, origin)


def _plain_name(name: str) -> str:
    """``add`` for ``add_``, ``__add__``, ``__radd__`` and ``__iadd__``."""
    plain = name.strip("_")
    return plain[1:] if name.startswith("__") and plain[1:] in _ELEMENTWISE else plain


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return name.startswith("__i") and _plain_name(name) in _ELEMENTWISE
    return name.endswith("_")


def _only_changes(name: str, data: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether a function of data and parameters leaves the data what it was: moved, shifted or rescaled."""
    name = _plain_name(name)
    if name in _MOVES or name.endswith("_as") or "norm" in name:
        return True
    # One that grows by broadcasting compares every sample with every row of a parameter.
    widest = max(_numel(tensor) for tensor in data)
    return name in _ELEMENTWISE and all(_numel(tensor) <= widest for tensor in outputs)


def _numel(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():  # subclasses need not hear of it
        return sys.maxsize if tensor.is_nested else tensor.numel()


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """The memory of a tensor; of a wrapper such as DTensor, that of its parts; none of some layouts."""
    with torch._C.DisableTorchFunction():
        if type(tensor) is not torch.Tensor and hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            parts = [getattr(tensor, name) for name in names]  # of DTensor also its mesh
            return [
                storage for part in parts if isinstance(part, torch.Tensor) for storage in _storages(part)
            ]
        try:
            return [tensor.untyped_storage()]
        except (RuntimeError, NotImplementedError):
            return []
