"""The fingerprint tells architectures apart, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ml_debugger.tracer.fingerprint import fingerprint


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


def test_it_is_a_hex_digest_that_repeats() -> None:
    assert fingerprint(net()) == fingerprint(net())
    assert len(bytes.fromhex(fingerprint(net()))) == 32


@pytest.mark.parametrize(
    "other",
    [
        net(5),
        net().half(),
        nn.Sequential(*net(), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)),
    ],
    ids=["shape", "dtype", "module", "class", "bias"],
)
def test_another_architecture_has_another_one(other: nn.Module) -> None:
    assert fingerprint(other) != fingerprint(net())


def test_values_mode_gradients_and_wrappers_do_not_change_it() -> None:
    changed = net().eval().requires_grad_(False)
    torch.nn.init.ones_(changed[0].weight)
    assert fingerprint(changed) == fingerprint(net())
    assert fingerprint(nn.DataParallel(changed)) == fingerprint(net())
    assert fingerprint(torch.compile(changed)) == fingerprint(net())
    assert fingerprint(changed.to("meta")) == fingerprint(net())


def test_caches_that_are_not_saved_do_not_count() -> None:
    first, second = net(), net()
    first.register_buffer("cache", torch.zeros(3), persistent=False)
    second.register_buffer("cache", torch.zeros(9), persistent=False)
    assert fingerprint(first) == fingerprint(second)


def test_lazy_parameters_are_no_obstacle() -> None:
    assert fingerprint(nn.LazyLinear(3)) == fingerprint(nn.LazyLinear(3))
    assert fingerprint(nn.LazyLinear(3)) != fingerprint(nn.LazyConv2d(3, 3))
