"""`Trace.analysis`: every table of the report as a DataFrame."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ml_debugger.analysis.labels import rank_labels
from ml_debugger.analysis.layers import Layer
from ml_debugger.analysis.predictions import Predictions
from ml_debugger.analysis.rows import layer_names
from ml_debugger.errors import InvalidInputError
from ml_debugger.extras import require
from ml_debugger.trace.arguments import check_epoch
from ml_debugger.trace.catalog import retry_vanished

if TYPE_CHECKING:
    import pandas

    from ml_debugger.trace.source import Source

EXTRA = "report"
METHODS = ("pca", "umap")


class Analysis:
    """What the rows of a trace say, as pandas DataFrames. Made by `Trace.analysis`.

    An object is one look at what is committed: the first method that needs a pass over the rows makes it, the
    others share what it found. Of rows that repeat a sample of an epoch the newest counts. Memory is bounded:
    one batch, one call, some 500 bytes a sample and what the constants of these modules name; no column is
    ever held whole.

    * Up to 1,000,000 samples are followed one by one; of more, a share chosen by a hash of their ids.
    * The space of a layer is made by up to 10,000 samples of the newest epoch, chosen likewise (fewer where
      vectors are wider than 838 numbers); every row is compared with these.
    * Features are read of at most 12 epochs, evenly chosen, the first and the last among them.

    Classes are what the last dimension of ``logits`` (rows, classes) counts; one logit a sample with labels 0
    and 1 is the logit of class 1, or its probability where all lie from 0 to 1. Hard labels, and soft ones
    that add up to 1, of which the likeliest class counts. Whatever cannot be judged is left out, and `notes`
    says so in a sentence; a table that makes no sense for a trace is empty.
    """

    def __init__(self, source: Source, progress: Callable[[int], object] = lambda rows: None) -> None:
        """``progress`` is called with the rows of each batch that was read.

        Raises:
            InvalidInputError: pandas or scikit-learn is not installed.
        """
        self._pandas = require("pandas", EXTRA, "the analysis")
        require("sklearn", EXTRA, "the analysis")
        self._source = source
        self._progress = progress
        self._layers: dict[str, Layer] = {}

    @functools.cached_property
    def predictions(self) -> Predictions:
        """What the pass over logits and labels has found; the tables below are made of it."""
        return retry_vanished(lambda: Predictions(self._source, self._progress))

    @functools.cached_property
    def layers(self) -> list[str]:
        """Columns with features, in the order of their recording; fields of type ``tensor`` among them."""
        return layer_names(self._source)

    @functools.cached_property
    def health(self) -> Mapping[str, Any]:
        """What is known of the recording itself; `capture` is the same as a table."""
        return self._source.health()

    def layer(self, name: str | None = None) -> Layer | None:
        """What the passes over a layer have found; None: the last of `layers`. None if there is no layer.

        Raises:
            InvalidInputError: An unknown layer.
        """
        if name is None:
            if not self.layers:
                return None
            name = self.layers[-1]
        self.check_layer(name)
        if name not in self._layers:
            wanted = name
            self._layers[name] = retry_vanished(
                lambda: Layer(self._source, wanted, self.predictions, self._progress)
            )
        return self._layers[name]

    def check_layer(self, name: str) -> None:
        """Raise InvalidInputError if there is no such layer; ``"logits"`` is one too."""
        if name not in self.layers and name != "logits":
            raise InvalidInputError(
                f"there is no layer {name!r}; the trace has {', '.join(map(repr, self.layers)) or 'none'}",
                "name one of these, or 'logits'",
            )

    def metrics(self) -> pandas.DataFrame:
        """Figures of each epoch and ``dataset_type``.

        Columns: ``n_epoch`` (-1: no epoch), ``dataset_type``, ``rows``, ``labelled``, ``judged`` (rows with a
        class as label and finite outputs), ``nonfinite`` (labelled rows whose outputs have a NaN or +inf, or
        no finite number), ``accuracy`` and ``loss`` (mean cross entropy in nats, log-softmax in float64) of
        the judged rows; NaN without such.
        """
        rows = [
            {
                "n_epoch": n_epoch,
                "dataset_type": dataset_type,
                "rows": one.rows,
                "labelled": one.labelled,
                "judged": one.judged,
                "nonfinite": one.nonfinite,
                "accuracy": one.correct / one.judged if one.judged else float("nan"),
                "loss": one.loss / one.judged if one.judged else float("nan"),
            }
            for (n_epoch, dataset_type), one in sorted(self.predictions.figures.items())
        ]
        columns = "n_epoch dataset_type rows labelled judged nonfinite accuracy loss"
        return self._frame(rows, columns)

    def confusion(self, n_epoch: int | None = None) -> pandas.DataFrame:
        """How often each label got each prediction; pairs that never came are left out.

        Columns: ``n_epoch``, ``dataset_type``, ``label``, ``prediction``, ``rows``. ``n_epoch``: only this
        epoch, -1 the rows without one, None all.
        """
        wanted = check_epoch(n_epoch)
        rows = [
            {"n_epoch": epoch, "dataset_type": name, "label": label, "prediction": prediction, "rows": count}
            for (epoch, name), one in sorted(self.predictions.figures.items())
            for (label, prediction), count in sorted(one.confusion.items())
            if wanted is None or epoch == wanted
        ]
        return self._frame(rows, "n_epoch dataset_type label prediction rows")

    def dynamics(self) -> pandas.DataFrame:
        """Training dynamics, a row a sample that was judged, in the order of its first row.

        Columns: ``dataset_type``, ``input_id``, ``label``, ``prediction`` (the newest), ``epochs`` (in which
        it was judged), ``confidence`` (mean probability of the label), ``variability`` (its standard
        deviation), ``margin`` (mean of that probability minus the highest other one), ``correctness`` (share
        of the epochs), ``forgetting_events`` (right in one epoch and wrong in the next), ``flips`` (changes
        of the prediction), ``first_learned`` (first epoch in which it was right; -1: never). The rows without
        an epoch count only where there are no epochs, with the newest row of each sample.

        Sources: Swayamdipta et al. (2020), Toneva et al. (2019).
        """
        return self._pandas_frame(self.predictions.samples.dynamics())

    def label_issues(self, layer: str | None = None) -> pandas.DataFrame:
        """Every judged sample, the one whose label is most likely wrong first.

        Columns: ``dataset_type``, ``input_id``, ``label``, ``suggested_label`` (likeliest by the mean
        probabilities), ``score`` (0: surely wrong, to 1; the list is sorted by it: the mean of
        ``label_quality`` and of the share of neighbours that agree), ``label_quality`` (normalized margin of
        the mean probabilities), ``is_issue`` (what confident learning finds wrong; None: samples times
        classes are more than 2^25), ``neighbour_disagreement`` (share of the 10 nearest reference samples
        with another label, in the layer's newest epoch; NaN: unknown), ``confidence``.

        Args:
            layer: Where neighbours are looked for; None: the last layer.

        Raises:
            InvalidInputError: An unknown layer.

        Source: Northcutt et al. (2021), through cleanlab where that is installed.
        """
        found = self.layer(layer) if self.predictions.kind.has_labels else None
        return self._pandas_frame(self.rank_labels(found)[0])

    def rank_labels(self, layer: Layer | None) -> tuple[dict[str, Any], str]:
        """Columns of `label_issues`, and who computed them."""
        return rank_labels(self.predictions.samples, None if layer is None else layer.disagreement)

    def outliers(self, layer: str | None = None) -> pandas.DataFrame:
        """Samples of the newest epoch that are far from all others, farthest first; at most 500.

        Columns: ``dataset_type``, ``input_id``, ``label``, ``prediction`` (-1: none), ``distance`` (to the
        10th nearest reference sample, in medians of that distance).

        Raises:
            InvalidInputError: An unknown layer.
        """
        found = self.layer(layer)
        neighbours = found.neighbours if found else None
        names = "dataset_type input_id label prediction distance"
        rows = [
            {name: getattr(one, name) for name in names.split()} for one in _listed(neighbours, "outliers")
        ]
        return self._frame(rows, names)

    def near_duplicates(self, layer: str | None = None) -> pandas.DataFrame:
        """Pairs of samples of the newest epoch with almost equal features, closest first; at most 500.

        Columns: ``dataset_type``, ``input_id``, ``label`` of one, ``other_dataset_type``, ``other_input_id``,
        ``other_label``, ``distance`` (in medians of the distance to the nearest neighbour; 0: equal
        features). The other one is a reference sample: pairs of samples that both are none are not found.

        Raises:
            InvalidInputError: An unknown layer.
        """
        found = self.layer(layer)
        parts = ("dataset_type", "input_id", "label")
        rows = [
            {
                **dict(zip(parts, one.first, strict=True)),
                **dict(zip((f"other_{part}" for part in parts), one.second, strict=True)),
                "distance": one.distance,
            }
            for one in _listed(found.neighbours if found else None, "pairs")
        ]
        names = " ".join((*parts, *(f"other_{part}" for part in parts), "distance"))
        return self._frame(rows, names)

    def drift(self, layer: str | None = None) -> pandas.DataFrame:
        """How the features of a layer move: between epochs, and between dataset types of an epoch.

        Columns: ``layer``, ``between`` (``"epochs"`` or ``"dataset types"``), ``from_epoch``,
        ``from_dataset_type``, ``to_epoch``, ``to_dataset_type``, ``mean_shift`` (distance of the means) and
        ``frechet_distance`` (of normal distributions with these moments), both in standard deviations of the
        features and by the first 32 principal components of the newest epoch; ``rows`` (of the smaller
        group).

        Raises:
            InvalidInputError: An unknown layer.
        """
        found = self.layer(layer)
        groups = "from_epoch from_dataset_type to_epoch to_dataset_type"
        names = f"layer between {groups} mean_shift frechet_distance rows"
        return self._frame(found.drift() if found else [], names)

    def embedding(
        self, layer: str | None = None, n_epoch: int | None = None, *, method: str = "pca"
    ) -> pandas.DataFrame:
        """A map of up to 3000 samples of an epoch, chosen by a hash of their ids.

        Columns: ``dataset_type``, ``input_id``, ``label``, ``prediction`` (-1: none), ``x``, ``y``: the first
        two principal components of the newest epoch, for all epochs alike; or UMAP of the first 32.

        Args:
            layer: None: the last layer.
            n_epoch: -1: the rows without an epoch; None: the newest.
            method: ``"pca"``, or ``"umap"``, which needs ``pip install "ml-debugger[umap]"``.

        Raises:
            InvalidInputError: An unknown layer or method, or umap-learn is not installed.
        """
        wanted = check_epoch(n_epoch)
        check_method(method)
        found = self.layer(layer)
        points = found.map_of(wanted) if found else None
        names = "dataset_type input_id label prediction x y"
        if points is None:
            return self._frame([], names)
        places = planar(points.vectors, method)
        columns = (points.dataset_types, points.input_ids, points.labels, points.predictions, *places.T)
        return self._pandas_frame(dict(zip(names.split(), columns, strict=True)))

    def capture(self) -> pandas.DataFrame:
        """The health of the recording: rows, losses, waits, throughput; no rows are read.

        Columns: ``scope`` (``"trace"``, ``"epoch"``, ``"rank"``, ``"writer"``: a tracer that wrote last,
        ``"lost"``: rows by cause), ``name``, ``figure``, ``value``. An export knows fewer figures than a
        trace on disk.
        """
        health = self.health
        entries = [("trace", "", health["totals"])]
        entries += [("epoch", str(one["n_epoch"]), one) for one in health["epochs"]]
        entries += [("rank", str(one["rank"]), one) for one in health["ranks"]]
        for one in health["writers"]:
            entries.append(("writer", f"rank {one['rank']}, attempt {one['attempt']}", one))
        entries += [("lost", cause, {"rows": rows}) for cause, rows in health["lost"].items()]
        rows = [
            {"scope": scope, "name": name, "figure": figure, "value": value}
            for scope, name, figures in entries
            for figure, value in figures.items()
            if figure not in ("n_epoch", "rank", "attempt")
        ]
        return self._frame(rows, "scope name figure value")

    def notes(self) -> list[str]:
        """Sentences: what could not be judged and why, and what was sampled, in the passes so far."""
        found = self.predictions
        notes = list(found.kind.problems)
        if found.kind.one_output and found.kind.are_probabilities:
            notes.append("One output a sample, from 0 to 1, is taken for the probability of class 1 of two.")
        elif found.kind.are_probabilities:
            notes.append("The outputs are not negative and add up to 1: they are taken for probabilities.")
        elif found.kind.one_output:
            notes.append("One output a sample is taken for the logit of class 1 of two.")
        nonfinite = sum(one.nonfinite for one in found.figures.values())
        if nonfinite:
            notes.append(f"{nonfinite} labelled rows have outputs with NaN or +inf; they are not judged.")
        unjudged = sum(one.labelled - one.judged - one.nonfinite for one in found.figures.values())
        if unjudged and found.kind.has_labels:
            notes.append(
                f"{unjudged} rows are not judged: their labels do not name one of the classes, or their "
                "outputs do not have one number for each."
            )
        if found.kind.has_labels and found.share < 1:
            notes.append(
                f"Of the samples {found.share:.1%}, chosen by a hash of their ids, were followed one by one."
            )
        if found.samples.turned_away:
            notes.append("More samples came than can be followed one by one: the later ones are left out.")
        if not self.layers:
            notes.append("No layer was recorded.")
        return notes + [note for layer in self._layers.values() for note in layer.notes()]

    def _frame(self, rows: list[Any], columns: str) -> pandas.DataFrame:
        return self._pandas_frame({name: [row[name] for row in rows] for name in columns.split()})

    def _pandas_frame(self, columns: Mapping[str, Any]) -> pandas.DataFrame:
        frame: pandas.DataFrame = self._pandas.DataFrame(columns)
        return frame


def check_method(method: str) -> None:
    """Raise InvalidInputError if there is no such method of making maps, or its package is missing."""
    if method not in METHODS:
        raise InvalidInputError(
            f"there is no method {method!r}", f"pass one of {', '.join(map(repr, METHODS))}"
        )
    if method == "umap":
        require("umap", "umap", "a map by UMAP")


def planar(vectors: Any, method: str) -> Any:
    """Two coordinates a row, float64."""
    import numpy as np

    if method == "umap" and len(vectors) > 3:
        module = require("umap", "umap", "a map by UMAP")
        reducer = module.UMAP(n_neighbors=min(15, len(vectors) - 1), random_state=0, n_jobs=1)
        return np.asarray(reducer.fit_transform(vectors), np.float64)
    places = np.zeros((len(vectors), 2))
    places[:, : min(2, vectors.shape[1])] = vectors[:, :2]
    return places


def _listed(neighbours: Any, what: str) -> list[Any]:
    return [] if neighbours is None else getattr(neighbours, what)
