"""Layer paths: from ``{alias: "layer4.1[0]"}`` to modules and what to pick from their outputs."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ml_debugger.errors import InvalidTypeError, LayerNotFoundError
from ml_debugger.tracer.outputs import PathKey

# DDP and DataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPER_NAMES = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_KEY = r"""\[\s*(?:-?\d+|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*\]"""
_PATH = re.compile(rf"(?P<module>.*?)(?P<keys>(?:{_KEY})*)\Z", re.DOTALL)
_SUGGESTIONS = 3
_EXPORT_MODULE = "torch.export._unlift"  # where the class of exported_program.module() is made
_EXPORT_HINT = (
    "this model comes from torch.export, which inlines layers: give the tracer "
    "torch.export.unflatten(exported_program) instead of exported_program.module()"
)


@dataclass(frozen=True)
class Layer:
    """One traced layer.

    Attributes:
        alias: Name of its column.
        path: Where it is, without wrapper prefixes, with its picks; comparable between runs.
        module: The module whose output is captured.
        picks: Keys to pick from the output, outermost first.
        obstacle: Why its hook will most likely not run, and what to do about it; empty if nothing is
            known to be in the way.
    """

    alias: str
    path: str
    module: torch.nn.Module
    picks: tuple[PathKey, ...]
    obstacle: str = ""


def strip_wrappers(path: str) -> str:
    """``path`` without the components that wrappers add, wherever they stand."""
    return ".".join(part for part in path.split(".") if part not in WRAPPER_NAMES)


def resolve_layers(model: torch.nn.Module, target_layers: Mapping[str, str]) -> list[Layer]:
    """Find every layer of ``target_layers`` in ``model``.

    Raises:
        InvalidTypeError: Not a mapping of text to text.
        LayerNotFoundError: No such module; the message names the closest paths. Or a ScriptModule, of which
            torch runs no hooks.
    """
    if not isinstance(target_layers, Mapping):
        raise InvalidTypeError(
            f"target_layers must be a mapping of alias to module path, got {type(target_layers).__name__}",
            'pass for example {"features": "avgpool"}',
        )
    for alias, path in target_layers.items():
        if not isinstance(alias, str) or not isinstance(path, str):
            raise InvalidTypeError(
                f"target_layers maps {alias!r} to {path!r}, expected text to text",
                "name the module by its path in model.named_modules()",
            )
    modules = _ModuleIndex(model)
    return [modules.layer(alias, path) for alias, path in target_layers.items()]


class _ModuleIndex:
    """All modules of a model by exact path and by path without wrappers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._is_exported = any(cls.__module__ == _EXPORT_MODULE for cls in type(model).__mro__)
        # Shared modules count under each of their names.
        self._exact = dict(model.named_modules(remove_duplicate=False))
        self._stripped: dict[str, torch.nn.Module] = {}
        for path, module in self._exact.items():
            # A wrapper comes before what it wraps: the outermost one is not run again by recomputation.
            self._stripped.setdefault(strip_wrappers(path), module)

    def layer(self, alias: str, path: str) -> Layer:
        module = self._find(path)
        name: str = path
        picks: tuple[PathKey, ...] = ()
        if module is None:
            name, picks = split_picks(path)
            module = self._find(name)
        if module is None:
            raise self._not_found(alias, path, name)
        if isinstance(module, torch.jit.ScriptModule):
            raise LayerNotFoundError(
                f"target_layers[{alias!r}] = {path!r} names a ScriptModule, and torch runs no hooks on those",
                "trace the model as it was before torch.jit.script or torch.jit.trace, or a Python module "
                "around the scripted one",
            )
        stripped = strip_wrappers(name)
        recorded = stripped + "".join(f"[{key!r}]" for key in picks)
        return Layer(alias, recorded, module, picks, self._obstacle(name, stripped, module, picks))

    def _find(self, path: str) -> torch.nn.Module | None:
        exact = self._exact.get(path)
        return exact if exact is not None else self._stripped.get(strip_wrappers(path))

    def _obstacle(self, path: str, stripped: str, module: torch.nn.Module, picks: tuple[PathKey, ...]) -> str:
        """What is known to keep hooks of ``module`` from running."""
        if _has_no_forward(module):
            if self._is_exported:
                return _EXPORT_HINT
            inner = f"{stripped}.{picks[0] if picks else next(iter(module._modules), '<name>')}"
            return f"a {type(module).__name__} is not called itself: name a module in it, such as {inner!r}"
        parent = self._find(path.rpartition(".")[0]) if path else None
        if isinstance(parent, torch.nn.MultiheadAttention):
            return (
                "nn.MultiheadAttention uses the weights of this layer without calling it: trace "
                f"{stripped.rpartition('.')[0]!r} itself"
            )
        return ""

    def _not_found(self, alias: str, path: str, name: str) -> LayerNotFoundError:
        known = [candidate for candidate in self._stripped if candidate]
        wanted = strip_wrappers(name)
        close = difflib.get_close_matches(wanted, known, n=_SUGGESTIONS, cutoff=0.5)
        tail = wanted.rpartition(".")[2]
        close += [
            candidate
            for candidate in known
            if candidate.rpartition(".")[2] == tail and candidate not in close
        ]
        close += difflib.get_close_matches(
            wanted, [k for k in known if k not in close], n=_SUGGESTIONS, cutoff=0.0
        )
        listed = ", ".join(repr(candidate) for candidate in close[:_SUGGESTIONS]) or '"" (the model itself)'
        return LayerNotFoundError(
            f"target_layers[{alias!r}] = {path!r} names no module of the model; closest: {listed}",
            _EXPORT_HINT if self._is_exported else "see model.named_modules() for all paths",
        )


def _has_no_forward(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` can only raise, as for ``ModuleList`` and what torch.export leaves."""
    return getattr(module.forward, "__func__", None) is torch.nn.Module.forward


def split_picks(path: str) -> tuple[str, tuple[PathKey, ...]]:
    """Split ``encoder[0]["last"]`` into ``encoder`` and ``(0, "last")``."""
    match = _PATH.match(path)
    if match is None:  # the pattern matches any text
        return path, ()
    keys: list[Any] = [ast.literal_eval(key) for key in _split_keys(match["keys"])]
    return match["module"], tuple(keys)


def _split_keys(text: str) -> list[str]:
    return [key[1:-1].strip() for key in re.findall(_KEY, text)]
