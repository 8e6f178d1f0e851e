"""Which labels are likely wrong: by confident learning, and by neighbours in feature space.

Confident learning is that of Northcutt, Jiang and Chuang (2021). Where the package cleanlab is installed it
does the work; otherwise the same score and its confident joint are computed here. Probabilities are averaged
over the epochs: a model that has learnt a wrong label by heart in the end did not believe it for long.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from ml_debugger.analysis.samples import SampleTable
from ml_debugger.trace.dtypes import Array
from ml_debugger.trace.newest import Mask


@dataclass(frozen=True, slots=True)
class LabelQuality:
    """Judgement of labels.

    Attributes:
        scores: 0 (surely wrong) to 1, float64.
        is_issue: Which ones confident learning finds wrong; None: it could not be asked.
        method: Who computed them, for people.
    """

    scores: Array
    is_issue: Mask | None
    method: str


def rank_labels(samples: SampleTable, disagreement: Array | None) -> tuple[dict[str, Any], str]:
    """Columns of the ranking, worst first, and who computed it; see `Analysis.label_issues`.

    Args:
        samples: What became of each sample.
        disagreement: Share of the neighbours with another label, by row of ``samples``; NaN: unknown. None:
            no layer was looked at.
    """
    rows = samples.judged()
    labels = samples.label[rows].astype(np.int64)
    probabilities = samples.probabilities(rows)
    quality = judge_labels(labels, probabilities, samples.margin(rows))
    neighbours = np.full(len(rows), np.nan) if disagreement is None else disagreement[rows].astype(np.float64)
    # Both go from 0 to 1; a sample without neighbours is judged by the model alone.
    score = np.where(np.isnan(neighbours), quality.scores, (quality.scores + 1 - neighbours) / 2)
    suggested = samples.last_prediction[rows] if probabilities is None else probabilities.argmax(axis=1)
    types, ids = samples.names()
    order = np.argsort(score, kind="stable")
    is_issue = [None] * len(rows) if quality.is_issue is None else quality.is_issue[order].tolist()
    columns = {
        "dataset_type": [types[row] for row in rows[order]],
        "input_id": [ids[row] for row in rows[order]],
        "label": labels[order],
        "suggested_label": np.asarray(suggested, np.int64)[order],
        "score": score[order],
        "label_quality": quality.scores[order],
        "neighbour_disagreement": neighbours[order],
        "is_issue": is_issue,
        "confidence": samples.confidence(rows)[order],
    }
    return columns, quality.method


def judge_labels(labels: Array, probabilities: Array | None, margins: Array) -> LabelQuality:
    """Judge labels by mean probabilities (rows, classes), or where there are none by mean margins."""
    if probabilities is None or not len(labels):
        return LabelQuality((margins + 1) / 2, None, "mean margin over the epochs")
    has_cleanlab = importlib.util.find_spec("cleanlab") is not None
    if has_cleanlab:
        found = _by_cleanlab(labels, probabilities)
        if found is not None:
            return found
    own = np.arange(len(labels)), labels
    others = probabilities.copy()
    others[own] = -1
    scores = (probabilities[own].astype(np.float64) - others.max(axis=1, initial=-1) + 1) / 2
    why = "cleanlab refused these labels" if has_cleanlab else "cleanlab is not installed"
    method = f"confident learning, own implementation ({why})"
    return LabelQuality(scores, confident_issues(labels, probabilities), method)


def confident_issues(labels: Array, probabilities: Array) -> Mask:
    """Off-diagonal samples of the confident joint: those confidently counted for another class.

    A sample counts for the likeliest of the classes whose probability reaches the mean that the class has
    among the samples labelled so.
    """
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    own = probabilities[np.arange(len(labels)), labels]
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -1)
    issues: Mask = (confident.max(axis=1) >= 0) & (confident.argmax(axis=1) != labels)
    return issues


def _by_cleanlab(labels: Array, probabilities: Array) -> LabelQuality | None:
    """None where it fails; it has demands of its own on labels, and they are not ours to repeat."""
    try:
        cleanlab = importlib.import_module("cleanlab")
        rank, filters = importlib.import_module("cleanlab.rank"), importlib.import_module("cleanlab.filter")
        scores = rank.get_label_quality_scores(labels, probabilities, method="normalized_margin")
        issues = filters.find_label_issues(labels, probabilities, n_jobs=1)
    except Exception:
        return None
    method = f"confident learning by cleanlab {getattr(cleanlab, '__version__', '')}".rstrip()
    return LabelQuality(np.asarray(scores, np.float64), np.asarray(issues, np.bool_), method)
