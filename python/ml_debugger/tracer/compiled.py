"""Hooks under `torch.compile`: what the compiler makes of one, and how compiled code learns that there is one.

The compiler inlines forward hooks into its graph. The C function of a `CaptureHook` it cannot read, so the
type shows it `_traced_call`, which comes down to one operator with an ordered effect: it is neither dropped
nor doubled nor moved, breaks no graph, and calls the same C function when the graph runs.

An operator takes no objects, so a hook goes into the graph as its number. Numbers are never used again: a
graph that outlives its tracer finds nothing under it, and does nothing.

By default compiled code does not look whether a module has hooks: code from before a hook, and code of an
unhooked module of the same class, run in place of the hooked one. `Guards` sees to both.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ml_debugger import _core
from ml_debugger.errors import InvalidInputError, LayerNotFoundError
from ml_debugger.tracer.outputs import PathKey, iterate_tensors, pick

_COMPILER = "torch._dynamo"
_numbers = itertools.count()
_targets: dict[int, _core.CaptureHook] = {}
# Missing before torch 2.7; there an exported program keeps the operator.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


class _NoNameError(InvalidInputError, AttributeError):
    """Raised to torch.jit.script, which asks a hook for its name; to all others the attribute is missing."""


# The operator. Compiled code is cached on disk by operator name: another meaning needs another name.


def _capture(tensors: list[torch.Tensor], hook: int) -> None:
    target = _targets.get(hook)
    if target is not None:
        target(None, (), tensors[0] if len(tensors) == 1 else tensors)


def _define_operator() -> torch.library.Library:
    library = torch.library.Library("ml_debugger", "FRAGMENT")
    # CUDA graphs replay kernels, not what we do on the host.
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    library.define("capture(Tensor[] tensors, int hook) -> ()", tags=() if tag is None else (tag,))
    library.impl("capture", _capture, "CompositeExplicitAutograd")
    torch.library.register_fake("ml_debugger::capture", lambda tensors, hook: None, lib=library)
    _make_effectful(torch.ops.ml_debugger.capture.default)
    return library


def _make_effectful(operator: Any) -> None:
    from torch._higher_order_ops import effects

    if hasattr(effects, "_register_effectful_op"):
        effects._register_effectful_op(operator, effects._EffectType.ORDERED)
    else:  # torch 2.4; without it the operator is dropped, and the tracer reports a layer that did not run
        effects.SIDE_EFFECTS[operator] = effects._EffectType.ORDERED


_library = _define_operator()


# The hook, as the compiler and torch.jit.script see it.


def _traced_call(hook: _core.CaptureHook, module: Any, arguments: Any, *output: Any) -> None:
    """The compiler's reading of a `CaptureHook`; what depends on the call is left to the operator."""
    if _is_exporting():
        return
    value = output[0] if output else arguments
    for key in hook.picks:
        value = pick(value, key, hook.alias)
    torch.ops.ml_debugger.capture(list(iterate_tensors(value)), hook.number)


def _refuse_name(hook: _core.CaptureHook) -> str:
    raise _NoNameError(
        f"the layer of alias {hook.alias!r} is watched by a tracer, whose hook has no name and no TorchScript",
        "script the model first and trace the scripted one, or script a copy.deepcopy() of it after close()",
    )


_core.CaptureHook.extend({"__call__": _traced_call, "__name__": property(_refuse_name)})


def connect(
    hook: _core.CaptureHook, alias: str, picks: tuple[PathKey, ...], target: _core.CaptureHook
) -> int:
    """Make compiled code that meets ``hook`` hand what is picked from the output to ``target``.

    Returns:
        The number to `disconnect`.
    """
    number = next(_numbers)
    hook.alias, hook.picks, hook.number = alias, picks, number
    _targets[number] = target
    return number


def disconnect(number: int) -> None:
    """Make code that was compiled for a hook do nothing."""
    _targets.pop(number, None)


# The compiler.


def is_loaded() -> bool:
    """Whether there can be compiled code; we never load the compiler, which takes a second."""
    return _COMPILER in sys.modules


def forget_compiled_code() -> None:
    """Make every compiled function of the process compile anew at its next call."""
    import torch._dynamo
    from torch._dynamo import convert_frame

    reset_code = getattr(torch._dynamo, "reset_code", None)
    if reset_code is None:
        torch._dynamo.reset()
        return
    with convert_frame.compile_lock:
        for reference in (*convert_frame.input_codes.seen, *convert_frame.output_codes.seen):
            code = reference()
            if code is not None:
                reset_code(code)


class Guards:
    """Makes compiled code look whether modules have hooks, while somebody needs it.

    This is the compiler's own setting ``skip_nnmodule_hook_guards``; recent versions keep it for each thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._needed_by: set[int] = set()
        self._skipped_before = False

    def need(self, owner: object) -> None:
        """Switch the guards on for what the calling thread compiles, until all owners are through."""
        config = _dynamo_config()
        with self._lock:
            if not self._needed_by:
                self._skipped_before = config.skip_nnmodule_hook_guards
            self._needed_by.add(id(owner))
            config.skip_nnmodule_hook_guards = False

    def release(self, owner: object) -> None:
        """Take one owner's need back; the last one restores the setting. Idempotent."""
        with self._lock:
            if id(owner) not in self._needed_by:
                return
            self._needed_by.discard(id(owner))
            if not self._needed_by and self._skipped_before:
                _dynamo_config().skip_nnmodule_hook_guards = True


guards = Guards()


def _dynamo_config() -> Any:
    import torch._dynamo.config

    return torch._dynamo.config


_eager_lock = threading.RLock()


@contextmanager
def run_eagerly(model: torch.nn.Module) -> Iterator[None]:
    """Run what is inside without compiled code, in all threads of the process.

    Raises:
        LayerNotFoundError: ``model`` is compiled, and this torch (before 2.6) cannot do that.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if not is_loaded():
        yield
    elif set_stance is None:
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
            raise LayerNotFoundError(
                f"the head of a compiled model cannot be looked for with torch {torch.__version__}",
                'name the layer to record: target_layers={"features": "<module path>"}',
            )
        yield
    else:
        with _eager_lock, set_stance("force_eager"):
            yield
