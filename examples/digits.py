"""Train a small CNN on handwritten digits, record what it computes for every image, and read the record back.

Run it with `make demo`, or with `python examples/digits.py` where ml-debugger and scikit-learn are installed.
The data are the 1797 images of 8 x 8 pixels that come with scikit-learn, so nothing is downloaded.

To trace a training loop of your own, three things are new. They are marked (1), (2) and (3) below:

1. make a `ClassificationTracer` around the model;
2. call the tracer where the loop called the model;
3. export the trace, or read it in place.

It ends with a report on the trace: one HTML file, to look at in a browser.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import InvalidInputError
from ml_debugger.report import write_report
from ml_debugger.training import ClassificationTracer

MODEL_NAME, VERSION_NAME = "digits_cnn", "v1"
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BATCH_SIZE = 64
SEED = 0


class DigitCNN(nn.Module):
    """Two convolutions, one hidden layer, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(inplace=True))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.conv(images)))


class Accuracy(NamedTuple):
    """Right answers of one split in one epoch."""

    correct: int
    samples: int

    @property
    def share(self) -> float:
        return self.correct / self.samples

    def __str__(self) -> str:
        return f"{self.correct} / {self.samples} = {self.share:.2%}"


Accuracies = dict[tuple[str, int], Accuracy]  # by (dataset_type, n_epoch)


def digit_loaders() -> dict[str, DataLoader]:
    """Batches of (images, labels, positions in the data set), by split."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (N, 1, 8, 8), 0 to 1
    labels = torch.tensor(digits.target, dtype=torch.int64)
    positions = torch.arange(len(labels))
    train, val = train_test_split(positions, test_size=0.25, random_state=SEED, stratify=labels)
    return {
        split: DataLoader(
            TensorDataset(images[chosen], labels[chosen], positions[chosen]),
            batch_size=BATCH_SIZE,
            shuffle=split == "train",
            generator=torch.Generator().manual_seed(SEED),
        )
        for split, chosen in (("train", train), ("val", val))
    }


def run_epoch(
    tracer: ClassificationTracer,
    loader: DataLoader,
    split: str,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    progress: tqdm,
) -> Accuracy:
    """Go through one split once; train if it is the training split. Returns what the loop itself saw."""
    is_training = split == "train"
    tracer.model.train(is_training)
    correct = samples = 0
    for images, labels, positions in loader:
        with torch.set_grad_enabled(is_training):
            logits = tracer(  # (2) in place of model(images)
                images,
                labels,
                input_ids=positions,
                dataset_type=split,
                n_epoch=epoch,
                ink=images.mean(dim=(1, 2, 3)),
                digit_name=[DIGIT_NAMES[label] for label in labels],
            )
        if is_training:
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
        correct += int((logits.argmax(dim=1) == labels).sum())
        samples += len(labels)
        progress.update()
    return Accuracy(correct, samples)


def train(tracer: ClassificationTracer, epochs: int) -> Accuracies:
    """Train and validate for some epochs; returns the accuracies that the loop saw."""
    loaders = digit_loaders()
    optimizer = torch.optim.Adam(tracer.model.parameters(), lr=2e-3)
    seen: Accuracies = {}
    with tqdm(total=epochs * sum(map(len, loaders.values())), desc="training", unit="batch") as progress:
        for epoch in range(epochs):
            for split, loader in loaders.items():
                seen[split, epoch] = run_epoch(tracer, loader, split, epoch, optimizer, progress)
            progress.set_postfix(epoch=epoch, val_accuracy=f"{seen['val', epoch].share:.1%}")
    return seen


def accuracies_in(archive_path: Path) -> Accuracies:
    """Recompute every accuracy from the stored logits and labels. Needs numpy alone."""
    with np.load(archive_path) as archive:
        logits = archive["extracted_feature/logits"]
        labels = archive["ground_truth/label"]
        splits = archive["ground_truth/dataset_type"]
        epochs = archive["ground_truth/n_epoch"]
        # Rows of the two tables belong together by row_id. Every call had labels here: they are the same.
        if not np.array_equal(archive["extracted_feature/row_id"], archive["ground_truth/row_id"]):
            sys.exit("FAILED: some rows of the export have features and no label")
    is_correct = logits.argmax(axis=1) == labels
    found: Accuracies = {}
    for split in np.unique(splits):
        for epoch in np.unique(epochs[splits == split]):
            chosen = (splits == split) & (epochs == epoch)
            found[str(split), int(epoch)] = Accuracy(int(is_correct[chosen].sum()), int(chosen.sum()))
    return found


def disk_bytes(data_dir: Path) -> int:
    """Bytes that the traces in a data directory take on disk."""
    return sum(path.stat().st_blocks * 512 for path in data_dir.rglob("*.mdb"))


def dtype_and_shape(values: Tensor | list) -> str:
    """What one row of a column is."""
    if isinstance(values, list):
        return "text"
    dtype, shape = str(values.dtype).removeprefix("torch."), tuple(values.shape[1:])
    return f"{dtype} {shape}" if shape else dtype


def print_recorded(tracer: ClassificationTracer, data_dir: Path) -> None:
    """Say which rows and columns there are, and that nothing was lost."""
    trace = open_trace(MODEL_NAME, VERSION_NAME, data_dir=data_dir)  # as any other process can, now or later
    print(f"\nRecorded in {data_dir}: model {MODEL_NAME}, version {VERSION_NAME}, epochs {trace.epochs}")
    for table in ("extracted_feature", "ground_truth"):
        print(f"  {table}, {trace.num_rows(table)} rows")
        for name, values in trace.tensors(table, n_epoch=0, dataset_type="val").items():
            print(f"    {name:12s}  {dtype_and_shape(values)}")
    stats = tracer.stats()
    print(
        f"  {stats.rows_submitted} rows submitted: {stats.rows_committed} committed, "
        f"{stats.rows_discarded} discarded, {stats.rows_failed} failed, {stats.rows_in_flight} in flight"
    )


def print_comparison(seen: Accuracies, stored: Accuracies) -> bool:
    """Show both accuracies of every epoch; returns whether all agree."""
    print(f"\n  epoch  split  {'seen by the loop':>21s}  {'from the export':>21s}")
    for (split, epoch), accuracy in seen.items():
        found = stored.get((split, epoch), "no rows")
        verdict = "equal" if found == accuracy else "DIFFERENT"
        print(f"  {epoch:5d}  {split:5s}  {accuracy!s:>21s}  {found!s:>21s}  {verdict}")
    return stored == seen


def report_in(folder: Path, data_dir: Path) -> str:
    """Write the report into ``folder``; returns a line that says where it is, or why there is none."""
    try:
        path = write_report(open_trace(MODEL_NAME, VERSION_NAME, data_dir=data_dir), folder)
    except InvalidInputError as error:  # a package of the extra is missing
        return f"No report: {error}"
    return f"Report, to be opened in a browser: {path}"


def print_drop(tracer: ClassificationTracer, epoch: int, data_dir: Path) -> None:
    """Delete one epoch; its rows and its disk space are gone when the call returns."""
    trace = open_trace(MODEL_NAME, VERSION_NAME, data_dir=data_dir)

    def show(moment: str) -> None:
        rows = trace.num_rows("extracted_feature")
        megabytes = disk_bytes(data_dir) / 1e6
        print(f"  {moment:7s} {rows:6d} rows, {megabytes:6.2f} MB on disk, epochs {trace.epochs}")

    print(f"\nDropping epoch {epoch}")
    show("before:")
    dropped = tracer.drop_epoch_data(epoch)
    show("after:")
    print(f"  rows deleted: {dropped}")


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description="Trace a small CNN while it learns scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=5, help="how long to train (default: %(default)s)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=TracerConfig().data_dir,
        help="where the trace goes (default: MLD_DATA_DIR, else mld_data)",
    )
    parser.add_argument(
        "--output", type=Path, help="the exported ZIP, or a directory for it (default: DATA_DIR/exports)"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {arguments.epochs}")
    return arguments


def main() -> None:
    """Train, record, export, check, report, drop."""
    arguments = parse_arguments()
    data_dir: Path = arguments.data_dir
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # enough for images this small, and sums come out the same on every run
    with ClassificationTracer(  # (1) around the model
        DigitCNN(),
        MODEL_NAME,
        VERSION_NAME,
        target_layers={"conv": "conv", "hidden": "hidden"},
        additional_fields=[{"name": "ink", "type": "float"}],
        additional_label_fields=[{"name": "digit_name", "type": "str"}],
        force_table_recreate=True,  # every run of this program starts from empty tables
        config=TracerConfig(data_dir=data_dir),
    ) as tracer:
        seen = train(tracer, arguments.epochs)
        tracer.wait_for_save()  # raises if a row was lost
        print_recorded(tracer, data_dir)

        archive_path = tracer.export(arguments.output or data_dir / "exports")  # (3)
        print(f"\nExported to {archive_path}, {archive_path.stat().st_size / 1e6:.2f} MB")
        all_equal = print_comparison(seen, accuracies_in(archive_path))
        report = report_in(archive_path.parent, data_dir)
        print_drop(tracer, epoch=0, data_dir=data_dir)
    if not all_equal:
        sys.exit("FAILED: the export and the training loop disagree")
    print("\nAll accuracies recomputed from the stored logits and labels equal what the loop saw.")
    print(report)


if __name__ == "__main__":
    main()
