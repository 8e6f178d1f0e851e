"""Attaches the core's hooks to layers, and takes them away."""

from __future__ import annotations

import warnings

import torch
from torch.utils.hooks import RemovableHandle

from ml_debugger import _core
from ml_debugger.config import TracerConfig
from ml_debugger.tracer import compiled
from ml_debugger.tracer.call import ThreadState
from ml_debugger.tracer.head import Head
from ml_debugger.tracer.layers import Layer
from ml_debugger.tracer.outputs import CallState, OutputPicker
from ml_debugger.tracer.recording import ModelHook


class HookSet:
    """The hooks of one tracer. Refers to neither tracer nor model, so it may outlive both."""

    def __init__(self, config: TracerConfig, state: CallState) -> None:
        self._config = config
        self._state = state
        self._handles: list[RemovableHandle] = []
        self._removed = False
        self._watches_model = False
        self._knows_compiler = False

    def attach(self, recorder: _core.Recorder, layers: list[Layer]) -> None:
        """Capture the output of each layer in every call, as the column of its position.

        To be called with no layers too: code compiled from now on will look for hooks that come later.
        """
        for column, layer in enumerate(layers):
            picker = self.picker(layer.alias, layer)
            hook = _core.CaptureHook(recorder, column, picker, always_prepare=picker.always)
            target = hook
            if layer.picks:  # compiled code has done that part when it comes to us
                picker = self.picker(layer.alias)
                target = _core.CaptureHook(recorder, column, picker, always_prepare=picker.always)
            compiled.connect(hook, layer.alias, layer.picks, target)
            self._handles.append(layer.module.register_forward_hook(hook))
        self.tell_compiler()

    def attach_head(self, recorder: _core.Recorder, column: int, alias: str, head: Head) -> None:
        """Capture the input of the head in every call, before the head can change it."""
        hook = _core.CaptureHook(recorder, column, self.picker(alias), always_prepare=True)
        if self._removed:  # by another thread's close() during the call that found the head
            return
        compiled.connect(hook, alias, (), hook)
        self._handles.append(head.module.register_forward_pre_hook(hook, with_kwargs=head.by_keyword))

    def attach_model(self, model: torch.nn.Module, state: ThreadState) -> None:
        """Tell a `Recording` of the calling thread where the model begins and ends. Idempotent.

        Stays until `remove`: code that is compiled sees the same hooks in every call.
        """
        if self._watches_model or self._removed:
            return
        self._watches_model = True
        # The first to see the input, before a layer's hook, and behind those that are there the last.
        before, after = ModelHook(state, "begin"), ModelHook(state, "end")
        self._handles.append(model.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
        self._handles.append(model.register_forward_hook(after, with_kwargs=True))

    def tell_compiler(self) -> None:
        """See to it that compiled code which the calling thread runs from now on knows the hooks.

        Belongs before each forward: the compiler may have been loaded meanwhile, and each thread of it has
        its own settings. Nearly free when there is nothing to do.
        """
        if self._state.is_compiler_ready or self._removed or not compiled.is_loaded():
            return
        compiled.settings.need(self)
        if not self._knows_compiler:
            self._knows_compiler = True
            compiled.hide_pickers()
            compiled.forget_compiled_code()
        self._state.is_compiler_ready = True

    def picker(self, alias: str, layer: Layer | None = None) -> OutputPicker:
        """What turns the output of ``alias`` into the tensor to store."""
        config = self._config
        return OutputPicker(
            alias,
            self._state,
            picks=() if layer is None else layer.picks,
            batch_dim=(config.batch_dim or {}).get(alias, 0),
            reduction=(config.reduce or {}).get(alias),
            capture_dtype=config.capture_dtype,
            sampled=config.sample_fraction < 1,
        )

    def remove(self) -> None:
        """Take all hooks away, for good. Idempotent."""
        self._removed = True
        while self._handles:
            self._handles.pop().remove()
        compiled.settings.release(self)


def warn_about_fused_layers(model: torch.nn.Module, layers: list[Layer]) -> None:
    """Warn about layers that hooks change or never reach.

    Hooks switch off the fused path of ``TransformerEncoderLayer``. ``MultiheadAttention`` computes with the
    weights of its ``out_proj`` and never calls it.
    """
    hooked = {id(layer.module): layer for layer in layers}
    fused = None
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer) and fused is None:
            fused = path if any(id(inner) in hooked for inner in module.modules()) else None
        if getattr(type(module), "forward", None) is torch.nn.MultiheadAttention.forward:
            silent = [hooked[id(inner)] for inner in module.out_proj.modules() if id(inner) in hooked]
            if silent:
                warnings.warn(
                    f"layer {silent[0].alias!r} ({silent[0].path!r}) never runs: torch.nn.MultiheadAttention "
                    "computes with the weights of its out_proj and does not call it, so the first call will "
                    f"raise AliasNotCapturedError; trace the attention module itself ({path!r}): its first "
                    "output is what out_proj makes",
                    UserWarning,
                    stacklevel=5,
                )
    if fused is not None:
        warnings.warn(
            f"watching {fused or 'the model'!r} or a module inside makes this encoder layer leave "
            "its fused path in eval mode: slower, and results differ within rounding; if a "
            "TransformerEncoder hands it nested tensors there (a padding mask, without gradients), the call "
            "is refused: build that with enable_nested_tensor=False",
            UserWarning,
            stacklevel=5,
        )
