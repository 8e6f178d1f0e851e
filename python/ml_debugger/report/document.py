"""The report's figures as one JSON document, bounded however large the trace is."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ml_debugger import __version__
from ml_debugger.analysis import Analysis
from ml_debugger.analysis.analysis import check_method, planar
from ml_debugger.analysis.layers import spread
from ml_debugger.store import layout

if TYPE_CHECKING:
    from ml_debugger.analysis.features import FeatureBatch
    from ml_debugger.trace import Trace

MAX_LAYERS = 4
_MAX_TEXT_CHARACTERS = 200
_MAX_CURVE_ROWS = 4000
_MAX_CONFUSION_EPOCHS = 12
_MAX_CONFUSION_TYPES = 6
_MAX_PAIRS = 2500
_MAX_LABEL_ISSUES = 500
_MAX_LISTED = 100
_MAX_POINTS = 2000  # of a map or chart
_MAX_CLASS_NAMES = 1000
_MAP_STEPS = 1000  # maps have whole coordinates from 0 to this


class DocumentBuilder:
    """Collects the sections of a report; a section that makes no sense for the trace says why.

    Args:
        analysis: Where the figures come from.
        layers: Layers to look at; None: all, at most `MAX_LAYERS`, the last of them.
        map_method: ``"pca"``, or ``"umap"``, which shows the newest epoch alone.
    """

    def __init__(self, analysis: Analysis, layers: Sequence[str] | None, map_method: str) -> None:
        self._analysis = analysis
        self._map_method = map_method
        self._layers = list(dict.fromkeys(layers)) if layers else analysis.layers[-MAX_LAYERS:]
        self._notes: list[str] = []
        left_out = [] if layers else analysis.layers[:-MAX_LAYERS]
        if left_out:
            self._notes.append(f"Layers that were left out: {', '.join(map(repr, left_out))}.")

    def build(self) -> dict[str, Any]:
        """Read the trace and return the document."""
        analysis = self._analysis
        sections = {
            "metrics": self._metrics(),
            "confusion": self._confusion(),
            "dynamics": self._dynamics(),
            "layers": [self._layer(name) for name in self._layers],
            "label_issues": self._label_issues(),
            "capture": analysis.health,
        }
        names = sorted(analysis.predictions.class_names.items())[:_MAX_CLASS_NAMES]
        document: dict[str, Any] = plain(
            {
                "class_names": {str(label): name for label, name in names},
                "num_classes": analysis.predictions.kind.num_classes,
                "notes": [*analysis.notes(), *self._notes],
                **sections,
            }
        )
        return document

    def _metrics(self) -> list[dict[str, Any]]:
        frame = self._analysis.metrics()
        epochs = sorted(set(frame["n_epoch"].tolist()))
        a_epoch = max(1, -(-len(frame) // max(len(epochs), 1)))
        kept = spread(epochs, max(2, _MAX_CURVE_ROWS // a_epoch))
        if len(kept) < len(epochs):
            self._notes.append(f"Curves and figures show {len(kept)} of {len(epochs)} epochs.")
        return records(frame[frame["n_epoch"].isin(kept)].head(_MAX_CURVE_ROWS))

    def _confusion(self) -> dict[str, Any]:
        predictions = self._analysis.predictions
        if not predictions.kind.has_labels:
            return {"why": _no_judgement(predictions.kind.problems), "tables": []}
        epochs = sorted({epoch for epoch, _ in predictions.figures})
        kept = set(spread(epochs, _MAX_CONFUSION_EPOCHS))
        types = sorted({name for _, name in predictions.figures})[:_MAX_CONFUSION_TYPES]
        tables = []
        for (epoch, name), one in sorted(predictions.figures.items()):
            if epoch in kept and name in types and one.confusion:
                pairs = [
                    [label, prediction, rows] for (label, prediction), rows in one.confusion.most_common()
                ]
                tables.append(
                    {"n_epoch": epoch, "dataset_type": name, "pairs": pairs[:_MAX_PAIRS], "all": len(pairs)}
                )
        return {"why": "" if tables else "No row could be judged.", "tables": tables}

    def _dynamics(self) -> dict[str, Any]:
        frame = self._analysis.dynamics()
        predictions = self._analysis.predictions
        if not len(frame):
            return {"why": _no_judgement(predictions.kind.problems)}
        if predictions.followed == [layout.NO_EPOCH] or len(predictions.followed) < 2:
            return {"why": "Training dynamics need two epochs or more.", "samples": len(frame)}
        order = ["forgetting_events", "flips", "confidence", "dataset_type", "input_id"]
        forgotten = frame[frame["forgetting_events"] > 0]
        worst = forgotten.sort_values(order, ascending=[False, False, True, True, True], kind="stable")
        step = -(-len(frame) // _MAX_POINTS)
        learned = frame["first_learned"] >= 0
        return {
            "why": "",
            "samples": len(frame),
            "never_learned": int((~learned).sum()),
            "never_forgotten": int((learned & (frame["forgetting_events"] == 0)).sum()),
            "forgetting_histogram": np.bincount(frame["forgetting_events"].clip(upper=20)).tolist(),
            "points": columns_of(frame.iloc[::step], digits=4),
            "most_forgotten": records(worst.head(_MAX_LISTED)),
            "most_forgotten_all": len(forgotten),
        }

    def _label_issues(self) -> dict[str, Any]:
        analysis = self._analysis
        if not analysis.predictions.kind.has_labels:
            return {"why": _no_judgement(analysis.predictions.kind.problems), "rows": []}
        # Neighbours are those of the last of the layers that the report shows.
        layer = analysis.layer(self._layers[-1]) if self._layers else None
        columns, method = analysis.rank_labels(layer)
        total = len(columns["input_id"])
        rows = [
            dict(zip(columns, values, strict=True))
            for values in zip(*(column[:_MAX_LABEL_ISSUES] for column in columns.values()), strict=True)
        ]
        found = columns["is_issue"]
        return {
            "why": "" if total else "No sample could be judged.",
            "method": method,
            "layer": self._layers[-1] if self._layers else None,
            "samples": total,
            "issues": None if not found or found[0] is None else sum(found),
            "rows": rows,
        }

    def _layer(self, name: str) -> dict[str, Any]:
        analysis = self._analysis
        layer = analysis.layer(name)
        assert layer is not None, "it is one of the trace's"
        if layer.neighbours is None:
            return {"name": name, "why": layer.space.problem}
        outliers, pairs = analysis.outliers(name), analysis.near_duplicates(name)
        return {
            "name": name,
            "why": "",
            "epochs": layer.epochs,
            "width": layer.space.width,
            "explained": layer.space.explained[:2].tolist(),
            "outliers": records(outliers.head(_MAX_LISTED)),
            "near_duplicates": records(pairs.head(_MAX_LISTED)),
            "drift": records(analysis.drift(name)),
            "map": self._map(layer.maps),
        }

    def _map(self, maps: dict[int, FeatureBatch]) -> dict[str, Any]:
        shown = dict(list(maps.items())[-1:]) if self._map_method == "umap" else maps
        planes = {
            epoch: planar(points.vectors[:_MAX_POINTS], self._map_method) for epoch, points in shown.items()
        }
        everything = np.concatenate([np.zeros((0, 2)), *planes.values()])
        if not len(everything):
            return {"method": self._map_method, "samples": [], "epochs": []}
        low, high = everything.min(axis=0), everything.max(axis=0)
        samples: dict[tuple[str, str], int] = {}
        epochs = []
        for epoch, plane in planes.items():
            points = shown[epoch]
            names = list(zip(points.dataset_types, points.input_ids, strict=True))[: len(plane)]
            scaled = np.round((plane - low) / np.maximum(high - low, 1e-30) * _MAP_STEPS).astype(int)
            epochs.append(
                {
                    "n_epoch": epoch,
                    "sample": [samples.setdefault(name, len(samples)) for name in names],
                    "x": scaled[:, 0].tolist(),
                    "y": scaled[:, 1].tolist(),
                    "label": points.labels[: len(plane)].tolist(),
                    "prediction": points.predictions[: len(plane)].tolist(),
                }
            )
        return {"method": self._map_method, "samples": list(samples), "epochs": epochs}


def build_document(
    trace: Trace,
    layers: Sequence[str] | None = None,
    map_method: str = "pca",
    progress: Callable[[int], object] = lambda rows: None,
) -> dict[str, Any]:
    """The figures of a report: dicts, lists, text and finite numbers or None; at most some MB as JSON.

    Raises:
        InvalidInputError: A package is missing, or there is no such layer or method.
    """
    analysis = Analysis(trace._source, progress)
    check_method(map_method)
    for name in layers or ():
        analysis.check_layer(name)
    document = DocumentBuilder(analysis, layers, map_method).build()
    return {
        "model_name": plain(trace.model_name),
        "version_name": plain(trace.version_name),
        "fingerprint": trace.fingerprint,
        "epochs": trace.epochs,
        "attempts": len(trace.attempts),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "ml_debugger": __version__,
        **document,
    }


def _no_judgement(problems: Sequence[str]) -> str:
    return " ".join(problems) or "No row could be judged."


def records(frame: Any) -> list[dict[str, Any]]:
    """A DataFrame as one dict a row."""
    found: list[dict[str, Any]] = frame.to_dict("records")
    return found


def columns_of(frame: Any, digits: int) -> dict[str, list[Any]]:
    """A DataFrame as one list a column, numbers rounded."""
    found: dict[str, list[Any]] = frame.round(digits).to_dict("list")
    return found


def plain(value: Any) -> Any:
    """The same in what JSON has: numbers that are not finite become None, long texts are cut."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if isinstance(value, str) and len(value) > _MAX_TEXT_CHARACTERS:
        return value[: _MAX_TEXT_CHARACTERS - 1] + "…"
    return value
