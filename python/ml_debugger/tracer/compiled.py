"""Hooks under `torch.compile`: what the compiler makes of one, and how compiled code learns of it.

The compiler inlines forward hooks into its graph. The C function of a `CaptureHook` it cannot read, so the
type shows it `_traced_call`, which comes down to one operator with an ordered effect: it is neither dropped
nor doubled nor moved, breaks no graph, and calls the same C function when the graph runs.

An operator takes no objects, so a hook goes into the graph as its number. Numbers are never used again: a
graph that outlives its tracer finds nothing under it, and does nothing.

By default compiled code does not look whether a module has hooks: code from before a hook, and code of an
unhooked module of the same class, run in place of the hooked one. `forget_compiled_code` sees to the first,
`settings` to the second.

The call of a tracer in a function that is compiled itself is a graph break there: see `outside_of_graphs`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ml_debugger import _core
from ml_debugger.errors import InvalidInputError
from ml_debugger.tracer.outputs import OutputPicker, PathKey, iterate_tensors, pick

_COMPILER = "torch._dynamo"
_numbers = itertools.count()
# Weak: a hook lives as long as it is attached, and what a user's reduction refers to is collected as ever.
_targets: weakref.WeakValueDictionary[int, _core.CaptureHook] = weakref.WeakValueDictionary()
_HAS_EXPORT_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


class _NoNameError(InvalidInputError, AttributeError):
    """Raised to torch.jit.script, which asks a hook for its name; to all others the attribute is missing."""


# The operator. Compiled code is cached on disk by operator name: another meaning needs another name.


def _capture(tensors: list[torch.Tensor], hook: int) -> None:
    target = _targets.get(hook)
    if target is not None:
        target(None, (), tensors[0] if len(tensors) == 1 else tensors)


@functools.cache
def _define_operator() -> Any:
    """Returns what keeps it defined."""
    library: Any = torch.library.Library("ml_debugger", "FRAGMENT")  # type: ignore[no-untyped-call]
    # CUDA graphs replay kernels, not what we do on the host.
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    library.define("capture(Tensor[] tensors, int hook) -> ()", tags=() if tag is None else (tag,))
    library.impl("capture", _capture, "CompositeExplicitAutograd")
    torch.library.register_fake("ml_debugger::capture", lambda tensors, hook: None, lib=library)
    _make_effectful(torch.ops.ml_debugger.capture.default)
    return library


def _make_effectful(operator: Any) -> None:
    effects: Any = importlib.import_module("torch._higher_order_ops.effects")
    if hasattr(effects, "_register_effectful_op"):
        effects._register_effectful_op(operator, effects._EffectType.ORDERED)
    else:  # torch 2.4; without it the operator is dropped, and the tracer reports a layer that did not run
        effects.SIDE_EFFECTS[operator] = effects._EffectType.ORDERED


# The hook, as the compiler and torch.jit.script see it.


def is_exporting() -> bool:
    """Whether the compiler makes an exported program. Before torch 2.7 nobody knows: it keeps our operator.

    The public `torch.compiler.is_exporting` is true for the compiler wherever it compiles, up to torch 2.9.
    """
    return _HAS_EXPORT_FLAG and torch.compiler._is_exporting_flag


def _traced_call(hook: _core.CaptureHook, module: Any, arguments: Any, *output: Any) -> None:
    """The compiler's reading of a `CaptureHook`; what depends on the call is left to the operator."""
    if is_exporting():
        return
    value = output[0] if output else arguments
    for key in hook.picks:
        value = pick(value, key, hook.alias)
    torch.ops.ml_debugger.capture.default(list(iterate_tensors(value)), hook.number)


def refuse_name(hook: Any) -> str:
    """What torch.jit.script is told that asks a hook for its name."""
    raise _NoNameError(
        f"torch.jit.script cannot take in the hook of a tracer, which watches the layer {hook.alias!r}",
        "script the model before the tracer is made or after its close()",
    )


_core.CaptureHook.extend({"__call__": _traced_call, "__name__": property(refuse_name)})


def connect(
    hook: _core.CaptureHook, alias: str, picks: tuple[PathKey, ...], target: _core.CaptureHook
) -> None:
    """Make compiled code that meets ``hook`` hand what is picked from the output to ``target``."""
    _define_operator()
    hook.alias, hook.picks, hook.number = alias, picks, next(_numbers)
    if target is not hook:
        hook.target = target  # lives as long
    _targets[hook.number] = target


# The compiler.


def is_loaded() -> bool:
    """Whether there can be compiled code; we never load the compiler, which takes a second."""
    return _COMPILER in sys.modules


def forget_compiled_code() -> None:
    """Make every compiled function of the process compile anew at its next call."""
    import torch._dynamo
    from torch._dynamo import convert_frame

    reset_code = getattr(torch._dynamo, "reset_code", None)
    if reset_code is None or not hasattr(convert_frame, "output_codes"):
        torch._dynamo.reset()  # which also forgets what it has learnt about dynamic shapes
        return
    with convert_frame.compile_lock:
        for reference in (*convert_frame.input_codes.seen, *convert_frame.output_codes.seen):
            code = reference()
            if code is not None:
                reset_code(code)


# ``outside_of_graphs(function, *arguments)`` calls a function that the compiler must not read, nor what that
# calls, except what is compiled by itself. Only the compiler can make it, so it exists from its first use on;
# the compiler itself looks an attribute of a module up as Python does.
outside_of_graphs: Callable[..., Any]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "outside_of_graphs":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        reason = "with fullgraph=True compile the model, and call its tracer in plain Python"
        takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on
        options = {"reason": reason} if takes_reason else {}
        globals()[name] = torch.compiler.disable(call_of_a_tracer, **options)
        return globals()[name]


def call_of_a_tracer(function: Callable[..., Any], *arguments: Any) -> Any:
    """Has a name that says in the compiler's messages what it is."""
    return function(*arguments)


def hide_pickers() -> None:
    """Keep the compiler from reading what our hooks call where it runs a module as it is written.

    There, such as in a recurrent layer, it looks at each Python function that begins. Only a function that it
    has marked itself is left out, so the class changes when the compiler is there. Idempotent.
    """
    written = OutputPicker.__call__
    if not hasattr(written, "__wrapped__"):
        disable: Any = torch.compiler.disable
        hidden = disable(written)
        hidden.__wrapped__ = written
        OutputPicker.__call__ = hidden  # type: ignore[method-assign]


class CompilerSettings:
    """Settings of the compiler that hold while somebody needs them; the last one to let go restores them.

    Recent versions of torch keep them for each thread, so each thread says that it needs them.
    """

    # Guards: compiled code looks whether a module has hooks.
    # DDP: the optimizer that cuts the graph of a DDP model at its gradient buckets takes the token of an
    # effect for the graph's first output (torch 2.13), and the next piece does not compile.
    _WANTED: ClassVar = {"skip_nnmodule_hook_guards": False, "optimize_ddp": False}

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._needed_by: set[int] = set()
        self._before: dict[str, Any] = {}

    def need(self, owner: object) -> None:
        """Make them hold for what the calling thread compiles."""
        import torch._dynamo.config

        config: Any = torch._dynamo.config
        with self._lock:
            present = [name for name in self._WANTED if hasattr(config, name)]
            if not self._needed_by:
                self._before = {name: getattr(config, name) for name in present}
            self._needed_by.add(id(owner))
            for name in present:
                setattr(config, name, self._WANTED[name])

    def release(self, owner: object) -> None:
        """Take one owner's need back. Idempotent."""
        with self._lock:
            if id(owner) not in self._needed_by:
                return
            self._needed_by.discard(id(owner))
            if not self._needed_by:
                for name, value in self._before.items():
                    setattr(torch._dynamo.config, name, value)


settings = CompilerSettings()
_eager_lock = threading.RLock()


def _forget_inherited() -> None:
    """In a forked child: the locks may be held by threads that do not exist here."""
    global settings, _eager_lock
    settings, _eager_lock = CompilerSettings(), threading.RLock()


os.register_at_fork(after_in_child=_forget_inherited)


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Run what is inside without compiled code, in all threads of the process; needs torch 2.6."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or not is_loaded():
        yield
    else:
        with _eager_lock, set_stance("force_eager"):
            yield
