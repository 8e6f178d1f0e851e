"""Contract 4 and 5 at sizes where readers and exports work in pieces: columns of many megabytes, thousands of
calls, a million rows (-m soak)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, batch, by_id, carrier_tracer, carry, same_array

from ml_debugger import TracerConfig, load_export, open_trace

FLOATS = 1 << 16  # 256 KiB a row


def wide(call: int, rows: int) -> tuple[torch.Tensor, list[str]]:
    payload = torch.randn(rows, FLOATS, generator=torch.Generator().manual_seed(call))
    return payload, [f"{call}-{i}" for i in range(rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_of_many_megabytes_are_exported_and_read_in_pieces(
    dtype: torch.dtype, make_tracer: Any, tmp_path: Path
) -> None:
    tracer = carrier_tracer(make_tracer)
    for call in range(6):
        payload, ids = wide(call, 16)
        carry(tracer, payload.to(dtype), ids, n_epoch=call % 2, ground_truth=list(range(16)))
    again, ids = wide(100, 16)
    carry(tracer, again.to(dtype), [f"0-{i}" for i in range(16)], n_epoch=0)
    path = tracer.export(tmp_path / "out.zip")
    exported, trace = load_export(path), open_trace("net", "v1")
    with np.load(path, allow_pickle=False) as data:
        column = data["extracted_feature/tap"]
        plain = dict(zip(data["extracted_feature/input_id"].tolist(), column, strict=True))
    assert column.dtype == np.float32 and len(plain) == 96
    read = by_id(trace.arrays("extracted_feature", dedupe=True), "tap")
    loaded = by_id(exported.tensors("extracted_feature"), "tap")
    batches: dict[str, Any] = {}
    for part in trace.iter_batches(
        "extracted_feature", columns=["input_id", "tap"], dedupe=True, batch_size=7
    ):
        batches.update(by_id(part, "tap"))
    for call in range(6):
        payload = (again if call == 0 else wide(call, 16)[0]).to(dtype)
        for i in range(16):
            expected = payload[i].float().numpy()
            for source in (plain, read, batches):
                assert same_array(np.asarray(source[f"{call}-{i}"]), expected)
            assert loaded[f"{call}-{i}"].dtype is dtype and torch.equal(loaded[f"{call}-{i}"], payload[i])


def test_thousands_of_calls_are_read_exported_and_deduplicated(make_tracer: Any, tmp_path: Path) -> None:
    model = Net()
    for attempt in range(2):
        tracer = make_tracer(model, layers={"hidden": "body"}, config=TracerConfig(commit_interval_s=0.02))
        for call in range(1500):
            x, y, ids = batch(2, call)
            tracer(x + attempt, y, ids, n_epoch=call % 3)
        tracer.close()
    trace = open_trace("net", "v1")
    assert trace.num_rows("extracted_feature") == 6000
    assert trace.num_rows("extracted_feature", dedupe=True) == 3000
    assert trace.num_rows("ground_truth", n_epoch=2, dedupe=True) == 1000
    exported = load_export(tracer.export(tmp_path / "out.zip"))
    inputs = torch.cat([batch(2, call)[0] for call in range(1500)])
    truth = torch.cat([batch(2, call)[1] for call in range(1500)]).tolist()
    ids = [key for call in range(1500) for key in batch(2, call)[2]]
    expected = dict(zip(ids, model.body(inputs + 1).detach().numpy(), strict=True))
    for source in (trace, exported):
        hidden = by_id(source.arrays("extracted_feature", dedupe=True), "hidden")
        assert set(hidden) == set(ids)
        assert all(np.allclose(hidden[key], expected[key], atol=1e-6) for key in ids)
        labels = by_id(source.arrays("ground_truth", dedupe=True), "label")
        assert [int(labels[key]) for key in ids] == truth
    sizes = [len(part["row_id"]) for part in trace.iter_batches("extracted_feature", batch_size=1000)]
    assert sum(sizes) == 6000 and max(sizes) <= 1000


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_rows_are_deduplicated(make_tracer: Any, tmp_path: Path) -> None:
    rows, calls = 4096, 150
    x, y = torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.int64)
    for attempt in range(2):
        tracer = make_tracer(additional_fields=[{"name": "attempt", "type": "int"}])
        with torch.no_grad():
            for call in range(calls):
                tracer(x, y, range(call * rows, (call + 1) * rows), n_epoch=0, attempt=attempt)
        tracer.close()
    path = tracer.export(tmp_path / "out.zip")
    trace, exported = open_trace("net", "v1"), load_export(path)
    assert trace.num_rows("extracted_feature") == 2 * rows * calls > 1 << 20
    assert trace.num_rows("extracted_feature", dedupe=True) == rows * calls
    columns = exported.arrays("extracted_feature", columns=["input_id", "attempt"])
    assert len(np.unique(columns["input_id"])) == len(columns["attempt"]) == rows * calls
    assert columns["attempt"].min() == 1


MEMORY = """
import sys, threading
from contract_models import carrier_tracer, carry
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

def rss_anon():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])

def make(model, layers, config):
    return ClassificationTracer(model, "net", "v1", layers, config=config)

tracer = carrier_tracer(make, config=TracerConfig())
payload = torch.randn(8, 1 << 18)
for call in range(64):
    carry(tracer, payload, [f"{call}-{i}" for i in range(8)], n_epoch=0)
tracer.flush()
tracer.export(sys.argv[1], n_epoch=99)
before, peak, stop = rss_anon(), [0], threading.Event()

def watch():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], rss_anon())

watcher = threading.Thread(target=watch)
watcher.start()
tracer.export(sys.argv[1])
stop.set()
watcher.join()
print(peak[0] - before)
"""


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_an_export_of_half_a_gibibyte_needs_little_memory(run_child: Any, tmp_path: Path) -> None:
    grown_kib = int(run_child(MEMORY, tmp_path / "out.zip", deadline_s=600.0).stdout)
    assert (tmp_path / "out.zip").stat().st_size > 512 << 20
    assert 0 < grown_kib < 96 << 10
