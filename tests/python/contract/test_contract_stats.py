"""Contract 3, stats(): frozen, all fields, the conservation law at any moment from another thread, ground
truth not counted again."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract_models import batch, carrier_tracer, carry, check_law

from ml_debugger import TracerConfig, TracerStats

COUNTERS = [
    f"{unit}_{word}"
    for unit in ("rows", "bytes")
    for word in ("submitted", "committed", "discarded", "failed", "in_flight")
]
FIELDS = [
    *COUNTERS,
    "discarded_by_cause",
    "stalls",
    "stall_seconds",
    "ring_high_water_bytes",
    "commits",
    "write_throughput_bytes_per_s",
]


@pytest.mark.parametrize("field", FIELDS)
def test_every_documented_field_is_there_and_zero_at_the_start(field: str, make_tracer: Any) -> None:
    value = getattr(make_tracer().stats(), field)
    if field == "discarded_by_cause":
        assert isinstance(value, Mapping) and sum(value.values()) == 0
    elif field in COUNTERS:
        assert type(value) is int and value == 0
    else:
        assert isinstance(value, (int, float)) and value >= 0


def test_stats_are_a_frozen_tracer_stats_and_a_snapshot(make_tracer: Any) -> None:
    tracer = make_tracer()
    before = tracer.stats()
    assert isinstance(before, TracerStats)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.rows_submitted = 3
    tracer(*batch(4))
    assert before.rows_submitted == 0
    assert tracer.stats().rows_submitted == 4


def test_a_row_is_one_sample_and_ground_truth_is_not_counted_again(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(5)
    tracer(x, y, ids)
    tracer(x, None, ids)
    tracer.flush()
    stats = tracer.stats()
    assert stats.rows_submitted == stats.rows_committed == 10


def test_bytes_are_at_least_the_payload(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer)
    carry(tracer, torch.zeros(4, 1 << 16), list("abcd"))
    tracer.flush()
    stats = tracer.stats()
    assert (1 << 20) <= stats.bytes_submitted == stats.bytes_committed < (1 << 20) + 4096
    assert stats.ring_high_water_bytes >= 1 << 20
    assert stats.commits >= 1
    assert stats.write_throughput_bytes_per_s > 0


def test_each_tracer_counts_its_own_rows(make_tracer: Any) -> None:
    first, second = make_tracer(version="v1"), make_tracer(version="v2")
    first(*batch(3))
    second(*batch(5))
    assert (first.stats().rows_submitted, second.stats().rows_submitted) == (3, 5)


def test_calls_that_fail_are_not_counted_as_lost(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(3)
    with pytest.raises(ValueError):
        tracer(x, y, ids[:1])
    with pytest.raises(RuntimeError):
        tracer(torch.zeros(3, 9), y, ids)
    tracer.flush()
    stats = tracer.stats()
    assert stats.rows_discarded == stats.rows_failed == stats.rows_in_flight == stats.rows_committed == 0
    check_law(stats)


@pytest.mark.parametrize("overflow", ["block", "discard"])
def test_the_law_holds_at_any_moment_seen_from_another_thread(overflow: str, make_tracer: Any) -> None:
    config = TracerConfig(ring_bytes=1 << 20, commit_interval_s=0.01, overflow=overflow)
    tracer = carrier_tracer(make_tracer, config=config)
    stop = threading.Event()
    snapshots: list[TracerStats] = []

    def watch() -> None:
        while not stop.is_set():
            snapshots.append(tracer.stats())

    watcher = threading.Thread(target=watch)
    watcher.start()
    payload = torch.zeros(4, 1 << 12)
    for call in range(300):
        carry(tracer, payload, [f"{call}-{i}" for i in range(4)], n_epoch=call % 2)
    tracer.flush()
    stop.set()
    watcher.join()
    snapshots.append(tracer.stats())
    for stats in snapshots:
        check_law(stats)
    for word in (
        "rows_submitted",
        "rows_committed",
        "rows_discarded",
        "bytes_submitted",
        "bytes_committed",
        "commits",
    ):
        values = [getattr(stats, word) for stats in snapshots]
        assert values == sorted(values), f"{word} went backwards"
    assert snapshots[-1].rows_submitted == 1200 and snapshots[-1].rows_in_flight == 0
    assert any(0 < stats.rows_submitted < 1200 for stats in snapshots)


def test_counters_survive_a_drop(make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(3), n_epoch=0)
    tracer.drop_epoch_data(0)
    stats = tracer.stats()
    assert stats.rows_submitted == stats.rows_committed == 3
    check_law(stats)
