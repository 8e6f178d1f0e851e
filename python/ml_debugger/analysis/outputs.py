"""What the outputs and labels of a trace are, and how each sample fares by them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ml_debugger.analysis.rows import LABEL, LabelledBatch, describe_shape, is_numeric
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.newest import Mask

LOGITS = "logits"
_SUM_TOLERANCE = 1e-2  # of half-precision probabilities


@dataclass(frozen=True, slots=True)
class Scores:
    """Judgement of the rows of a batch.

    Attributes:
        labels: Class of each row, int64; of soft labels the likeliest. -1: none.
        predictions: Class with the highest output, int64; -1: the outputs are not finite.
        judged: Rows with a class as label and finite outputs.
        nonfinite: Rows with a label, whose outputs have a NaN or +inf, or are all -inf.
        log_probabilities: float64 (rows, classes); 0 where the outputs are not finite.
        loss: Cross entropy in nats, float64; 0 where not judged.
        confidence: Probability of the label, float64; 0 where not judged.
        margin: That minus the highest probability of another class, float64; 0 where not judged.
    """

    labels: Array
    predictions: Array
    judged: Mask
    nonfinite: Mask
    log_probabilities: Array
    loss: Array
    confidence: Array
    margin: Array


@dataclass(frozen=True, slots=True)
class OutputKind:
    """What the outputs and labels of a trace are; decided by the first rows that have labels.

    Attributes:
        num_classes: Classes that the outputs tell apart; 0: they are no outputs of a classifier.
        one_output: One logit a sample, of the second of two classes.
        are_probabilities: The outputs are no logits: they are not negative and add up to 1, or the one output
            lies from 0 to 1.
        problems: Sentences that say what cannot be judged, and why; empty where everything can.
        has_labels: Labels name classes.
    """

    num_classes: int = 0
    one_output: bool = False
    are_probabilities: bool = False
    has_labels: bool = False
    problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, batch: LabelledBatch) -> OutputKind:
        """Decide by some rows."""
        outputs = batch.columns.get(LOGITS)
        if outputs is None or not is_numeric(outputs):
            return cls(problems=("The outputs are not numbers of one shape a sample.",))
        labels = batch.truths.get(LABEL) if batch.labelled.any() else None
        if labels is not None and labels.dtype != object:
            labels = labels[batch.labelled]
        flat = outputs.reshape(len(outputs), -1)
        if outputs.ndim > 2:
            return cls(
                problems=(
                    f"A sample has outputs of shape {describe_shape(outputs)}; only a vector with one "
                    "number a class can be judged.",
                )
            )
        if flat.shape[1] == 1:
            return cls._of_one_output(flat, labels)
        problem = _label_problem(labels, flat.shape[1])
        return cls(
            num_classes=flat.shape[1],
            are_probabilities=_are_distributions(flat),
            has_labels=not problem,
            problems=(problem,) if problem else (),
        )

    @classmethod
    def _of_one_output(cls, outputs: Array, labels: Array | None) -> OutputKind:
        if labels is None:
            return cls(problems=("There are no labels, and one output a sample does not tell classes.",))
        if not is_numeric(labels) or labels.size != len(labels) or not np.isin(labels, (0, 1)).all():
            return cls(problems=("There is one output a sample, and labels that are not 0 or 1.",))
        are_probabilities = bool(((outputs >= 0) & (outputs <= 1)).all())  # logits have both signs
        return cls(num_classes=2, one_output=True, are_probabilities=are_probabilities, has_labels=True)

    def score(self, batch: LabelledBatch) -> Scores:
        """Judge some rows; rows that are not what was decided are not judged."""
        rows = len(batch.input_ids)
        log_probabilities, finite = self._log_probabilities(batch.columns.get(LOGITS), rows)
        predictions = np.where(finite, log_probabilities.argmax(axis=1), -1)
        targets, labels = self._targets(batch, rows)
        labelled = labels >= 0
        judged = labelled & finite
        picked = np.arange(rows), np.maximum(labels, 0)
        probabilities = np.exp(log_probabilities)
        confidence = np.where(judged, probabilities[picked], 0.0)
        if targets is None:
            loss = -log_probabilities[picked]
        else:
            with np.errstate(invalid="ignore"):  # 0 * -inf: a class that neither expects
                loss = -np.where(targets > 0, targets * log_probabilities, 0.0).sum(axis=1)
        probabilities[picked] = -1
        margin = confidence - probabilities.max(axis=1, initial=-1.0)
        return Scores(
            labels=labels,
            predictions=predictions,
            judged=judged,
            nonfinite=labelled & ~finite & self._fits(batch.columns.get(LOGITS), rows),
            log_probabilities=log_probabilities,
            loss=np.where(judged, loss, 0.0),
            confidence=confidence,
            margin=np.where(judged, margin, 0.0),
        )

    @property
    def _width(self) -> int:
        """Numbers of the outputs of a sample."""
        return 1 if self.one_output else self.num_classes

    def _fits(self, outputs: Array | None, rows: int) -> bool:
        """Whether some outputs are what was decided."""
        width = self._width
        return outputs is not None and width > 0 and is_numeric(outputs) and outputs.size == rows * width

    def _log_probabilities(self, outputs: Array | None, rows: int) -> tuple[Array, Mask]:
        width = self._width
        if outputs is None or not self._fits(outputs, rows):
            return np.zeros((rows, max(self.num_classes, 1))), np.zeros(rows, np.bool_)
        logits = outputs.reshape(rows, width).astype(np.float64)
        if self.one_output:
            other = 1 - logits if self.are_probabilities else np.zeros((rows, 1))
            logits = np.concatenate([other, logits], axis=1)
        if self.are_probabilities:
            with np.errstate(divide="ignore", invalid="ignore"):
                logits = np.log(logits)
        # -inf is a class that cannot be; it needs one that can.
        peak = logits.max(axis=1, keepdims=True)
        finite = np.isfinite(peak[:, 0])
        logits = np.where(finite[:, None], logits, 0.0)
        logits -= np.where(finite[:, None], peak, 0.0)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        logits[~finite] = 0.0
        return logits, finite

    def _targets(self, batch: LabelledBatch, rows: int) -> tuple[Array | None, Array]:
        """Soft labels if there are such, and the class of each row."""
        nothing = np.full(rows, -1, np.int64)
        values = batch.truths.get(LABEL)
        if not self.has_labels or values is None or not is_numeric(values):
            return None, nothing
        if values.size == rows:
            numbers = values.reshape(rows)
            with np.errstate(invalid="ignore"):
                valid = batch.labelled & (numbers >= 0) & (numbers < self.num_classes)
                valid &= numbers == np.floor(numbers)
            return None, np.where(valid, np.where(valid, numbers, 0).astype(np.int64), -1)
        if values.shape != (rows, self.num_classes):
            return None, nothing
        valid = batch.labelled & _row_distributions(values)
        return values.astype(np.float64), np.where(valid, values.argmax(axis=1), -1)


def _label_problem(labels: Array | None, num_classes: int) -> str:
    if labels is None:
        return "There are no labels."
    if not is_numeric(labels):
        return "The labels are not numbers of one shape a sample."
    if labels.size == len(labels):
        if labels.dtype.kind == "f" and not (labels == np.floor(labels)).all():
            return "The labels are numbers with fractions, not classes."
        return ""
    if labels.shape[1:] == (num_classes,):
        # One row that names several classes says that those which name one do so by chance.
        if _row_distributions(labels).any() and not _names_several(labels).any():
            return ""
        return "The labels name several classes a sample (multi-label), which are not judged."
    return (
        f"A sample has a label of shape {describe_shape(labels)} and {num_classes} outputs; expected one "
        "class, or one number a class."
    )


def _are_distributions(values: Array) -> bool:
    return len(values) > 0 and bool(_row_distributions(values).all())


def _names_several(values: Array) -> Mask:
    """Which rows are not negative and add up to more than 1."""
    numbers = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        rows: Mask = (numbers >= 0).all(axis=1) & (numbers.sum(axis=1) > 1 + _SUM_TOLERANCE)
    return rows


def _row_distributions(values: Array) -> Mask:
    """Which rows are distributions: not negative, and adding up to 1."""
    numbers = values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        rows: Mask = (numbers >= 0).all(axis=1) & (np.abs(numbers.sum(axis=1) - 1) <= _SUM_TOLERANCE)
    return rows
