"""Contract 3: what is stored is what the layer returned at that moment, bit for bit, in its own dtype, read
back by our reader and, in another process, by stock lmdb and msgpack; in-place ops, views, freed memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_children import verify_segments
from contract_models import Carrier, Net, batch, by_id, carrier_tracer, carry, random_bits, raw_bytes

from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

NAMES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "complex64",
    "complex128",
    "bool",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "int8",
    "int16",
    "int32",
    "int64",
]
DTYPES = [name for name in NAMES if hasattr(torch, name)]
NUMPY_LACKS = [name for name in DTYPES if name == "bfloat16" or name.startswith("float8")]
ROWS, COLUMNS = 5, 7


@pytest.fixture(scope="module")
def payloads() -> dict[str, torch.Tensor]:
    return {name: random_bits(getattr(torch, name), ROWS, COLUMNS, seed) for seed, name in enumerate(DTYPES)}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, payloads: dict[str, torch.Tensor]) -> Iterator[Path]:
    """All dtypes in one call, each overwritten in place right behind its hook; the tracer stays open."""
    folder = tmp_path_factory.mktemp("bits")
    layers = {name: f"taps.of_{name}" for name in DTYPES}
    config = TracerConfig(data_dir=folder, ring_bytes=8 << 20)
    with ClassificationTracer(Carrier(*DTYPES), "net", "bits", layers, config=config) as tracer:
        tracer({"x": torch.zeros(ROWS, 2), **payloads}, None, list(range(ROWS)), n_epoch=0)
        tracer.flush()
        yield folder


@pytest.mark.parametrize("name", DTYPES)
def test_our_reader_gives_the_bits_of_the_eager_reference(
    name: str, recorded: Path, payloads: dict[str, torch.Tensor]
) -> None:
    data = open_trace("net", "bits", data_dir=recorded).tensors("extracted_feature", columns=["row_id", name])
    stored = data[name][torch.argsort(torch.as_tensor(data["row_id"]))]
    assert stored.dtype is getattr(torch, name)
    assert stored.shape == (ROWS, COLUMNS)
    assert raw_bytes(stored) == raw_bytes(payloads[name])


def test_stock_lmdb_and_msgpack_give_the_bits_in_another_process(
    recorded: Path, payloads: dict[str, torch.Tensor], foreign_read: Any
) -> None:
    rows = sorted(foreign_read("net", "bits", recorded)["rows"], key=lambda row: row["row_id"])
    assert len(rows) == ROWS
    for i, row in enumerate(rows):
        cells = {name: value for table, name, value in row["cells"] if table == "extracted_feature"}
        assert cells["input_id"] == str(i)
        for name in DTYPES:
            assert cells[name] == raw_bytes(payloads[name][i]), name


@pytest.mark.parametrize("name", [n for n in DTYPES if n not in NUMPY_LACKS])
def test_arrays_have_the_dtype_and_bits_where_numpy_has_a_name(
    name: str, recorded: Path, payloads: dict[str, torch.Tensor]
) -> None:
    data = open_trace("net", "bits", data_dir=recorded).arrays("extracted_feature", columns=["row_id", name])
    stored = data[name][np.argsort(data["row_id"])]
    assert stored.dtype == payloads[name].numpy().dtype
    assert stored.tobytes() == raw_bytes(payloads[name])


@pytest.mark.parametrize("name", NUMPY_LACKS)
def test_arrays_widen_to_float32_without_loss(
    name: str, recorded: Path, payloads: dict[str, torch.Tensor]
) -> None:
    data = open_trace("net", "bits", data_dir=recorded).arrays("extracted_feature", columns=["row_id", name])
    stored = data[name][np.argsort(data["row_id"])]
    expected = payloads[name].to(torch.float32).numpy()
    assert stored.dtype == np.float32
    assert np.array_equal(stored, expected, equal_nan=True)
    assert np.array_equal(np.signbit(stored[expected == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("name", DTYPES)
def test_an_export_loads_as_the_recorded_dtype(
    name: str, recorded: Path, payloads: dict[str, torch.Tensor], exported: Path
) -> None:
    from ml_debugger import load_export

    stored = load_export(exported).tensors("extracted_feature", columns=["row_id", name])
    values = stored[name][torch.argsort(torch.as_tensor(stored["row_id"]))]
    assert values.dtype is getattr(torch, name)
    expected = payloads[name]
    if name in NUMPY_LACKS:
        values, expected = values.to(torch.float32), expected.to(torch.float32)
        assert np.array_equal(values.numpy(), expected.numpy(), equal_nan=True)
    else:
        assert raw_bytes(values) == raw_bytes(expected)


@pytest.fixture(scope="module")
def exported(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bits-export")
    config = TracerConfig(data_dir=recorded, ring_bytes=8 << 20)
    layers = {name: f"taps.of_{name}" for name in DTYPES}
    with ClassificationTracer(Carrier(*DTYPES), "net", "bits", layers, config=config) as tracer:
        path = tracer.export(folder / "bits.zip")
    assert path is not None
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.complex128])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t().contiguous().t(),
        lambda t: t[:, ::2],
        lambda t: t[:, :1].expand(len(t), 4),
        lambda t: t.flip(0),
        lambda t: t.reshape(len(t), 1, -1, 1),
        lambda t: t[:, :0],
        lambda t: t[:, 0],
        lambda t: t.as_strided((len(t), 3), (t.stride(0), 2)),
    ],
    ids=["transposed", "strided", "expanded", "flipped", "4-d", "no elements", "1-d", "as_strided"],
)
def test_views_of_any_layout_are_stored_as_their_values(
    dtype: torch.dtype, view: Any, make_tracer: Any
) -> None:
    class Views(Carrier):
        def forward(self, x: torch.Tensor, **payloads: torch.Tensor) -> torch.Tensor:
            self.taps["of_tap"](view(payloads["tap"]))
            return self.head(x)

    base = random_bits(dtype, 6, 8)
    tracer = make_tracer(Views(), layers={"tap": "taps.of_tap"})
    carry(tracer, base, list("abcdef"))
    tracer.flush()
    data = open_trace("net", "v1").tensors("extracted_feature")
    stored = data["tap"][torch.argsort(torch.as_tensor(data["row_id"]))]
    assert stored.shape == view(base).shape
    assert raw_bytes(stored) == raw_bytes(view(base))


@pytest.mark.parametrize("flag", ["conj", "neg"])
def test_lazy_conjugates_and_negatives_are_stored_resolved(flag: str, make_tracer: Any) -> None:
    class Lazy(Carrier):
        def forward(self, x: torch.Tensor, **payloads: torch.Tensor) -> torch.Tensor:
            payload = payloads["tap"]
            self.taps["of_tap"](payload.conj() if flag == "conj" else payload.conj().imag)
            return self.head(x)

    base = torch.complex(torch.randn(4, 3), torch.randn(4, 3))
    tracer = make_tracer(Lazy(), layers={"tap": "taps.of_tap"})
    carry(tracer, base, list("abcd"))
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "tap")
    expected = base.conj().resolve_conj() if flag == "conj" else -base.imag
    for i, key in enumerate("abcd"):
        assert raw_bytes(stored[key].resolve_conj().resolve_neg()) == raw_bytes(expected[i].contiguous())


def test_inplace_relu_behind_the_layer_does_not_reach_the_store(make_tracer: Any) -> None:
    model = Net(64)
    tracer = make_tracer(model, layers={"before": "body", "after": "act"})
    x, y, ids = batch(32)
    tracer(x, y, ids)
    tracer.flush()
    data = open_trace("net", "v1").arrays("extracted_feature")
    before = np.stack([by_id(data, "before")[i] for i in ids])
    after = np.stack([by_id(data, "after")[i] for i in ids])
    expected = model.body(x).detach().numpy()
    assert (expected < 0).any()
    assert before.tobytes() == expected.tobytes()
    assert after.tobytes() == np.maximum(expected, 0).tobytes()


def test_memory_freed_and_reused_after_the_call_does_not_reach_the_store(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer)
    sent = {}
    for call in range(40):
        payload = random_bits(torch.float32, 8, 100, call)
        ids = [f"{call}-{i}" for i in range(8)]
        carry(tracer, payload.clone(), ids)
        sent.update({key: raw_bytes(row) for key, row in zip(ids, payload, strict=True)})
        torch.full((8, 100), float(call))
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "tap")
    assert {key: raw_bytes(value) for key, value in stored.items()} == sent


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes_make_no_difference(mode: Any, make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})
    x, y, ids = batch(4)
    with mode():
        tracer(x, y, ids)
    tracer.flush()
    stored = by_id(open_trace("net", "v1").arrays("extracted_feature"), "hidden")
    assert np.stack([stored[i] for i in ids]).tobytes() == model.body(x).detach().numpy().tobytes()


def test_autocast_stores_the_dtype_that_the_layer_returned(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})
    x, y, ids = batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tracer(x, y, ids)
        expected = model.body(x)
    tracer.flush()
    data = open_trace("net", "v1").tensors("extracted_feature")
    assert data["hidden"].dtype is torch.bfloat16 and data["logits"].dtype is output.dtype
    stored = by_id(data, "hidden")
    assert b"".join(raw_bytes(stored[i]) for i in ids) == raw_bytes(expected)


def test_tensors_from_one_byte_to_megabytes_come_back_and_the_segments_are_sound(
    make_tracer: Any, store: Path
) -> None:
    tracer = carrier_tracer(make_tracer)
    sizes = [1, 15, 16, 17, 4079, 4080, 4081, 8176, 65_536, 1_000_003]
    for size in sizes:
        carry(tracer, random_bits(torch.uint8, 1, size, size), [f"{size}"])
    tracer.close()
    trace = open_trace("net", "v1")
    stored = by_id(trace.tensors("extracted_feature"), "tap")
    for size in sizes:
        assert raw_bytes(stored[str(size)]) == raw_bytes(random_bits(torch.uint8, 1, size, size)), size
    assert verify_segments(store) >= 1
