"""Models and readers that the contract suite shares; imports only torch, numpy and the public package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, errors, open_trace

TABLES = ("extracted_feature", "ground_truth")
LAW = ("submitted", "committed", "discarded", "failed", "in_flight")


class Net(nn.Module):
    """Linear, in-place ReLU, Linear: 4 inputs, 6 features, 3 classes."""

    def __init__(self, features: int = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Linear(4, features)
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(features, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x)))


class Carrier(nn.Module):
    """Passes payloads of any dtype through taps, then overwrites them in place, as a careless user would."""

    def __init__(self, *taps: str) -> None:
        super().__init__()
        self.taps = nn.ModuleDict({f"of_{name}": nn.Identity() for name in taps or ("tap",)})
        self.head = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, **payloads: torch.Tensor) -> torch.Tensor:
        for name, payload in payloads.items():
            seen = self.taps[f"of_{name}"](payload.clone())
            if seen.numel():
                seen.view(torch.uint8).fill_(1)
        return self.head(x)


class Speaker(nn.Module):
    """A layer whose output is whatever ``make(x)`` gives, before a head that makes the logits."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.layer = _Calls(self)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.layer(x)
        return self.head(x)


class _Calls(nn.Module):
    def __init__(self, owner: Speaker) -> None:
        super().__init__()
        self.make = owner.make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(x)


def carry(tracer: Any, payload: torch.Tensor, ids: Any, **kwargs: Any) -> torch.Tensor:
    """One call of a tracer over ``Carrier()`` with ``payload`` behind its only tap."""
    inputs = {"x": torch.zeros(len(payload), 2), "tap": payload}
    return tracer(inputs, kwargs.pop("ground_truth", None), ids, **kwargs)


def carrier_tracer(make_tracer: Any, **kwargs: Any) -> Any:
    """A tracer over ``Carrier()`` whose only alias is ``tap``."""
    return make_tracer(Carrier(), layers={"tap": "taps.of_tap"}, **kwargs)


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Inputs, labels and unique ids of one batch for ``Net``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    y = torch.randint(0, 3, (size,), generator=generator)
    return x, y, [f"s{seed}-{i}" for i in range(size)]


def random_bits(dtype: torch.dtype, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes, NaN payloads, infinities and negative zeros included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (rows, columns), generator=generator).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (rows, columns * width), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, whatever its dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def by_id(data: Mapping[str, Any], column: str) -> dict[str, Any]:
    """``{input_id: value}`` of one column; the ids must be unique."""
    ids = [str(i) for i in data["input_id"]]
    assert len(set(ids)) == len(ids), "the helper needs unique ids"
    return dict(zip(ids, data[column], strict=True))


def rows_of(name: str = "net", version: str = "v1", table: str = "extracted_feature", **kwargs: Any) -> int:
    """Rows of a table that a new reader sees now; 0 when the trace does not exist."""
    try:
        return int(open_trace(name, version).num_rows(table, **kwargs))
    except errors.NotFoundError:
        return 0


def nothing_visible(tracer: Any, name: str = "net", version: str = "v1", rows: int = 0) -> None:
    """Assert that readers and ``stats`` know exactly ``rows`` rows."""
    tracer.flush()
    assert rows_of(name, version) == rows
    assert rows_of(name, version, "ground_truth") <= rows
    stats = tracer.stats()
    assert stats.rows_committed == rows
    assert stats.rows_in_flight == 0
    check_law(stats)


def check_law(stats: Any) -> None:
    """submitted == committed + discarded + failed + in_flight, for rows and for bytes."""
    for unit in ("rows_", "bytes_"):
        submitted, *rest = (getattr(stats, unit + word) for word in LAW)
        assert submitted == sum(rest), (
            f"{unit}submitted={submitted}, but {dict(zip(LAW[1:], rest, strict=True))}"
        )
        assert min(submitted, *rest) >= 0
    assert sum(stats.discarded_by_cause.values()) == stats.rows_discarded


@contextlib.contextmanager
def refused(*kinds: type[BaseException]) -> Iterator[Any]:
    """Like ``pytest.raises``, and the error must be one of the package's own."""
    with pytest.raises(kinds) as caught:
        yield caught
    assert isinstance(caught.value, errors.MlDebuggerError), f"{type(caught.value)} is not an error of ours"
    assert hasattr(caught.value, "hint")


def disk_bytes(folder: Path | str) -> int:
    """Bytes that the files under ``folder`` take on disk; links and vanished files count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


def same_array(left: Any, right: Any) -> bool:
    """Equal dtype, shape and values, NaN equal to NaN."""
    left, right = np.asarray(left), np.asarray(right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(np.array_equal(left, right, equal_nan=left.dtype.kind in "fc"))


RING = 1 << 20
FLOATS = 1 << 14  # 64 KiB a row


def send(tracer: Any, call: int, rows: int = 1, floats: int = FLOATS, **kwargs: Any) -> None:
    """One call whose rows all hold the number of the call."""
    carry(tracer, torch.full((rows, floats), float(call)), [f"{call}-{i}" for i in range(rows)], **kwargs)


def small_ring(**kwargs: Any) -> TracerConfig:
    """A ring of 1 MiB and quick commits."""
    return TracerConfig(ring_bytes=RING, commit_interval_s=0.05, **kwargs)
