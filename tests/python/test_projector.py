"""`write_projector`: files that TensorBoard's own projector plugin reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ml_debugger import load_export, open_trace
from ml_debugger.errors import InvalidInputError
from ml_debugger.integrations.projector import write_projector
from ml_debugger.training import ClassificationTracer

IDS = ["one\ttwo", "näme", *map(str, range(28))]
INPUTS = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 3


@pytest.fixture
def trace(data_dir: Path) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with ClassificationTracer(model, "m", "v") as tracer:
        for epoch in range(2):
            tracer(INPUTS[:20], LABELS[:20], IDS[:20], "train", epoch)
            tracer(INPUTS[20:], None, IDS[20:], "val", epoch)
        tracer(INPUTS[:20], LABELS[:20], IDS[:20], "train", 1)  # again: the same rows count once
        tracer.export(data_dir.parent / "out.zip")
    return open_trace("m", "v", data_dir=data_dir)


def lines_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_points_are_the_rows_of_an_epoch_with_label_and_prediction(trace: Any, tmp_path: Path) -> None:
    write_projector(trace, tmp_path / "logs", n_epoch=1)
    folder = tmp_path / "logs" / "embedding-features_epoch1"
    expected = trace.arrays("extracted_feature", n_epoch=1, dedupe=True)
    vectors = np.loadtxt(folder / "tensors.tsv", dtype=np.float32)
    assert np.allclose(vectors, expected["features"], rtol=1e-6)
    header, *cells = lines_of(folder / "metadata.tsv")
    assert header == ["input_id", "dataset_type", "n_epoch", "label", "prediction", "correct"]
    predictions = expected["logits"].argmax(1)
    number = {identity: place for place, identity in enumerate(IDS)}
    for one, identity, kind, prediction in zip(
        cells, expected["input_id"], expected["dataset_type"], predictions, strict=True
    ):
        label = int(LABELS[number[identity]])
        known = [str(label), str(prediction), str(label == prediction).lower()]
        assert one == [
            identity.replace("\t", " "),
            kind,
            "1",
            *(known if kind == "train" else ["", str(prediction), ""]),
        ]


def test_more_rows_than_wanted_are_thinned_out_evenly(trace: Any, tmp_path: Path) -> None:
    write_projector(trace, tmp_path, "logits", n_epoch=0, max_rows=4)
    expected = trace.arrays("extracted_feature", n_epoch=0)["logits"][[0, 10, 19, 29]]
    vectors = np.loadtxt(tmp_path / "embedding-logits_epoch0" / "tensors.tsv", dtype=np.float32)
    assert np.allclose(vectors, expected, rtol=1e-6)


def test_an_export_gives_the_same_files(trace: Any, tmp_path: Path) -> None:
    write_projector(trace, tmp_path / "a")
    write_projector(load_export(tmp_path / "out.zip"), tmp_path / "b")
    for name in ("tensors.tsv", "metadata.tsv"):
        folder = Path("embedding-features", name)
        assert (tmp_path / "a" / folder).read_bytes() == (tmp_path / "b" / folder).read_bytes()


def test_tensorboard_reads_all_embeddings_of_a_directory(trace: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_config_pb2, projector_plugin

    def image(identity: str) -> Any:
        return np.full((3, 5), IDS.index(identity), np.uint8)

    write_projector(trace, tmp_path, name='odd "name"/x', n_epoch=0, images=image)
    path = write_projector(trace, tmp_path, "logits", dataset_type="val")
    config = text_format.Parse(path.read_text(), projector_config_pb2.ProjectorConfig())
    logits, odd = config.embeddings
    assert (logits.tensor_name, odd.tensor_name) == ("logits", "odd__name__x")
    assert list(odd.sprite.single_image_dim) == [5, 3]
    tensor = projector_plugin._read_tensor_tsv_file(str(tmp_path / odd.tensor_path))
    assert tensor.shape == (30, 6)
    pixels = np.asarray(pytest.importorskip("PIL.Image").open(tmp_path / odd.sprite.image_path))
    assert pixels.shape == (6 * 3, 6 * 5, 3)
    assert pixels[3, 4].tolist() == [6] * 3  # the first image of the second row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "nothing"}, "has no column 'nothing'"),
        ({"n_epoch": 7}, "0 rows"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"images": lambda _: np.zeros((2, 2))}, "dtype float64"),
        ({"images": lambda _: np.zeros((2000, 2), np.uint8)}, "more than 8192 a side"),
    ],
)
def test_what_cannot_be_shown_is_refused(trace: Any, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        write_projector(trace, tmp_path, **options)
