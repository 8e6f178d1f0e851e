"""Finds the classification head by watching one forward, and keeps what it was given.

Names tell little about a head, and the order of registration nothing. So the first traced call is watched:
every module with parameters of its own notes its input, copied at that moment since in-place operations may
follow, and its output. Then the head is the last, innermost one of them that makes the logits. Later calls
pay nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ml_debugger.errors import LayerNotFoundError
from ml_debugger.tracer.flat_parameters import FLAT_PARAMETER, original_parameters
from ml_debugger.tracer.layers import strip_wrappers
from ml_debugger.tracer.outputs import CallState, has_batch_size, iterate_tensors, without_modes

_HINT = 'name the layer to record: target_layers={"features": "<module path>"}'
# Inputs are copied, outputs kept alive: only of the last runs, so that the first step needs little more
# memory.
_WINDOW = 8
_GRAPH_NODES = 4096


@dataclass
class Head:
    """The head that was found.

    Attributes:
        path: Its path, without wrapper prefixes.
        module: The module whose input is captured.
        by_keyword: Whether its input comes as a keyword argument.
        inputs: What it was given in the watched call, one copy for each run.
    """

    path: str
    module: torch.nn.Module
    by_keyword: bool
    inputs: list[torch.Tensor]


@dataclass
class _Run:
    """One run of a module in the watched forward; `start` and `end` count events and nest as the runs do."""

    path: str
    module: torch.nn.Module
    start: int
    end: int = -1
    by_keyword: bool = False
    input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    output_shape: tuple[int, ...] = ()

    def holds(self, other: _Run) -> bool:
        return self.start < other.start and other.end < self.end


class HeadSearch:
    """Watches one forward.

    Args:
        model: The model.
        state: Tells the batch size of the current call.
        batch_dim: Where the samples lie in the head's input.

    Raises:
        LayerNotFoundError: The model has no module with parameters.
    """

    def __init__(self, model: torch.nn.Module, state: CallState, batch_dim: int = 0) -> None:
        self._state = state
        self._batch_dim = batch_dim
        self._candidates = _modules_with_parameters(model)
        if not self._candidates:
            raise LayerNotFoundError(
                "the model has no module with parameters, so no classification head", _HINT
            )
        self._runs: list[_Run] = []
        self._clock = 0
        self._thread = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward that runs inside; hooks are gone afterwards."""
        self._runs, self._clock, self._thread = [], 0, threading.get_ident()
        handles: list[RemovableHandle] = []
        try:
            for path, module in self._candidates:
                watcher = _Watcher(self, path)
                handles.append(module.register_forward_pre_hook(watcher.before, with_kwargs=True))
                handles.append(module.register_forward_hook(watcher.after))
            yield
        except BaseException:
            self._runs = []  # a failed forward must not keep its tensors alive
            raise
        finally:
            self._thread = 0
            for handle in handles:
                handle.remove()

    def find(self, logits: torch.Tensor | None) -> Head:
        """Return the head that made ``logits`` in the watched forward, and forget everything else.

        Raises:
            LayerNotFoundError: None of the modules did.
        """
        runs, self._runs = [run for run in self._runs if run.end >= 0], []
        chosen = None if logits is None else _choose(runs, logits)
        if chosen is None:
            raise LayerNotFoundError("no module with parameters makes the logits of this model", _HINT)
        same = [run for run in runs if run.module is chosen.module and run.input is not None]
        if not same:
            raise LayerNotFoundError(
                f"the head {chosen.path!r} has no tensor with the batch size as input", _HINT
            )
        inputs = [run.input for run in same if run.input is not None]
        return Head(chosen.path, chosen.module, chosen.by_keyword, inputs)

    def begin_run(self, path: str, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        if threading.get_ident() != self._thread:
            return
        run = _Run(path, module, self._tick())
        given = self._first_input(args)
        if given is None:
            given = self._first_input(kwargs)
            run.by_keyword = given is not None
        if given is not None:
            with without_modes():
                run.input = given.detach().clone()
        self._runs.append(run)
        for old in self._runs[:-_WINDOW]:
            old.input = old.output = None

    def end_run(self, module: torch.nn.Module, output: Any) -> None:
        """Note what a module returned."""
        if threading.get_ident() != self._thread:
            return
        run = next((run for run in reversed(self._runs) if run.module is module and run.end < 0), None)
        if run is None:
            return
        run.end = self._tick()
        run.output = next(iterate_tensors(output), None)
        if run.output is not None and not run.output.is_nested:
            run.output_shape = tuple(run.output.shape)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _first_input(self, given: Any) -> torch.Tensor | None:
        for tensor in iterate_tensors(given):
            if has_batch_size(tensor, self._state.batch_size, self._batch_dim) and not tensor.is_nested:
                return tensor
        return None


class _Watcher:
    """Hooks of one candidate; lives as long as the watched forward."""

    def __init__(self, search: HeadSearch, path: str) -> None:
        self._search = weakref.ref(search)
        self._path = path

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if (search := self._search()) is not None:
            search.begin_run(self._path, module, args, kwargs)

    def after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if (search := self._search()) is not None:
            search.end_run(module, output)


def _modules_with_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Modules with parameters of their own, except where hooks would change numerics or are not possible."""
    found: list[tuple[str, torch.nn.Module]] = []
    fused: set[int] = set()
    originals = original_parameters(model)
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention)):
            # A hook inside would switch off the fused path; their inner modules make no logits.
            fused.update(id(inner) for inner in module.modules())
        if id(module) in fused or isinstance(module, torch.jit.ScriptModule):
            continue
        has_own = any(
            parameter is not None and key != FLAT_PARAMETER for key, parameter in module._parameters.items()
        )
        if has_own or id(module) in originals:
            found.append((strip_wrappers(path), module))
    return found


def _choose(runs: list[_Run], logits: torch.Tensor) -> _Run | None:
    making = [run for run in runs if _makes_classes(run.output_shape, tuple(logits.shape))]
    same = [run for run in runs if run.output is not None and _is_same_memory(run.output, logits)]
    for chosen in (
        _innermost(same, making),
        _innermost(_nearest_in_graph(making, logits), making),
        _innermost(making, making),
    ):
        # The model itself, with modules inside that had their part in it, is no head: its input is the data.
        if chosen is not None and not (chosen.path == "" and any(chosen.holds(run) for run in runs)):
            return chosen
    return None


def _innermost(candidates: list[_Run], making: list[_Run]) -> _Run | None:
    """The last of ``candidates``, or the last module inside it that makes as many classes."""
    if not candidates:
        return None
    outer = max(candidates, key=lambda run: run.start)
    inside = [run for run in making if outer.holds(run)]
    return max(inside, key=lambda run: run.start) if inside else outer


def _makes_classes(shape: tuple[int, ...], logits_shape: tuple[int, ...]) -> bool:
    """Whether an output has the classes of the logits: in its last dimension, or as channels."""
    if not shape:
        return False
    if len(logits_shape) < 2:
        return torch.Size(shape).numel() == torch.Size(logits_shape).numel()
    return len(shape) >= 2 and (shape[-1] == logits_shape[-1] or shape[1] == logits_shape[1])


def _is_same_memory(output: torch.Tensor, logits: torch.Tensor) -> bool:
    if output is logits:
        return True
    try:
        address = output.untyped_storage().data_ptr()
        return address != 0 and address == logits.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a layout without storage
        return False


def _nearest_in_graph(runs: list[_Run], logits: torch.Tensor) -> list[_Run]:
    """Runs of the modules whose parameters are nearest to the logits in the autograd graph."""
    owners = {
        id(parameter): run
        for run in runs
        for parameter in run.module._parameters.values()
        if parameter is not None
    }
    level: list[Any] = [] if logits.grad_fn is None else [logits.grad_fn]
    seen: set[Any] = set()
    while level and len(seen) < _GRAPH_NODES:
        found = [owners[id(node.variable)] for node in level if id(getattr(node, "variable", None)) in owners]
        if found:
            return found
        following = []
        for node in level:
            for successor, _ in node.next_functions:
                if successor is not None and successor not in seen:
                    seen.add(successor)
                    following.append(successor)
        level = following
    return []
