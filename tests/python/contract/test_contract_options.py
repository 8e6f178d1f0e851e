"""Contract 2, TracerConfig: capture_dtype, reduce, repeat, batch_dim, every_n_calls, sample_fraction,
max_bytes, keep_epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import (
    Carrier,
    Net,
    Speaker,
    batch,
    by_id,
    carrier_tracer,
    carry,
    disk_bytes,
    nothing_visible,
    raw_bytes,
    refused,
    rows_of,
    same_array,
)
from torch import nn

from ml_debugger import TracerConfig, errors, open_trace


def tensors(column: str) -> dict[str, torch.Tensor]:
    return by_id(open_trace("net", "v1").tensors("extracted_feature"), column)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_capture_dtype_casts_floating_features(name: str, source: torch.dtype, make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer, config=TracerConfig(capture_dtype=name))
    payload = torch.randn(3, 5, dtype=source)
    carry(tracer, payload, ["a", "b", "c"])
    tracer.flush()
    stored = tensors("tap")
    for i, key in enumerate("abc"):
        assert stored[key].dtype is getattr(torch, name)
        assert raw_bytes(stored[key]) == raw_bytes(payload[i].to(getattr(torch, name)))


def test_capture_dtype_leaves_integers_and_labels_alone(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer, config=TracerConfig(capture_dtype="float16"))
    payload = torch.randint(-(2**60), 2**60, (3, 5))
    carry(tracer, payload, ["a", "b", "c"], ground_truth=torch.tensor([70_001, 1, 2]))
    tracer.flush()
    assert tensors("tap")["a"].dtype is torch.int64
    assert raw_bytes(tensors("tap")["b"]) == raw_bytes(payload[1])
    labels = by_id(open_trace("net", "v1").tensors("ground_truth"), "label")
    assert int(labels["a"]) == 70_001


def test_capture_dtype_does_not_change_the_users_output(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"}, config=TracerConfig(capture_dtype="bfloat16"))
    x, y, ids = batch(3)
    assert torch.equal(tracer(x, y, ids), model(x))


REDUCTIONS = {
    "mean": lambda t: t.mean((2, 3)),
    "max": lambda t: t.amax((2, 3)),
    "flatten": lambda t: t.flatten(1),
    "callable": lambda t: t[:, 0] * 2,
}


@pytest.mark.parametrize("kind", sorted(REDUCTIONS))
def test_reduce_pools_behind_the_channel_flattens_or_calls(kind: str, make_tracer: Any) -> None:
    reduce = {"tap": REDUCTIONS[kind] if kind == "callable" else kind}
    tracer = carrier_tracer(make_tracer, config=TracerConfig(reduce=reduce))
    payload = torch.randn(3, 4, 5, 6)
    carry(tracer, payload, ["a", "b", "c"])
    tracer.flush()
    stored = torch.stack([tensors("tap")[key] for key in "abc"])
    torch.testing.assert_close(stored, REDUCTIONS[kind](payload), rtol=1e-6, atol=1e-6)


def test_tokens_reduce_with_a_callable(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer, config=TracerConfig(reduce={"tap": lambda t: t.mean(1)}))
    payload = torch.randn(3, 7, 4)
    carry(tracer, payload, ["a", "b", "c"])
    tracer.flush()
    torch.testing.assert_close(torch.stack([tensors("tap")[key] for key in "abc"]), payload.mean(1))


def test_a_reduction_that_loses_the_batch_is_an_error(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer, config=TracerConfig(reduce={"tap": lambda t: t.sum()}))
    with refused(errors.MlDebuggerError) as caught:
        carry(tracer, torch.randn(3, 4), ["a", "b", "c"])
    assert "tap" in str(caught.value)
    nothing_visible(tracer)


@pytest.mark.parametrize("field", ["reduce", "batch_dim"])
def test_an_option_for_an_alias_that_does_not_exist_is_refused(
    field: str, make_tracer: Any, store: Path
) -> None:
    value = "mean" if field == "reduce" else 1
    with refused(errors.InvalidInputError) as caught:
        make_tracer(config=TracerConfig(**{field: {"hiden": value}}))
    assert "hiden" in str(caught.value)
    assert not store.exists()


class Loop(nn.Module):
    """One layer, run ``times`` times in a forward."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.times = times

    def runs(self, x: torch.Tensor) -> list[torch.Tensor]:
        seen = []
        for _ in range(self.times):
            x = self.layer(x)
            seen.append(x)
        return seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.runs(x)[-1])


def test_repeat_last_records_the_last_run(make_tracer: Any) -> None:
    model = Loop(3)
    tracer = make_tracer(model, layers={"layer": "layer"})
    x, y, ids = batch(4)
    tracer(x, y, ids)
    tracer.flush()
    assert set(open_trace("net", "v1").columns("extracted_feature")).isdisjoint({"layer.1", "layer.2"})
    stored = tensors("layer")
    assert torch.equal(torch.stack([stored[i] for i in ids]), model.runs(x)[2].detach())


def test_repeat_all_records_alias_alias_1_alias_2(make_tracer: Any) -> None:
    model = Loop(3)
    tracer = make_tracer(model, layers={"layer": "layer"}, config=TracerConfig(repeat="all"))
    x, y, ids = batch(4)
    tracer(x, y, ids)
    tracer.flush()
    for name, expected in zip(["layer", "layer.1", "layer.2"], model.runs(x), strict=True):
        assert torch.equal(torch.stack([tensors(name)[i] for i in ids]), expected.detach())


@pytest.mark.parametrize("times", [2, 4])
def test_repeat_all_needs_as_many_runs_in_every_call(times: int, make_tracer: Any) -> None:
    model = Loop(3)
    tracer = make_tracer(model, layers={"layer": "layer"}, config=TracerConfig(repeat="all"))
    tracer(*batch(4, 1))
    model.times = times
    with refused(errors.MlDebuggerError) as caught:
        tracer(*batch(4, 2))
    assert "layer" in str(caught.value)
    nothing_visible(tracer, rows=4)
    model.times = 3
    tracer(*batch(4, 3))
    nothing_visible(tracer, rows=8)


def test_batch_dim_takes_samples_along_another_dimension(make_tracer: Any) -> None:
    model = Speaker(lambda x: torch.stack([x, x * 2, x * 3, x * 4, x * 5]))
    tracer = make_tracer(model, layers={"seen": "layer"}, config=TracerConfig(batch_dim={"seen": 1}))
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    for i, key in enumerate(ids):
        assert torch.equal(tensors("seen")[key], torch.stack([x[i] * k for k in range(1, 6)]))


def test_batch_dim_beats_an_equal_dimension_0(make_tracer: Any) -> None:
    model = Speaker(lambda x: x[:3, :3].t())
    tracer = make_tracer(model, layers={"seen": "layer"}, config=TracerConfig(batch_dim={"seen": 1}))
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    assert torch.equal(torch.stack([tensors("seen")[key] for key in ids]), x[:3, :3])


def test_every_n_calls_records_calls_1_n_plus_1_and_so_on(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(every_n_calls=3))
    for i in range(8):
        tracer([batch(2)[0]], None, [f"{i}", f"{i}'"])
    tracer.flush()
    stored = open_trace("net", "v1").arrays("extracted_feature")["input_id"]
    assert sorted(stored) == sorted(f"{i}{mark}" for i in (0, 3, 6) for mark in ("", "'"))
    stats = tracer.stats()
    assert stats.rows_committed == 6 and stats.rows_discarded == stats.rows_failed == 0


def kept_ids(version: str, **kwargs: Any) -> set[str]:
    return set(map(str, open_trace("net", version).arrays("extracted_feature", **kwargs)["input_id"]))


def test_sample_fraction_keeps_the_same_ids_in_every_epoch_and_trace(make_tracer: Any) -> None:
    config = TracerConfig(sample_fraction=0.25)
    for version in ("v1", "v2"):
        tracer = make_tracer(version=version, config=config)
        for epoch in range(2):
            order = torch.randperm(1000, generator=torch.Generator().manual_seed(epoch)).tolist()
            for start in range(0, 1000, 100):
                chosen = order[start : start + 100]
                ids = chosen if version == "v1" else [str(i) for i in chosen]
                tracer(torch.zeros(100, 4), torch.zeros(100, dtype=torch.int64), ids, n_epoch=epoch)
        tracer.flush()
        stats = tracer.stats()
        assert stats.rows_discarded == stats.rows_failed == 0
    kept = kept_ids("v1", n_epoch=0)
    assert 180 < len(kept) < 320
    assert kept == kept_ids("v1", n_epoch=1) == kept_ids("v2", n_epoch=0) == kept_ids("v2", n_epoch=1)


def test_sample_fraction_keeps_the_same_ids_in_another_process(make_tracer: Any, run_child: Any) -> None:
    tracer = make_tracer(config=TracerConfig(sample_fraction=0.25))
    tracer(torch.zeros(500, 4), None, range(500))
    tracer.flush()
    run_child(
        """
        from contract_models import Net
        from ml_debugger import TracerConfig
        from ml_debugger.training import ClassificationTracer
        with ClassificationTracer(Net(seed=9), "other", "v9", {"x": "act"},
                                  config=TracerConfig(sample_fraction=0.25)) as tracer:
            tracer(torch.zeros(500, 4), None, [str(i) for i in reversed(range(500))], "val", 3)
        """,
        env={"PYTHONHASHSEED": "12345"},
    )
    elsewhere = set(map(str, open_trace("other", "v9").arrays("extracted_feature")["input_id"]))
    assert kept_ids("v1") == elsewhere and len(elsewhere) > 80


def test_sample_fraction_keeps_rows_and_labels_together(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"}, config=TracerConfig(sample_fraction=0.5))
    x, y, ids = batch(64)
    assert len(tracer(x, y, ids)) == 64
    tracer.flush()
    trace = open_trace("net", "v1")
    hidden = by_id(trace.arrays("extracted_feature"), "hidden")
    labels = by_id(trace.arrays("ground_truth"), "label")
    assert 0 < len(hidden) < 64 and set(hidden) == set(labels)
    for i, key in enumerate(ids):
        if key in hidden:
            assert same_array(hidden[key], model.body(x)[i].detach().numpy())
            assert int(labels[key]) == int(y[i])


def test_a_sample_fraction_of_1_keeps_every_sample(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(sample_fraction=1.0))
    tracer(*batch(64))
    tracer.flush()
    assert rows_of() == 64


def test_max_bytes_is_a_disk_budget_and_nothing_of_that_call_becomes_visible(
    make_tracer: Any, store: Path
) -> None:
    budget = 6 << 20
    tracer = carrier_tracer(make_tracer, config=TracerConfig(max_bytes=budget))
    accepted = 0
    with refused(errors.DiskBudgetError) as caught:
        for i in range(40):
            carry(tracer, torch.full((2, 1 << 17), float(i)), [f"{i}-0", f"{i}-1"])
            accepted += 1
            tracer.flush()
    assert isinstance(caught.value, errors.StorageError)
    assert 2 <= accepted < 6
    assert rows_of() == 2 * accepted
    assert disk_bytes(store) <= budget
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "tap")
    assert {key: float(value[-1]) for key, value in stored.items()} == {
        f"{i}-{k}": float(i) for i in range(accepted) for k in range(2)
    }


def test_dropping_an_epoch_makes_room_in_the_budget(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer, config=TracerConfig(max_bytes=6 << 20))
    payload = torch.zeros(2, 1 << 18)
    with refused(errors.DiskBudgetError):
        for i in range(10):
            carry(tracer, payload, [f"{i}a", f"{i}b"], n_epoch=0)
            tracer.flush()
    tracer.drop_epoch_data(0)
    carry(tracer, payload, ["x", "y"], n_epoch=1)
    tracer.flush()
    assert list(open_trace("net", "v1").epochs) == [1]


def test_keep_epochs_drops_older_ones_as_new_ones_begin(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(keep_epochs=2))
    for epoch in range(5):
        tracer(*batch(3), n_epoch=epoch)
        tracer(*batch(2), n_epoch=epoch)
    tracer.flush()
    trace = open_trace("net", "v1")
    assert sorted(trace.epochs) == [3, 4]
    assert trace.num_rows("extracted_feature") == 10


def test_a_reduction_sees_the_tensor_of_that_moment(make_tracer: Any) -> None:
    tracer = make_tracer(
        Carrier(), layers={"tap": "taps.of_tap"}, config=TracerConfig(reduce={"tap": lambda t: t * 1})
    )
    payload = torch.randn(3, 4)
    carry(tracer, payload, ["a", "b", "c"])
    tracer.flush()
    assert np.array_equal(torch.stack([tensors("tap")[key] for key in "abc"]).numpy(), payload.numpy())
