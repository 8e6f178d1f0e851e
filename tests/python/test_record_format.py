"""`docs/record_format.md` is enough: a reader made from it alone finds what was recorded."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from format_writer import Column, FormatWriter
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

STRANGER = Path(__file__).with_name("stranger_reader.py")
MAX_LINES = 40
DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "complex64", "complex128", "bool", "uint8", "uint16", "uint32", "uint64",
    "int8", "int16", "int32", "int64",
]  # fmt: skip


def stranger(trace_dir: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Rows by table and row_id, read in a process that cannot import ml_debugger."""
    command = [sys.executable, "-I", str(STRANGER), str(trace_dir)]
    found = subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=True)
    tables: dict[str, dict[int, dict[str, Any]]] = pickle.loads(found.stdout)
    return tables


def raw(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    """One sample as the stranger sees it."""
    tensor = tensor.detach().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), data


class Cast(torch.nn.Module):
    """Gives the bits of its input in another dtype, to be overwritten in place afterwards."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = getattr(torch, dtype)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.abs() * 50
        return wide > 20 if self.dtype == torch.bool else wide.to(self.dtype)


class Bits(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.casts = torch.nn.ModuleList(Cast(dtype) for dtype in DTYPES)
        self.head = torch.nn.Linear(3, 4)
        self.expected: list[dict[str, torch.Tensor]] = []

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        expected = {}
        for dtype, cast in zip(DTYPES, self.casts, strict=True):
            output = cast(values)
            expected[dtype] = output.clone()
            output.view(torch.uint8).zero_()
        logits = self.head(values)
        self.expected.append({**expected, "logits": logits.clone()})
        return logits


def test_the_reader_is_short_and_knows_nothing_of_us() -> None:
    text = STRANGER.read_text()
    code = text[text.index("def samples") : text.index("if __name__")]
    assert len([line for line in code.splitlines() if line.strip()]) <= MAX_LINES
    assert "ml_debugger" not in text


def test_a_stranger_reads_what_the_tracer_recorded(tmp_path: Path) -> None:
    model = Bits()
    layers = {dtype: f"casts.{position}" for position, dtype in enumerate(DTYPES)}
    fields = [
        {"name": "camera", "type": "str"},
        {"name": "blob", "type": "bytes"},
        {"name": "weight", "type": "float"},
        {"name": "box", "type": "tensor"},
    ]
    boxes = [torch.arange(4.0).reshape(2, 2), torch.arange(3.0)]
    config = TracerConfig(data_dir=tmp_path)
    inputs, labels = torch.randn(3, 2, 3), torch.tensor([[0, 1], [2, 3], [1, 0]])
    with ClassificationTracer(
        model, "m", "v", layers, fields, [{"name": "soft", "type": "int"}], config=config
    ) as tracer:
        for call, epoch in enumerate([0, 1, None]):
            tracer(
                inputs[call], labels[call], [f"ä{call}", ""], "val" if call else "train", epoch,
                camera=["left", "right"], blob=[b"\0", b""], weight=0.5, box=boxes, soft=[7, -7],
            )  # fmt: skip
        tracer.flush()
        live = stranger(tracer_directory(tmp_path))
    sealed = stranger(tracer_directory(tmp_path))
    assert live == sealed
    rows = sorted(sealed["extracted_feature"].items())
    assert len(rows) == 6 and sorted(sealed["ground_truth"]) == [number for number, _ in rows]
    for position, (number, row) in enumerate(rows):
        call, sample = divmod(position, 2)
        assert row["n_epoch"] == [0, 1, None][call] and row["dataset_type"] == ("val" if call else "train")
        assert row["input_id"] == [f"ä{call}", ""][sample]
        for name, tensor in model.expected[call].items():
            assert row[name] == raw(tensor[sample]), name
        assert (row["camera"], row["blob"]) == [("left", b"\0"), ("right", b"")][sample]
        assert row["weight"] == ("float64", [], np.float64(0.5).tobytes())
        assert row["box"] == raw(boxes[sample])
        truth = sealed["ground_truth"][number]
        assert truth["label"] == raw(labels[call, sample])
        assert truth["soft"] == raw(torch.tensor([7, -7][sample]))


@pytest.mark.parametrize("dtype", [name for name in DTYPES if "int" in name])
def test_a_stranger_reads_ids_that_are_stored_as_integers(tmp_path: Path, dtype: str) -> None:
    limits = torch.iinfo(getattr(torch, dtype))
    ids = np.array([limits.min, limits.max, 7], dtype)
    model = torch.nn.Linear(2, 2)
    with ClassificationTracer(
        model, "m", "v", {"layer": ""}, config=TracerConfig(data_dir=tmp_path)
    ) as tracer:
        for given in (ids, torch.from_numpy(ids), list(map(str, ids))):
            tracer(torch.randn(3, 2), None, given, "train", 0)
    found = stranger(tracer_directory(tmp_path))["extracted_feature"]
    expected = [str(limits.min), str(limits.max), "7"] * 3
    assert [found[number]["input_id"] for number in sorted(found)] == expected
    assert open_trace("m", "v", data_dir=tmp_path).tensors("extracted_feature")["input_id"] == expected


def tracer_directory(data_dir: Path) -> Path:
    (version,) = data_dir.glob("*/*/version.json")
    return version.parent


def test_our_reader_and_the_stranger_agree_on_a_trace_written_from_the_document(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    generator = np.random.default_rng(1)
    for call in range(5):
        columns = {
            "features": Column(generator.normal(size=(3, 2)).astype("<f4")),
            "ragged": Column([np.arange(n, dtype="<i4") for n in (call, 0, 2)]),
            "camera": Column(["left"], "str", broadcast=True),
            "number": Column(np.array([call - 2], "<i2"), "str", broadcast=True),
        }
        ids = np.array([7, 8, 200], "u1") if call % 2 else ["7", "b", "c"]
        first = (call % 2) << 49 | 3 * (call // 2)
        # Every call is in two segments, as after a commit whose outcome nobody knew.
        for sequence in (call // 3, 2):
            writer.call(
                call, ids, columns, pieces=3, inline=["camera"], first_row=first,
                epoch=call % 2 or None, rank=call % 2, sequence=sequence,
            )  # fmt: skip
    rows = stranger(writer.write())["extracted_feature"]
    tensors = open_trace("model", "v1", data_dir=tmp_path).tensors("extracted_feature")
    assert sorted(rows) == sorted(tensors["row_id"].tolist()) and len(rows) == 15
    for position, number in enumerate(tensors["row_id"].tolist()):
        row = rows[number]
        assert row["input_id"] == tensors["input_id"][position]
        assert (-1 if row["n_epoch"] is None else row["n_epoch"]) == tensors["n_epoch"][position]
        assert row["features"] == raw(tensors["features"][position])
        assert row["ragged"] == raw(tensors["ragged"][position])
        assert row["camera"] == tensors["camera"][position] == "left"
        assert row["number"] == tensors["number"][position]
    assert set(tensors["input_id"]) == {"7", "8", "200", "b", "c"}
    assert set(tensors["number"]) == {"-2", "-1", "0", "1", "2"}
