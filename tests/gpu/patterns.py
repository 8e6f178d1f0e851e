"""Bytes that tell of which call and layer they are, made alike on every device, and a model that emits them.

On a device they are made by kernels on the current stream, so a copy that does not keep the order of that
stream stores something else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

# Odd multipliers of 62 bits; products wrap around, on every device alike.
_STEP, _SPREAD, _SEED = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB
_MASK = (1 << 63) - 1

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def pattern_bytes(byte_count: int, seeds: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """uint8 (seeds, byte_count): for each seed its bytes."""
    words = torch.arange(-(-byte_count // 8), dtype=torch.int64, device=device) * _STEP
    offsets = [seed * _SEED & _MASK for seed in seeds]
    if len(offsets) == 1:  # a kernel's argument: a tensor would need a copy to the device, which waits
        mixed = (words + offsets[0])[None]
    else:
        mixed = words + torch.tensor(offsets, dtype=torch.int64, device=device)[:, None]
    mixed = (mixed ^ (mixed >> 29)) * _SPREAD
    return mixed.view(torch.uint8)[:, :byte_count]


def as_dtype(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (N, bytes) as (N, elements) of ``dtype``, contiguous: any bits, but bools are 0 or 1."""
    if dtype is torch.bool:
        return (values & 1).view(torch.bool)
    return values.contiguous().view(dtype)


def pattern(
    shape: Sequence[int], dtype: torch.dtype, seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A contiguous tensor that only this seed makes."""
    byte_count = math.prod(shape) * dtype.itemsize
    return as_dtype(pattern_bytes(byte_count, [seed], device), dtype).reshape(tuple(shape))


def same_bits(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaNs too)."""
    if stored.dtype != expected.dtype or stored.shape != expected.shape:
        return False
    left, right = (value.detach().cpu().contiguous().reshape(-1) for value in (stored, expected))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


class Emitter(nn.Module):
    """Sends what it is given through a layer that a tracer can watch, then overwrites it in place.

    ``Emitter()(tensor)`` returns the logits, (B, 2) float32, of the first dimension of ``tensor``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tap = nn.Identity()
        self.forwards = 0

    def forward(self, values: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """``memory`` is what is overwritten behind the hook, ``values`` itself if it is None."""
        self.forwards += 1
        out = self.tap(values)
        spoil(out if memory is None else memory)
        return logits_of(values.shape[0], values.device)


def logits_of(batch_size: int, device: torch.device | str) -> torch.Tensor:
    """The logits of every `Emitter`: (B, 2) float32."""
    return torch.arange(2 * batch_size, dtype=torch.float32, device=device).reshape(batch_size, 2)


def spoil(tensor: torch.Tensor) -> None:
    """Overwrite every byte of a contiguous tensor, in place, on the current stream."""
    tensor.detach().reshape(-1).view(torch.uint8).fill_(0x5A)
