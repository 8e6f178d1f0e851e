"""Finds the classification head by watching one forward, and keeps what it was given.

Names tell little about a head, and the order of registration nothing. So the first traced call is watched:
hooks note which module runs and what it is given, copied at that moment since in-place operations may follow;
`DataFlow` notes what each tensor is made by. The head is the last, innermost module that made the logits by
its parameters: of several whose outputs flow into them, those with as many classes first, then the one that
ran last (two heads that are averaged: the second). A module behind it that only rescales logits, such as a
temperature or a norm, is none. Later calls pay nothing.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ml_debugger.errors import LayerNotFoundError
from ml_debugger.tracer.compiled import run_eagerly
from ml_debugger.tracer.data_flow import UNKNOWN, DataFlow, Run
from ml_debugger.tracer.flat_parameters import original_parameters
from ml_debugger.tracer.layers import strip_wrappers
from ml_debugger.tracer.outputs import CallState, has_batch_size, iterate_tensors, without_modes

HEAD_ALIAS = "features"

_HINT = 'name the layer to record: target_layers={"features": "<module path>"}'
# Inputs are copied: only those of the modules that ran last are kept, so that the first step needs little
# more memory. Of at least so many modules, and of more while they are small.
_KEPT_MODULES = 8
_KEPT_BYTES = 64 << 20
# They leave their fused path when somebody looks on, and the layer when there is a hook at it or inside.
_FUSED = (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention)


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


class HeadSearch:
    """Watches one forward.

    Args:
        model: The model.
        state: Tells the batch size of the current call.
        batch_dim: Where the samples lie in the head's input.

    Raises:
        LayerNotFoundError: The model has no module with parameters, or is compiled under a torch before 2.6.
    """

    def __init__(self, model: torch.nn.Module, state: CallState, batch_dim: int = 0) -> None:
        self._state = state
        self._batch_dim = batch_dim
        self._model = model
        self._modules = _modules_to_watch(model)
        if not self._modules:
            raise LayerNotFoundError(
                "the model has no module with parameters that calls hooks (a scripted one does not), so no "
                "classification head",
                _HINT,
            )
        if not hasattr(torch.compiler, "set_stance") and any(map(_is_compiled, model.modules())):
            raise LayerNotFoundError(
                f"torch {torch.__version__} cannot run a compiled model as it is written for once, so its "
                "head is not found, expected torch 2.6 or newer",
                _HINT,
            )
        self._thread = 0
        self._flow: DataFlow | None = None
        self._forget()

    @contextlib.contextmanager
    def watching(self, given: tuple[Any, Any] | None = None) -> Iterator[None]:
        """Watch the forward that runs inside, in this thread; hooks are gone afterwards.

        ``given``: the model runs already and was given these (args, kwargs); the caller then says by
        `end_run` what it returned.

        A compiled model runs as it is written, for this once: compiled code calls no function that we see.
        """
        self._forget()
        flow = self._flow = DataFlow(self._model)
        self._thread = threading.get_ident()
        try:
            with contextlib.ExitStack() as watches:
                for path, module in self._modules:
                    if given is not None and module is self._model:
                        self.begin_run(path, module, *given)
                    elif isinstance(module, _FUSED):
                        watches.enter_context(self._around_forward(path, module))
                    else:
                        self._hook(path, module, watches)
                with run_eagerly(), flow:
                    yield
        except BaseException:
            self._forget()  # a failed forward must not keep its tensors alive
            raise
        finally:
            self._thread = 0

    def _hook(self, path: str, module: torch.nn.Module, watches: contextlib.ExitStack) -> None:
        watcher = _Watcher(self, path)
        before = module.register_forward_pre_hook(watcher.before, with_kwargs=True)
        watches.callback(before.remove)
        after = module.register_forward_hook(watcher.after, with_kwargs=True, always_call=True)
        watches.callback(after.remove)

    @contextlib.contextmanager
    def _around_forward(self, path: str, module: torch.nn.Module) -> Iterator[None]:
        """Watch a module as a whole, without hooks and without looking inside."""
        forward, own = module.forward, vars(module).get("forward")

        def watched(*args: Any, **kwargs: Any) -> Any:
            flow = self._flow
            if flow is None or threading.get_ident() != self._thread:
                return forward(*args, **kwargs)
            self.begin_run(path, module, args, kwargs)
            output = None
            try:
                with flow.looking_away():
                    output = forward(*args, **kwargs)
                return output
            finally:
                self.end_run(module, (args, kwargs), output, opaque=True)

        module.forward = watched
        try:
            yield
        finally:
            if own is None:
                del module.forward
            else:
                module.forward = own

    def find(self, logits: torch.Tensor | None) -> Head:
        """Return the head that made ``logits`` in the watched forward, and forget everything else.

        Raises:
            LayerNotFoundError: There is none, or it is given no tensor with the batch size.
        """
        runs = self._runs
        makers = frozenset() if logits is None or self._flow is None else self._flow.makers(logits)
        self._forget()
        candidates = [] if logits is None else _candidates(makers, runs, logits)
        for chosen in candidates:
            inputs = [run.input for run in runs if run.module is chosen.module and run.input is not None]
            if inputs and chosen.module is not None and not chosen.made_inside:
                return Head(chosen.path, chosen.module, chosen.by_keyword, inputs)
        raise _not_found(candidates, self._state.batch_size, self._batch_dim)

    def begin_run(self, path: str, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Note that a module is called."""
        flow = self._flow
        if flow is None or threading.get_ident() != self._thread:
            return
        if not flow.running:
            flow.mark_input((args, kwargs))
        flow.register(module)
        run = Run(path, module, len(self._runs))
        given = self._first_input(args)
        if given is None:
            given = self._first_input(kwargs)
            run.by_keyword = given is not None
        if given is not None:
            run.given, run.version = given, None if given.is_inference() else given._version
            run.input = self._copy(run, given)
        run.given_shapes = tuple(
            tuple(tensor.shape) for tensor in iterate_tensors((args, kwargs)) if not tensor.is_nested
        )
        self._runs.append(run)
        flow.running.append(run)

    def end_run(self, module: torch.nn.Module, given: Any, output: Any, *, opaque: bool = False) -> None:
        """Note what a module returned; None if it raised. ``opaque``: what happened inside was not seen."""
        flow = self._flow
        if flow is None or threading.get_ident() != self._thread:
            return
        if not flow.running or flow.running[-1].module is not module:  # a hook before ours raised
            return
        run = flow.running.pop()
        first = next(iterate_tensors(output), None)
        if first is not None and not first.is_nested:
            run.output_shape = tuple(first.shape)
        if any(map(flow.is_data, iterate_tensors(given))):
            if opaque:
                run.made_inside = True
                flow.mark_output(output, run)
            elif not run.combines and _owns_parameters(module) and flow.is_unseen(output):
                flow.mark_output(output, run)
        if flow.running:
            flow.running[-1].last_inside = run.path
        run.given = None
        self._keep(run)

    def _copy(self, run: Run, given: torch.Tensor) -> torch.Tensor:
        """A copy of what a module is given; one for all that hand the same tensor on to a module inside."""
        flow = self._flow
        outer = flow.running[-1] if flow is not None and flow.running else None
        if outer is not None and outer.given is given and outer.version == run.version is not None:
            copied = outer.input
            if copied is not None:
                return copied
        with without_modes():
            return given.detach().clone()

    def _keep(self, run: Run) -> None:
        """Drop the inputs of the modules that ran longest ago."""
        if run.input is None:
            return
        runs = self._kept.pop(id(run.module), [])
        runs.append(run)
        self._kept[id(run.module)] = runs
        self._kept_bytes += run.input.nbytes
        while len(self._kept) > _KEPT_MODULES and self._kept_bytes > _KEPT_BYTES:
            for old in self._kept.pop(next(iter(self._kept))):
                if old.input is not None:
                    self._kept_bytes -= old.input.nbytes
                old.input = None

    def _first_input(self, given: Any) -> torch.Tensor | None:
        for tensor in iterate_tensors(given):
            if has_batch_size(tensor, self._state.batch_size, self._batch_dim) and not tensor.is_nested:
                return tensor
        return None

    def _forget(self) -> None:
        self._flow = None
        self._runs: list[Run] = []
        self._kept: dict[int, list[Run]] = {}
        self._kept_bytes = 0


class _Watcher:
    """Hooks of one module; lives as long as the watched forward."""

    def __init__(self, search: HeadSearch, path: str) -> None:
        self._search = weakref.ref(search)
        self._path = path

    def before(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if (search := self._search()) is not None:
            search.begin_run(self._path, module, args, kwargs)

    def after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (search := self._search()) is not None:
            search.end_run(module, (args, kwargs), output)


def _modules_to_watch(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Modules with parameters, except inside those that are watched as a whole or call no hooks."""
    found: list[tuple[str, torch.nn.Module]] = []
    left_out: set[int] = set()
    originals = original_parameters(model)
    for path, module in model.named_modules():
        if id(module) in left_out:
            continue
        if isinstance(module, (*_FUSED, torch.jit.ScriptModule)):
            left_out.update(id(inner) for inner in module.modules())
        has_parameters = next(module.parameters(), None) is not None or id(module) in originals
        if has_parameters and not isinstance(module, torch.jit.ScriptModule):
            found.append((strip_wrappers(path), module))
    return found


def _candidates(makers: frozenset[Run], runs: list[Run], logits: torch.Tensor) -> list[Run]:
    """The runs that made the logits, the best one first."""
    found = [run for run in makers if run is not UNKNOWN]
    if UNKNOWN in makers and not found:
        # The last step was out of sight: then it is the module that ran last, if it has the classes.
        found = [run for run in [run for run in runs if run.makes][-1:] if _has_classes(run, logits)]
    return sorted(found, key=lambda run: (_has_classes(run, logits), run.start), reverse=True)


def _owns_parameters(module: torch.nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _has_classes(run: Run, logits: torch.Tensor) -> bool:
    """Whether the output of a run has the classes of the logits: in its last dimension, or as channels."""
    shape, classes = run.output_shape, tuple(logits.shape)
    if len(classes) < 2:
        return torch.Size(shape).numel() == torch.Size(classes).numel()
    return len(shape) >= 2 and classes[-1] in (shape[-1], shape[1])


def _is_compiled(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _not_found(candidates: list[Run], batch_size: int, batch_dim: int) -> LayerNotFoundError:
    """What to tell about runs that made the logits and yet are no head."""
    if not candidates:
        return LayerNotFoundError("no module with parameters makes the logits of this model", _HINT)
    run = candidates[0]
    name = repr(run.path) if run.path else "the model itself"
    if run.made_inside:
        hint = _HINT if run.before is None else _HINT.replace("<module path>", run.before)
        return LayerNotFoundError(
            f"{name} makes the logits with parameters of its own, behind modules inside it, so that no "
            "module is given the features",
            hint if run.before is None else f"{hint} is the module that ran just before",
        )
    given = ", ".join(map(str, run.given_shapes)) or "no tensor"
    return LayerNotFoundError(
        f"the head {name} is given {given}, expected {batch_size} samples along dimension {batch_dim}",
        f'{_HINT}, or set TracerConfig(batch_dim={{"features": ...}}) if the samples lie elsewhere',
    )
