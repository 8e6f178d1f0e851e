"""What becomes of each sample over the epochs: the training dynamics, in some 200 bytes a sample.

Confidence, variability and correctness are those of Swayamdipta et al. (2020), "Dataset Cartography";
forgetting events those of Toneva et al. (2019), "An Empirical Study of Example Forgetting during Deep Neural
Network Learning"; the mean margin follows the area under the margin of Pleiss et al. (2020), in probabilities
instead of logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ml_debugger.analysis.outputs import Scores
from ml_debugger.trace.dtypes import Array

# As many samples are followed; of more, a share chosen by a hash of their ids.
MAX_SAMPLES = 1_000_000
# Mean probabilities of all classes are kept for each sample while they are no more numbers than these.
MAX_PROBABILITIES = 1 << 25

NEVER = -1


class SampleTable:
    """Every (dataset_type, input_id) once, with what has been seen of it; epochs come in rising order.

    Args:
        max_rows: Later samples are turned away. Memory is taken as they come.
        num_classes: Classes; 0: samples are not judged.
    """

    def __init__(self, max_rows: int, num_classes: int) -> None:
        self._rows: dict[str, dict[str, int]] = {}
        self._max_rows = max_rows
        self.num_rows = 0
        self.turned_away = 0
        self.label = np.full(max_rows, NEVER, np.int32)
        self.last_prediction = np.full(max_rows, NEVER, np.int32)
        self.epochs = np.zeros(max_rows, np.int32)  # in which it was judged
        self.correct = np.zeros(max_rows, np.int32)
        self.forgetting = np.zeros(max_rows, np.int32)
        self.flips = np.zeros(max_rows, np.int32)
        self.first_learned = np.full(max_rows, NEVER, np.int32)
        self._was_correct = np.zeros(max_rows, np.bool_)
        self._confidence = np.zeros(max_rows)
        self._squares = np.zeros(max_rows)
        self._margin = np.zeros(max_rows)
        # Epochs may hold different samples, so how many there are shows only as they come.
        room = min(max_rows, MAX_PROBABILITIES // num_classes) if num_classes else 0
        self._probabilities = np.zeros((room, num_classes), np.float32) if room else None

    def rows_of(self, dataset_type: str, input_ids: list[str]) -> Array:
        """Row of each sample, int64; new ones get one, or -1 once the table is full."""
        known = self._rows.setdefault(dataset_type, {})
        rows = np.empty(len(input_ids), np.int64)
        for position, input_id in enumerate(input_ids):
            row = known.get(input_id, -1)
            if row < 0 and self.num_rows < self._max_rows:
                row = known[input_id] = self.num_rows
                self.num_rows += 1
            rows[position] = row
        self.turned_away += int((rows < 0).sum())
        if self._probabilities is not None and self.num_rows > len(self._probabilities):
            self._probabilities = None
        return rows

    def row_of(self, dataset_type: str, input_id: str) -> int | None:
        """Row of a sample; None for one that is not followed."""
        return self._rows.get(dataset_type, {}).get(input_id)

    def add(self, rows: Array, n_epoch: int, scores: Scores) -> None:
        """Take in the judged ones of some samples of an epoch, no sample twice."""
        rows, judged = rows[scores.judged], scores.judged
        predictions, labels = scores.predictions[judged], scores.labels[judged]
        correct = predictions == labels
        seen = self.epochs[rows] > 0
        self.forgetting[rows] += seen & self._was_correct[rows] & ~correct
        self.flips[rows] += seen & (self.last_prediction[rows] != predictions)
        self.first_learned[rows[correct & (self.correct[rows] == 0)]] = n_epoch
        self.epochs[rows] += 1
        self.correct[rows] += correct
        self._was_correct[rows] = correct
        self.label[rows], self.last_prediction[rows] = labels, predictions
        self._confidence[rows] += scores.confidence[judged]
        self._squares[rows] += scores.confidence[judged] ** 2
        self._margin[rows] += scores.margin[judged]
        if self._probabilities is not None:
            self._probabilities[rows] += np.exp(scores.log_probabilities[judged])

    def forget(self, rows: Array) -> None:
        """Begin anew with some samples."""
        for counts in (self.epochs, self.correct, self.forgetting, self.flips):
            counts[rows] = 0
        for sums in (self._confidence, self._squares, self._margin, self._probabilities):
            if sums is not None:
                sums[rows] = 0

    def names(self) -> tuple[list[str], list[str]]:
        """``dataset_type`` and ``input_id`` of every row."""
        types = [name for name, known in self._rows.items() for _ in known]
        ids = [input_id for known in self._rows.values() for input_id in known]
        rows = [row for known in self._rows.values() for row in known.values()]
        order = np.empty(len(rows), np.int64)
        order[rows] = np.arange(len(rows))
        return [types[place] for place in order], [ids[place] for place in order]

    def judged(self) -> Array:
        """Rows of the samples that were judged at least once."""
        return np.flatnonzero(self.epochs[: self.num_rows] > 0)

    def confidence(self, rows: Array) -> Array:
        """Mean probability of the label over the epochs."""
        means: Array = self._confidence[rows] / self.epochs[rows]
        return means

    def margin(self, rows: Array) -> Array:
        """Mean of the label's probability minus the highest other one."""
        means: Array = self._margin[rows] / self.epochs[rows]
        return means

    def probabilities(self, rows: Array) -> Array | None:
        """Mean probabilities of all classes, float32; None where there were too many numbers to keep."""
        if self._probabilities is None:
            return None
        means: Array = self._probabilities[rows] / self.epochs[rows, None].astype(np.float32)
        return means

    def dynamics(self) -> dict[str, Any]:
        """Columns of the table of training dynamics; see `Analysis.dynamics`."""
        rows = self.judged()
        types, ids = self.names()
        epochs = self.epochs[rows]
        confidence = self.confidence(rows)
        variance = self._squares[rows] / epochs - confidence**2
        return {
            "dataset_type": [types[row] for row in rows],
            "input_id": [ids[row] for row in rows],
            "label": self.label[rows],
            "prediction": self.last_prediction[rows],
            "epochs": epochs,
            "confidence": confidence,
            "variability": np.sqrt(np.maximum(variance, 0)),
            "margin": self.margin(rows),
            "correctness": self.correct[rows] / epochs,
            "forgetting_events": self.forgetting[rows],
            "flips": self.flips[rows],
            "first_learned": self.first_learned[rows],
        }
