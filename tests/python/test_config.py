"""`TracerConfig`: argument beats environment beats default, and every field is checked."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ml_debugger import memory
from ml_debugger.config import TracerConfig
from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.job import process_rank

DEFAULTS = {
    "data_dir": Path("mld_data"),
    "mode": "enabled",
    "overflow": "block",
    "durability": "power",
    "commit_bytes": 32 << 20,
    "commit_interval_s": 0.5,
    "on_error": "raise",
    "capture_dtype": None,
    "reduce": None,
    "repeat": "last",
    "batch_dim": None,
    "every_n_calls": 1,
    "sample_fraction": 1.0,
    "max_bytes": None,
    "keep_epochs": None,
    "device_ring_bytes": 64 << 20,
    "staging_dir": None,
    "data_rank": 0,
    "stall_timeout_s": 300.0,
    "close_timeout_s": 60.0,
}

FROM_ENVIRONMENT = {
    "data_dir": ("/somewhere", Path("/somewhere")),
    "mode": ("disabled", "disabled"),
    "ring_bytes": ("4096", 4096),
    "overflow": ("discard", "discard"),
    "durability": ("process", "process"),
    "commit_bytes": ("1000", 1000),
    "commit_interval_s": ("0.25", 0.25),
    "on_error": ("warn", "warn"),
    "capture_dtype": ("bfloat16", "bfloat16"),
    "reduce": ('{"a": "mean"}', {"a": "mean"}),
    "repeat": ("all", "all"),
    "batch_dim": ('{"a": 1}', {"a": 1}),
    "every_n_calls": ("7", 7),
    "sample_fraction": ("0.5", 0.5),
    "max_bytes": ("123", 123),
    "keep_epochs": ("2", 2),
    "device_ring_bytes": ("99", 99),
    "staging_dir": ("/fast", Path("/fast")),
    "data_rank": ("-1", -1),
    "stall_timeout_s": ("1", 1.0),
    "close_timeout_s": ("2.5", 2.5),
}


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_default(name: str) -> None:
    assert getattr(TracerConfig(), name) == DEFAULTS[name]


def test_every_field_is_covered_here() -> None:
    names = {field.name for field in dataclasses.fields(TracerConfig)}
    assert names == set(FROM_ENVIRONMENT) == {*DEFAULTS, "ring_bytes"}


@pytest.mark.parametrize("name", sorted(FROM_ENVIRONMENT))
def test_environment_beats_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = FROM_ENVIRONMENT[name]
    monkeypatch.setenv(f"MLD_{name.upper()}", text)
    assert getattr(TracerConfig(), name) == value


def test_argument_beats_environment_even_if_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLD_CAPTURE_DTYPE", "float16")
    monkeypatch.setenv("MLD_EVERY_N_CALLS", "3")
    config = TracerConfig(capture_dtype=None, every_n_calls=5)
    assert (config.capture_dtype, config.every_n_calls) == (None, 5)


@pytest.mark.parametrize("name", ["RING_BYTES", "COMMIT_INTERVAL_S", "REDUCE", "OVERFLOW", "SAMPLE_FRACTION"])
def test_garbage_in_the_environment_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MLD_{name}", "{garbage")
    with pytest.raises(InvalidInputError, match=f"MLD_{name}"):
        TracerConfig()


WRONG_TYPES: list[dict[str, Any]] = [
    {"data_dir": 3},
    {"mode": True},
    {"ring_bytes": "many"},
    {"ring_bytes": 1.5},
    {"commit_bytes": True},
    {"commit_interval_s": "soon"},
    {"sample_fraction": True},
    {"reduce": ["a"]},
    {"reduce": {"a": 3}},
    {"reduce": {1: "mean"}},
    {"batch_dim": {"a": 1.0}},
    {"batch_dim": {"a": True}},
    {"max_bytes": "1G"},
    {"capture_dtype": 16},
    {"data_rank": 0.0},
]
WRONG_VALUES: list[dict[str, Any]] = [
    {"data_dir": ""},
    {"mode": "on"},
    {"ring_bytes": 0},
    {"overflow": "drop"},
    {"durability": "none"},
    {"commit_bytes": -1},
    {"commit_interval_s": 0},
    {"commit_interval_s": float("nan")},
    {"on_error": "ignore"},
    {"capture_dtype": "float32"},
    {"reduce": {"a": "sum"}},
    {"repeat": "first"},
    {"every_n_calls": 0},
    {"sample_fraction": 0.0},
    {"sample_fraction": 1.1},
    {"max_bytes": 0},
    {"keep_epochs": 0},
    {"data_rank": -2},
    {"data_rank": 1 << 14},
    {"stall_timeout_s": -1},
    {"close_timeout_s": float("inf")},
]


@pytest.mark.parametrize("arguments", WRONG_TYPES, ids=str)
def test_wrong_type_is_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidTypeError, match=next(iter(arguments))):
        TracerConfig(**arguments)


@pytest.mark.parametrize("arguments", WRONG_VALUES, ids=str)
def test_wrong_value_is_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        TracerConfig(**arguments)


def test_it_is_frozen_and_picklable_and_copies_mappings() -> None:
    reduce: dict[str, Any] = {"a": "max"}
    config = TracerConfig(reduce=reduce)
    reduce["b"] = "mean"
    assert config.reduce == {"a": "max"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mode = "disabled"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_torch_dtype_names_itself() -> None:
    assert TracerConfig(capture_dtype=torch.bfloat16).capture_dtype == "bfloat16"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("usable", "expected"), [(1 << 40, 256 << 20), (800 << 20, 100 << 20), (None, 256 << 20)]
)
def test_ring_takes_at_most_an_eighth_of_usable_memory(
    usable: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLD_RING_BYTES")
    monkeypatch.setattr("ml_debugger.config.usable_memory_bytes", lambda: usable)
    assert TracerConfig().ring_bytes == expected


def test_smallest_cgroup_limit_on_the_way_up_binds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000000\n")
    (inner / "memory.max").write_text("max\n")
    cgroup = tmp_path / "cgroup"
    cgroup.write_text("0::/job/step\n")
    monkeypatch.setattr(memory, "_CGROUP_ROOT", tmp_path)
    real_path = memory.Path
    monkeypatch.setattr(
        memory, "Path", lambda text: cgroup if text == "/proc/self/cgroup" else real_path(text)
    )
    assert memory.usable_memory_bytes() == 1_000_000


def test_rank_comes_from_the_environment_as_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TracerConfig()
    assert (config.data_rank, config.rank) == (0, 0)
    monkeypatch.setenv("RANK", "3")
    assert (config.rank, TracerConfig().data_rank, process_rank()) == (3, 3, 3)
    assert TracerConfig(data_rank=1).rank == 1
