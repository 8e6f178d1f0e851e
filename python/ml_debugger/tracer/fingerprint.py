"""Digest of a model's architecture: tells whether a trace belongs to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ml_debugger.tracer.flat_parameters import FLAT_PARAMETER, OriginalParameter, original_parameters
from ml_debugger.tracer.layers import WRAPPER_NAMES, strip_wrappers
from ml_debugger.tracer.outputs import dtype_name


def fingerprint(model: torch.nn.Module) -> str:
    """Return a SHA-256 hex digest of the model's structure.

    It covers the class of every module and the global name, shape and dtype of every parameter and persistent
    buffer, all without wrapper prefixes. Values, device, train/eval mode, ``requires_grad``, wrappers,
    sharding and scripting do not change it. A lazy parameter has no shape before the first forward and one
    afterwards: run a batch through such a model before it is traced, if the trace will be opened again.
    """
    digest = hashlib.sha256()
    for line in sorted(set(_lines(model))):
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _lines(model: torch.nn.Module) -> Iterator[str]:
    originals = original_parameters(model)
    for path, module in model.named_modules(remove_duplicate=False):
        name = strip_wrappers(path)
        if not is_wrapper(module):
            yield json.dumps(["module", name, class_name(module)])
        parameters: dict[str, Any] = {
            key: parameter
            for key, parameter in module._parameters.items()
            if parameter is not None and not (originals and key == FLAT_PARAMETER)
        }
        for key, parameter in (parameters | originals.get(id(module), {})).items():
            yield _tensor_line("parameter", _join(name, key), parameter)
        for key, buffer in module._buffers.items():
            # The others are caches, which may grow during a run.
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield _tensor_line("buffer", _join(name, key), buffer)


def _tensor_line(kind: str, name: str, tensor: torch.Tensor | OriginalParameter) -> str:
    shape = None if isinstance(tensor, torch.Tensor) and is_lazy(tensor) else list(tensor.shape)
    return json.dumps([kind, name, dtype_name(tensor.dtype), shape])


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether ``module`` only wraps another one, as DDP, ``torch.compile`` and the like do."""
    children = [name for name, _ in module.named_children()]
    return len(children) == 1 and children[0] in WRAPPER_NAMES and not module._parameters


def class_name(module: torch.nn.Module) -> str:
    """Name of the module's class as the user wrote it.

    Without what ``fully_shard`` and ``replicate`` mix in; of a lazy module what it becomes; of a scripted one
    what it was.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return str(module.original_name)
    cls = type(module)
    mixed_in, *rest = cls.__bases__
    if len(rest) == 1 and mixed_in.__module__.startswith("torch.distributed."):
        cls = rest[0]
    lazy_target = getattr(cls, "cls_to_become", None)
    return str((lazy_target or cls).__name__)
