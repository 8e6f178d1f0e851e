"""Contract 2, TracerConfig: frozen; defaults; MLD_<FIELD>, mappings as JSON; argument beats environment
beats default; data_dir; mode "disabled"; data_rank -1; refused values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_models import Net, batch, refused, rows_of

from ml_debugger import TracerConfig, errors, open_trace

DEFAULTS = {
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
    "staging_dir": None,
    "stall_timeout_s": 300,
    "close_timeout_s": 60,
}
FROM_ENVIRONMENT = {
    "mode": ("disabled", "disabled"),
    "ring_bytes": ("1048576", 1 << 20),
    "overflow": ("discard", "discard"),
    "durability": ("process", "process"),
    "commit_bytes": ("65536", 65536),
    "commit_interval_s": ("0.25", 0.25),
    "on_error": ("warn", "warn"),
    "capture_dtype": ("bfloat16", "bfloat16"),
    "reduce": ('{"hidden": "mean"}', {"hidden": "mean"}),
    "repeat": ("all", "all"),
    "batch_dim": ('{"hidden": 1}', {"hidden": 1}),
    "every_n_calls": ("3", 3),
    "sample_fraction": ("0.5", 0.5),
    "max_bytes": ("1000000", 1_000_000),
    "keep_epochs": ("2", 2),
    "device_ring_bytes": ("1048576", 1 << 20),
    "data_rank": ("-1", -1),
    "stall_timeout_s": ("1.5", 1.5),
    "close_timeout_s": ("2.5", 2.5),
}


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TracerConfig().overflow = "discard"  # type: ignore[misc]


@pytest.mark.parametrize("field", sorted(DEFAULTS))
def test_defaults(field: str) -> None:
    assert getattr(TracerConfig(), field) == DEFAULTS[field]


def test_default_data_dir_is_mld_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLD_DATA_DIR")
    assert Path(TracerConfig().data_dir) == Path("mld_data")


def test_default_ring_is_256_mib_or_an_eighth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLD_RING_BYTES")
    memory = next(
        int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line
    )
    assert 0 < TracerConfig().ring_bytes <= min(256 << 20, memory * 1024 // 8)


@pytest.mark.parametrize("field", sorted(FROM_ENVIRONMENT))
def test_every_field_reads_its_environment_variable_when_made(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = FROM_ENVIRONMENT[field]
    before = getattr(TracerConfig(), field)
    monkeypatch.setenv(f"MLD_{field.upper()}", text)
    seen = getattr(TracerConfig(), field)
    assert (dict(seen) if isinstance(value, dict) else seen) == value
    assert before != value


@pytest.mark.parametrize("field", ["data_dir", "staging_dir"])
def test_directories_come_from_the_environment(
    field: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"MLD_{field.upper()}", str(tmp_path / "elsewhere"))
    assert Path(getattr(TracerConfig(), field)) == tmp_path / "elsewhere"


def test_argument_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TracerConfig().overflow == "block"
    monkeypatch.setenv("MLD_OVERFLOW", "discard")
    assert TracerConfig().overflow == "discard"
    assert TracerConfig(overflow="raise").overflow == "raise"


def test_a_made_config_does_not_change_with_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TracerConfig()
    monkeypatch.setenv("MLD_OVERFLOW", "discard")
    assert config.overflow == "block"


def test_a_tracer_without_config_reads_the_environment(
    make_tracer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLD_EVERY_N_CALLS", "2")
    tracer = make_tracer()
    for i in range(3):
        tracer(*batch(2, i))
    tracer.flush()
    assert rows_of() == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "sometimes"),
        ("overflow", "drop"),
        ("durability", "maximum"),
        ("on_error", "ignore"),
        ("capture_dtype", "int8"),
        ("repeat", "first"),
        ("ring_bytes", 0),
        ("ring_bytes", -1),
        ("commit_bytes", 0),
        ("commit_interval_s", -1.0),
        ("every_n_calls", 0),
        ("sample_fraction", 1.5),
        ("sample_fraction", -0.1),
        ("max_bytes", -1),
        ("keep_epochs", 0),
        ("stall_timeout_s", -1),
        ("reduce", {"hidden": "median"}),
    ],
)
def test_a_value_outside_the_table_is_refused(field: str, value: Any, make_tracer: Any, store: Path) -> None:
    with refused(ValueError) as caught:
        make_tracer(config=TracerConfig(**{field: value}))
    assert field in str(caught.value)
    assert not store.exists()


@pytest.mark.parametrize("field", ["ring_bytes", "commit_interval_s", "every_n_calls", "reduce", "batch_dim"])
def test_nonsense_in_the_environment_is_refused_by_name(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MLD_{field.upper()}", "many")
    with refused(ValueError) as caught:
        TracerConfig()
    assert f"MLD_{field.upper()}" in str(caught.value)


def test_data_dir_is_where_the_trace_lives(make_tracer: Any, tmp_path: Path, store: Path) -> None:
    tracer = make_tracer(config=TracerConfig(data_dir=tmp_path / "mine"))
    tracer(*batch(3))
    tracer.flush()
    assert open_trace("net", "v1", data_dir=tmp_path / "mine").num_rows("extracted_feature") == 3
    with refused(errors.NotFoundError):
        open_trace("net", "v1")
    assert not store.exists()


def test_disabled_mode_is_the_plain_forward(make_tracer: Any, store: Path) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"}, config=TracerConfig(mode="disabled"))
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    x, y, ids = batch(3)
    assert tracer(x, y, ids) is seen[0]
    tracer.flush()
    assert rows_of() == 0
    assert tracer.stats().rows_submitted == 0
    assert not any(module._forward_hooks for name, module in model.named_modules() if name)
    assert not list(store.rglob("data.mdb"))


def test_data_rank_minus_one_records_nothing(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(data_rank=-1))
    assert tracer(*batch(3)).shape == (3, 3)
    tracer.flush()
    assert rows_of() == 0
    assert tracer.stats().rows_submitted == 0
