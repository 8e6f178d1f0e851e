"""Parameters that ``FullyShardedDataParallel`` (FSDP1) took out of their modules into one flat tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

FLAT_PARAMETER = "_flat_param"  # FSDP1's name of the flat tensor, in the module that it wraps


class OriginalParameter(NamedTuple):
    """What a parameter was before it became a part of the flat tensor: the same on every rank."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def original_parameters(model: torch.nn.Module) -> dict[int, dict[str, OriginalParameter]]:
    """The original parameters by name, by ``id`` of the module that had them; empty without FSDP1.

    FSDP1 has no public way to ask; where the private one is gone, such a model counts as what it shows.
    """
    found: dict[int, dict[str, OriginalParameter]] = {}
    for wrapper in model.modules():
        if not any(cls.__name__ == "FullyShardedDataParallel" for cls in type(wrapper).__mro__):
            continue
        flat: Any = getattr(getattr(wrapper, "_handle", None), "flat_param", None)
        if not hasattr(flat, "_param_infos"):
            continue
        originals: dict[tuple[int, str], OriginalParameter] = {}
        for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
            originals[id(info.module), info.param_name] = OriginalParameter(flat.dtype, tuple(shape))
        for shared in getattr(flat, "_shared_param_infos", ()):
            first = originals[id(shared.prim_module), shared.prim_param_name]
            originals[id(shared.module), shared.param_name] = first
        for (owner, name), original in originals.items():
            found.setdefault(owner, {})[name] = original
    return found
