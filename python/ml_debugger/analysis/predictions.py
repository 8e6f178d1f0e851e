"""The pass over logits and labels: figures an epoch, confusion, and the table of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger.analysis.outputs import LOGITS, OutputKind, Scores
from ml_debugger.analysis.rows import LABEL, LabelledBatch, LabelledRows, kept_by_hash
from ml_debugger.analysis.samples import MAX_SAMPLES, SampleTable
from ml_debugger.store import layout
from ml_debugger.trace.arguments import RowFilter
from ml_debugger.trace.schema import BASE_COLUMNS

if TYPE_CHECKING:
    from ml_debugger.trace.source import Source

_MAX_CLASS_NAMES = 10_000


@dataclass
class Figures:
    """Sums over the rows of one epoch and ``dataset_type``; confusion counts (label, prediction)."""

    rows: int = 0
    labelled: int = 0
    judged: int = 0
    nonfinite: int = 0
    correct: int = 0
    loss: float = 0.0
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, scores: Scores, labelled: Any, places: Any) -> None:
        """Take in the rows at some places."""
        self.rows += len(places)
        self.labelled += int(labelled[places].sum())
        self.nonfinite += int(scores.nonfinite[places].sum())
        places = places[scores.judged[places]]
        labels, predictions = scores.labels[places], scores.predictions[places]
        self.judged += len(places)
        self.correct += int((labels == predictions).sum())
        self.loss += float(scores.loss[places].sum())
        pairs, counts = np.unique(np.stack([labels, predictions], 1), axis=0, return_counts=True)
        for (label, prediction), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.confusion[label, prediction] += count


class Predictions:
    """What one pass over all logits and labels has found.

    Attributes:
        kind: What outputs and labels are.
        figures: By (n_epoch, dataset_type); -1: rows without an epoch.
        samples: The training dynamics.
        share: Share of the samples that `samples` follows; 1: all.
        class_names: Name of each class, where a text field of the labels gives every class one name.
        followed: Epochs that `samples` has seen.
    """

    def __init__(self, source: Source, progress: Callable[[int], object]) -> None:
        """Read the trace; ``progress`` is told the rows of each batch."""
        self.figures: dict[tuple[int, str], Figures] = {}
        self._rows = LabelledRows(source)
        epochs = source.epochs()
        # Rows without an epoch are one more look at their samples only where there are no epochs.
        self.followed = [epoch for epoch in epochs if epoch != layout.NO_EPOCH] or epochs
        self.kind = self._find_kind(source, epochs)
        counts = {epoch: source.select_tables(RowFilter(epoch))[0].rows for epoch in self.followed}
        most = max(counts.values(), default=0)
        self.share = min(1.0, MAX_SAMPLES / max(most, 1))
        # A hash keeps about that share: leave room. Epochs may hold different samples.
        bound = min(sum(counts.values()), int(1.1 * MAX_SAMPLES) + 1000)
        self.samples = SampleTable(bound, self.kind.num_classes if self.kind.has_labels else 0)
        self._names = _ClassNames(source)
        for epoch in epochs:
            for batch in self._rows.batches(epoch, [LOGITS], [LABEL, *self._names.fields]):
                self._add(epoch, batch)
                progress(len(batch.input_ids))
        self.class_names = self._names.found()

    def _find_kind(self, source: Source, epochs: list[int]) -> OutputKind:
        """By the first batch of the newest epoch that has labels, else by its first one."""
        first: LabelledBatch | None = None
        for epoch in reversed(epochs):
            has_labels = source.select_tables(RowFilter(epoch))[1].rows > 0
            for batch in self._rows.batches(epoch, [LOGITS]):
                first = first or batch
                if batch.labelled.any():
                    return OutputKind.of(batch)
                if not has_labels:
                    break
        return OutputKind(problems=("There are no rows.",)) if first is None else OutputKind.of(first)

    def _add(self, epoch: int, batch: LabelledBatch) -> None:
        scores = self.kind.score(batch)
        for dataset_type, places in batch.groups():
            self.figures.setdefault((epoch, dataset_type), Figures()).add(scores, batch.labelled, places)
        self._names.add(batch, scores)
        if epoch in self.followed and self.kind.has_labels:
            self._follow(epoch, batch, scores)

    def _follow(self, epoch: int, batch: LabelledBatch, scores: Scores) -> None:
        kept = kept_by_hash(batch.input_ids, self.share)
        for dataset_type, places in batch.groups():
            chosen = places[kept[places]]
            rows = self.samples.rows_of(dataset_type, [batch.input_ids[place] for place in chosen])
            rows, chosen = rows[rows >= 0], chosen[rows >= 0]
            if epoch == layout.NO_EPOCH:  # they may repeat a sample, and are no series: the newest counts
                _, first = np.unique(rows[::-1], return_index=True)
                newest = len(rows) - 1 - first
                rows, chosen = rows[newest], chosen[newest]
                self.samples.forget(rows)
            self.samples.add(rows, epoch, _picked(scores, chosen))


def _picked(scores: Scores, places: Any) -> Scores:
    return Scores(**{name: getattr(scores, name)[places] for name in Scores.__dataclass_fields__})


class _ClassNames:
    """Looks whether a text field of the labels names the classes."""

    def __init__(self, source: Source) -> None:
        _, labels = source.select_tables(RowFilter())
        schemas = labels.schemas(None, extents=False) if labels.rows else []
        names = [one.name for one in schemas if one.is_text and one.name not in BASE_COLUMNS]
        self._candidates: dict[str, dict[int, str]] = {name: {} for name in names}

    @property
    def fields(self) -> list[str]:
        """Fields that may still do."""
        return list(self._candidates)

    def add(self, batch: LabelledBatch, scores: Scores) -> None:
        """Drop the fields that give a class a second name, or two classes one."""
        for field_name, known in list(self._candidates.items()):
            values = batch.truths.get(field_name)
            if values is None:
                continue
            places = np.flatnonzero(batch.labelled & (scores.labels >= 0))
            pairs = set(zip(scores.labels[places].tolist(), map(str, values[places].tolist()), strict=True))
            is_one_name = all(known.setdefault(label, name) == name for label, name in pairs)
            if not is_one_name or len(set(known.values())) < len(known) or len(known) > _MAX_CLASS_NAMES:
                del self._candidates[field_name]

    def found(self) -> dict[int, str]:
        """Names of the classes, by the first field that does; empty without one."""
        return next((dict(sorted(known.items())) for known in self._candidates.values() if known), {})
