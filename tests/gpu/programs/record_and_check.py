"""Records tensors of many kinds and reads them back; status 1 if a bit differs. Small, for a sanitizer."""

from __future__ import annotations

import sys

import torch

from patterns import DTYPES, Emitter, pattern, same_bits
from recording import recording, row_ids, stored

device = torch.device(sys.argv[1])
is_exact = True
for number, dtype in enumerate(DTYPES):
    version = f"v{number}"
    options = {"version": version, "ring_bytes": 4 << 20, "device_ring_bytes": 1 << 20}
    with recording(Emitter(), device, **options) as tracer:
        for call in range(4):
            labels = torch.arange(4, device=device)
            tracer(
                pattern((4, 37 + (call << 12)), dtype, call, device)[:, :33].contiguous(),
                labels,
                row_ids(call, 4),
            )
    calls = [pattern((4, 37 + (call << 12)), dtype, call)[:, :33] for call in range(4)]
    expected = torch.cat([call.contiguous().view(torch.uint8) for call in calls]).view(dtype)
    is_exact = is_exact and same_bits(stored("out", version), expected)
print("exact" if is_exact else "differs", flush=True)
sys.exit(0 if is_exact else 1)
