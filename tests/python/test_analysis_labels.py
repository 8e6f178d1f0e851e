"""Flipped labels are found: on scikit-learn's digits, with and without cleanlab."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.analysis.labels import confident_issues, judge_labels
from ml_debugger.trace import Trace
from ml_debugger.training import ClassificationTracer

pytest.importorskip("pandas")
datasets = pytest.importorskip("sklearn.datasets")

FLIPPED_SHARE, LISTED_SHARE, FOUND_SHARE = 0.03, 0.06, 0.8
SEEDS = (0, 1, 2)
HAS_CLEANLAB = importlib.util.find_spec("cleanlab") is not None


def record_with_flips(data_dir: Path, seed: int, epochs: int = 6) -> tuple[Trace, set[str]]:
    """Train on digits of which some have wrong labels; returns the trace and the ids of those."""
    generator = np.random.default_rng(seed)
    digits = datasets.load_digits()
    flipped = generator.choice(len(digits.target), round(FLIPPED_SHARE * len(digits.target)), replace=False)
    labels = digits.target.copy()
    labels[flipped] = (labels[flipped] + generator.integers(1, 10, len(flipped))) % 10
    images, truth = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    splits = {"train": order[: len(order) * 3 // 4], "val": order[len(order) * 3 // 4 :]}
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    config = TracerConfig(data_dir=data_dir)
    with ClassificationTracer(model, "digits", f"v{seed}", {"hidden": "1"}, config=config) as tracer:
        for epoch in range(epochs):
            for split, chosen in splits.items():
                for rows in chosen[torch.randperm(len(chosen))].split(64):
                    logits = tracer(images[rows], truth[rows], rows, split, epoch)
                    if split == "train":
                        optimizer.zero_grad()
                        nn.functional.cross_entropy(logits, truth[rows]).backward()
                        optimizer.step()
    return open_trace("digits", f"v{seed}", data_dir), set(map(str, flipped.tolist()))


@pytest.fixture(scope="module", params=SEEDS)
def flipped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trace, set[str]]:
    return record_with_flips(tmp_path_factory.mktemp("flipped"), request.param)


@pytest.mark.parametrize(
    "cleanlab",
    [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_CLEANLAB, reason="needs cleanlab"))],
)
def test_four_of_five_flipped_labels_are_in_the_first_six_percent(
    flipped: tuple[Trace, set[str]], cleanlab: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cleanlab:
        hide_cleanlab(monkeypatch)
    trace, wrong = flipped
    analysis = trace.analysis
    frame = analysis.label_issues()
    assert len(frame) == 1797 and frame["score"].is_monotonic_increasing
    listed = set(frame["input_id"][: int(LISTED_SHARE * len(frame))])
    assert len(listed & wrong) >= FOUND_SHARE * len(wrong)
    found = set(frame["input_id"][frame["is_issue"].astype(bool)])
    assert len(found & wrong) >= 0.5 * len(wrong) and len(found) < 0.1 * len(frame)
    assert ("cleanlab 2" in analysis.rank_labels(None)[1]) == cleanlab
    # What is suggested for a flipped label is mostly the true one.
    truth = datasets.load_digits().target
    right = [truth[int(row["input_id"])] == row["suggested_label"] for _, row in frame.iterrows()]
    assert np.mean(right) > 0.9


def hide_cleanlab(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cleanlab" else real(name))


def test_own_quality_is_that_of_cleanlab(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cleanlab")
    generator = np.random.default_rng(0)
    chances = generator.dirichlet(np.ones(4), size=200).astype(np.float32)
    labels = generator.integers(4, size=200)
    theirs = judge_labels(labels, chances, np.zeros(200))
    hide_cleanlab(monkeypatch)
    ours = judge_labels(labels, chances, np.zeros(200))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    assert ours.method != theirs.method


def test_where_cleanlab_fails_the_own_implementation_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    found = judge_labels(np.array([0, 0]), np.array([[0.9, 0.1], [0.2, 0.8]], np.float32), np.zeros(2))
    np.testing.assert_allclose(found.scores, [0.9, 0.2], atol=1e-6)
    assert "own implementation" in found.method and "not installed" not in found.method


def test_the_confident_joint_of_a_worked_example() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])
    chances = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9], [0.7, 0.3]], np.float32)
    # Thresholds: 0.6 for class 0, 2/3 for class 1. Rows 2 and 5 reach that of the other class alone.
    assert confident_issues(labels, chances).tolist() == [False, False, True, False, False, True]


def test_a_class_without_samples_is_no_ones_class() -> None:
    chances = np.array([[0.1, 0.0, 0.9], [0.2, 0.0, 0.8]], np.float32)
    assert confident_issues(np.array([0, 0]), chances).tolist() == [False, False]
