"""TensorBoard's embedding projector: a column of a trace as the files that it reads.

Needs neither TensorBoard nor TensorFlow. The two TSV files of an embedding also load into the projector that
stands alone in a browser.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from ml_debugger.errors import InvalidInputError
from ml_debugger.trace import Trace

__all__ = ["write_projector"]

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_TENSORS, _METADATA, _SPRITE = "tensors.tsv", "metadata.tsv", "sprite.png"
_CONFIG = "projector_config.pbtxt"
_MAX_SPRITE_PIXELS = 8192  # a side; what the projector shows


def write_projector(
    trace: Trace,
    log_dir: str | os.PathLike[str],
    column: str = "features",
    *,
    n_epoch: int | None = None,
    dataset_type: str | None = None,
    name: str | None = None,
    max_rows: int = 10_000,
    images: Callable[[str], Any] | None = None,
) -> Path:
    """Write a column of ``extracted_feature`` into a log directory of TensorBoard.

    ``tensorboard --logdir <log_dir>`` then shows it under *Projector*, beside what was written there before
    under other names. Each point has its id, dataset type and epoch, and where they are recorded its label,
    its prediction (argmax of the logits) and whether they agree. Duplicates are left out, as in an export.

    Args:
        trace: What `open_trace` or `load_export` returned.
        log_dir: Made if it is not there.
        column: An alias, or ``"logits"``. Its rows must have one shape; they are flattened and written as
            float32.
        n_epoch: None = all, -1 = rows without an epoch.
        dataset_type: None = all.
        name: What the embedding is called; one of the same name is replaced. Default the column, with the
            epoch if one is given.
        max_rows: Of more rows, so many are taken, evenly spread. Default 10,000, about what a browser copes
            with.
        images: Called with the id of each row; returns a uint8 array (H, W) or (H, W, 3), all of one shape,
            which is shown at the point. Together at most 8192 pixels wide and high.

    Returns:
        The configuration file.

    Raises:
        InvalidInputError: No such column, no rows, rows of differing shape, or images that do not fit.
    """
    rows = trace.num_rows("extracted_feature", n_epoch, dataset_type, dedupe=True)
    if rows == 0 or max_rows < 1:
        raise InvalidInputError(
            f"there are {rows} rows to write and max_rows is {max_rows}",
            "choose an epoch and a dataset_type that are recorded, and max_rows of at least 1",
        )
    name = _UNSAFE.sub("_", name or (column if n_epoch is None else f"{column}_epoch{n_epoch}"))
    folder = Path(log_dir) / f"embedding-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SPRITE).unlink(missing_ok=True)
    count = min(rows, max_rows)
    wanted = np.linspace(0, rows - 1, count).round().astype(np.int64)
    columns = list(dict.fromkeys(["row_id", "input_id", "dataset_type", "n_epoch", "logits", column]))
    recorded = trace.columns("extracted_feature")
    if column not in recorded:
        raise InvalidInputError(f"the trace has no column {column!r}, it has {recorded}", "name one of these")
    ids: list[str] = []
    with (
        open(folder / _TENSORS, "w", encoding="utf-8", newline="\n") as tensors,
        open(folder / _METADATA, "w", encoding="utf-8", newline="\n") as metadata,
    ):
        writer = _Writer(column, _labels(trace, n_epoch, dataset_type), tensors, metadata)
        first = 0
        for batch in trace.iter_batches(
            "extracted_feature",
            n_epoch,
            dataset_type,
            [one for one in columns if one in recorded],
            dedupe=True,
        ):
            length = len(batch["row_id"])
            chosen = wanted[(wanted >= first) & (wanted < first + length)] - first
            first += length
            ids += writer.write({key: values[chosen] for key, values in batch.items()})
    size = None if images is None else _write_sprite(folder / _SPRITE, [images(one) for one in ids])
    (folder / "config.json").write_text(json.dumps({"name": name, "image": size}), encoding="utf-8")
    return _write_config(Path(log_dir))


def _labels(trace: Trace, n_epoch: int | None, dataset_type: str | None) -> dict[int, int]:
    """Class by row_id; of soft labels the likeliest."""
    if not trace.num_rows("ground_truth", n_epoch, dataset_type):
        return {}
    found = trace.arrays("ground_truth", n_epoch, dataset_type, ["row_id", "label"], dedupe=True)
    labels = found["label"]
    if labels.dtype == object:
        raise InvalidInputError("the labels differ in shape", "choose an epoch or a dataset_type")
    classes = labels.argmax(axis=1) if labels.ndim == 2 else labels
    return dict(zip(found["row_id"].tolist(), classes.tolist(), strict=True))


class _Writer:
    """Writes rows as lines of the two files."""

    def __init__(self, column: str, labels: dict[int, int], tensors: TextIO, metadata: TextIO) -> None:
        self._column, self._labels, self._tensors, self._metadata = column, labels, tensors, metadata
        self._width: int | None = None
        metadata.write("input_id\tdataset_type\tn_epoch\tlabel\tprediction\tcorrect\n")

    def write(self, rows: dict[str, npt.NDArray[Any]]) -> list[str]:
        """Write some rows; returns their ids."""
        ids = [str(one) for one in rows["input_id"].tolist()]
        values = rows[self._column]
        if not ids:
            return ids
        if values.dtype == object:
            self._refuse("rows of differing shape")
        flat = values.reshape(len(ids), -1).astype(np.float32)
        self._width = self._width or flat.shape[1]
        if flat.shape[1] != self._width:
            self._refuse(f"rows of {self._width} and of {flat.shape[1]} numbers")
        lines = io.StringIO()
        np.savetxt(lines, flat, fmt="%.7g", delimiter="\t")
        self._tensors.write(lines.getvalue())
        self._write_metadata(ids, rows)
        return ids

    def _write_metadata(self, ids: list[str], rows: dict[str, npt.NDArray[Any]]) -> None:
        logits = rows.get("logits")
        is_classes = logits is not None and logits.dtype != object and logits.ndim == 2
        predictions = logits.argmax(axis=1).tolist() if logits is not None and is_classes else [""] * len(ids)
        fields = (rows[name].tolist() for name in ("row_id", "dataset_type", "n_epoch"))
        for identity, prediction, row, kind, epoch in zip(ids, predictions, *fields, strict=True):
            label = self._labels.get(row, "")
            is_known = label != "" and prediction != ""
            correct = str(label == prediction).lower() if is_known else ""
            cells = (identity, kind, "" if epoch < 0 else epoch, label, prediction, correct)
            self._metadata.write("\t".join(_cell(one) for one in cells) + "\n")

    def _refuse(self, what: str) -> None:
        raise InvalidInputError(
            f"column {self._column!r} has {what}, expected one shape",
            "choose an epoch or dataset_type with one shape, or pool the layer with TracerConfig.reduce",
        )


def _cell(value: Any) -> str:
    """A value that stays in its cell and on its line."""
    return " ".join(str(value).split())


def _write_sprite(path: Path, images: list[Any]) -> list[int]:
    """All images in one PNG, row by row in a square; returns the width and height of one."""
    arrays = [np.asarray(image) for image in images]
    shape = arrays[0].shape
    side = math.ceil(math.sqrt(len(arrays)))
    for array in arrays:
        if array.dtype != np.uint8 or array.shape != shape or shape[2:] not in ((), (3,)) or len(shape) < 2:
            raise InvalidInputError(
                f"an image has dtype {array.dtype} and shape {array.shape}, the first one shape {shape}",
                "expected uint8 arrays (H, W) or (H, W, 3), all of one shape",
            )
    height, width = shape[:2]
    if max(height, width) * side > _MAX_SPRITE_PIXELS:
        raise InvalidInputError(
            f"{len(arrays)} images of {width} x {height} pixels are more than {_MAX_SPRITE_PIXELS} a side",
            "make the images smaller, or lower max_rows",
        )
    sheet = np.zeros((side * height, side * width, 3), np.uint8)
    for number, array in enumerate(arrays):
        top, left = number // side * height, number % side * width
        sheet[top : top + height, left : left + width] = array if array.ndim == 3 else array[:, :, None]
    path.write_bytes(_png(sheet))
    return [width, height]


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    """An RGB image as a PNG file (RFC 2083), each line unfiltered."""
    height, width, _ = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(lines.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _write_config(log_dir: Path) -> Path:
    """List every embedding of the directory, in the text form of TensorBoard's ProjectorConfig."""
    blocks = []
    for path in sorted(log_dir.glob("embedding-*/config.json")):
        config, folder = json.loads(path.read_text(encoding="utf-8")), path.parent.name
        lines = [
            f'  tensor_name: "{config["name"]}"',
            f'  tensor_path: "{folder}/{_TENSORS}"',
            f'  metadata_path: "{folder}/{_METADATA}"',
        ]
        if config["image"]:
            width, height = config["image"]
            dimensions = f"single_image_dim: {width} single_image_dim: {height}"
            lines.append(f'  sprite {{ image_path: "{folder}/{_SPRITE}" {dimensions} }}')
        blocks.append("embeddings {\n" + "\n".join(lines) + "\n}\n")
    target = log_dir / _CONFIG
    temporary = target.with_suffix(".part")
    temporary.write_text("".join(blocks), encoding="utf-8")
    os.replace(temporary, target)
    return target
