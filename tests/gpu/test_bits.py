"""What is stored is what the layer returned, bit for bit, whatever happens to the memory afterwards."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from patterns import DTYPES, Emitter, as_dtype, logits_of, pattern, pattern_bytes, same_bits, spoil
from recording import recording, row_ids, stored

CAPTURES = 100_000
BATCH_SIZE = 4
# Bytes a sample: a cache line and less, odd numbers of elements, pages and a bit.
CHURNED_DTYPES = [dtype for dtype in DTYPES if dtype is not torch.bool]
ROW_BYTES = (8, 16, 24, 40, 64, 136, 264, 512, 1000, 1032, 2048, 2056, 4096, 4104, 8192, 16400)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_dtype_is_stored_bit_for_bit_despite_an_in_place_op(
    device: torch.device, dtype: torch.dtype
) -> None:
    model = Emitter()
    with recording(model, device) as tracer:
        for call in range(20):
            tracer(pattern((6, 35), dtype, call, device), None, row_ids(call, 6))
    expected = torch.cat([pattern((6, 35), dtype, call).view(torch.uint8) for call in range(20)]).view(dtype)
    assert same_bits(stored("out"), expected)


def views(name: str, seed: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor (8, ...) that is not dense, and the dense memory that it shows."""
    base = pattern((8, 12, 10), torch.float32, seed, device)
    view = {
        "transposed": lambda: base.transpose(1, 2),
        "strided": lambda: base[:, ::3, 1::2],
        "channels_last": lambda: base.reshape(8, 4, 3, 10).permute(0, 3, 1, 2),
        "expanded": lambda: base[:, :1, :1].expand(8, 5, 7),
        "offset": lambda: base[:, 3:, :],
        "dense, at an odd address": lambda: base.reshape(-1)[1 : 1 + 8 * 7].reshape(8, 7),
    }[name]()
    return view, base


@pytest.mark.parametrize(
    "name", ["transposed", "strided", "channels_last", "expanded", "offset", "dense, at an odd address"]
)
def test_outputs_that_are_not_dense_are_stored_as_they_look(device: torch.device, name: str) -> None:
    with recording(Emitter(), device) as tracer:
        for call in range(20):
            view, memory = views(name, call, device)
            tracer((view, memory), None, row_ids(call, 8))
    expected = torch.cat([views(name, call, "cpu")[0] for call in range(20)])
    assert same_bits(stored("out"), expected)


@pytest.mark.parametrize(
    ("row_bytes", "calls"),
    [(1, 50), (4095, 30), (1 << 20, 12), (5 << 20, 6), (24 << 20, 3), (100 << 20, 2)],
    ids=lambda value: str(value),
)
def test_sizes_from_one_byte_to_more_than_both_rings(
    device: torch.device, row_bytes: int, calls: int
) -> None:
    options = {"ring_bytes": 16 << 20, "device_ring_bytes": 4 << 20, "durability": "process"}
    with recording(Emitter(), device, **options) as tracer:
        for call in range(calls):
            tracer(pattern((1, row_bytes), torch.uint8, call, device), None, [f"{call}"])
    values = stored("out")
    for call in range(calls):
        assert same_bits(values[call : call + 1], pattern((1, row_bytes), torch.uint8, call))


@pytest.mark.cuda_only
def test_outputs_of_side_streams_are_stored_as_those_streams_left_them(device: torch.device) -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    with recording(Emitter(), device) as tracer:
        for call in range(60):
            with torch.cuda.stream(streams[call % 3]):
                torch.cuda._sleep(2_000_000)  # the stream runs late, the host does not
                tracer(pattern((4, 1 << 16), torch.float32, call, device), None, row_ids(call, 4))
    expected = torch.cat([pattern((4, 1 << 16), torch.float32, call) for call in range(60)])
    assert same_bits(stored("out"), expected)


class Churning(nn.Module):
    """Many layers in one call; behind each hook the output is overwritten, freed, and its memory taken."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.taps = nn.ModuleList(nn.Identity() for _ in ROW_BYTES)
        self.random = random.Random(0)
        self.kept: list[torch.Tensor] = []

    def forward(self, call: int) -> torch.Tensor:
        for layer, (tap, row_bytes) in enumerate(zip(self.taps, ROW_BYTES, strict=True)):
            dtype = CHURNED_DTYPES[layer % len(CHURNED_DTYPES)]
            raw = pattern_bytes(BATCH_SIZE * row_bytes, [seed_of(call, layer)], self.device)
            out = tap(as_dtype(raw, dtype).reshape(BATCH_SIZE, -1))
            if layer % 2 == 0:
                spoil(out)
            del out, raw
            self.take_memory(BATCH_SIZE * row_bytes)
        return logits_of(BATCH_SIZE, self.device)

    def take_memory(self, byte_count: int) -> None:
        """Very likely what the output had, and of other sizes too, so that blocks split and merge."""
        torch.full((byte_count,), 0xA5, dtype=torch.uint8, device=self.device)
        if self.random.random() < 0.1:
            other = self.random.choice([512, 5000, 70_000, 1 << 20])
            self.kept.append(torch.full((other,), 0xC3, dtype=torch.uint8, device=self.device))
        if len(self.kept) > 20:
            self.kept.pop(self.random.randrange(20))


def seed_of(call: int, layer: int) -> int:
    return call * len(ROW_BYTES) + layer


@pytest.mark.timeout(280)
def test_100_000_captures_with_churn_in_place_ops_and_streams(device: torch.device, share: float) -> None:
    calls = int(CAPTURES / len(ROW_BYTES) * share)
    layers = {f"layer{number}": f"taps.{number}" for number in range(len(ROW_BYTES))}
    is_cuda = device.type == "cuda"
    streams = [torch.cuda.default_stream()] + [torch.cuda.Stream() for _ in range(3)] if is_cuda else []
    model = Churning(device)
    # A small device ring: both ways over it, and the one for want of room, are taken.
    options = {"device_ring_bytes": 1 << 20, "durability": "process", "commit_interval_s": 0.1}
    with recording(model, device, layers, **options) as tracer:
        for call in range(calls):
            ids = row_ids(call, BATCH_SIZE)
            if is_cuda:
                with torch.cuda.stream(streams[call // 7 % 4]):
                    tracer(call, None, ids)
            else:
                tracer(call, None, ids)
    for layer, row_bytes in enumerate(ROW_BYTES):
        check_column(layer, row_bytes, calls)


def check_column(layer: int, row_bytes: int, calls: int) -> None:
    values = stored(f"layer{layer}")
    step = 500
    for first in range(0, calls, step):
        numbers = range(first, min(first + step, calls))
        expected = pattern_bytes(BATCH_SIZE * row_bytes, [seed_of(call, layer) for call in numbers], "cpu")
        rows = values[first * BATCH_SIZE : (first + len(numbers)) * BATCH_SIZE]
        found = rows.contiguous().view(torch.uint8)
        assert torch.equal(found.reshape(len(numbers), -1), expected), f"layer {layer}, calls from {first}"
