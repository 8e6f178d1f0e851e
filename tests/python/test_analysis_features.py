"""`trace.analysis`: maps, neighbours and drift in feature space equal plain computation on whole columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis_traces import SPLITS, Rows, classifier_trace, one_call_trace
from format_writer import Column, FormatWriter
from ml_debugger import open_trace
from ml_debugger.analysis import features, layers, rows
from ml_debugger.analysis.drift import Moments, frechet_distance, mean_shift
from ml_debugger.analysis.features import pool
from ml_debugger.errors import InvalidInputError
from ml_debugger.trace import Trace

pytest.importorskip("pandas")
decomposition = pytest.importorskip("sklearn.decomposition")

LAST = 3


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trace, Rows]:
    """A small trace, read in batches that end in the middle of calls."""
    monkeypatch.setattr(rows, "_MAX_BATCH_ROWS", 7)
    return classifier_trace(tmp_path)


def all_features(truth: Rows, epoch: int) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """(dataset_type, input_id), features and labels of an epoch, in row order."""
    parts = [(split, truth.of(epoch, split)) for split in SPLITS]
    names = [(split, str(one)) for split, part in parts for one in part["ids"]]
    vectors = np.concatenate([part["features"] for _, part in parts]).astype(np.float64)
    return names, vectors, np.concatenate([part["labels"] for _, part in parts])


def test_the_map_is_the_first_two_principal_components(recorded: tuple[Trace, Rows]) -> None:
    trace, truth = recorded
    _, newest, _ = all_features(truth, LAST)
    pca = decomposition.PCA(2).fit(newest)
    for epoch in (0, LAST):
        frame = trace.analysis.embedding(n_epoch=epoch)
        names, vectors, labels = all_features(truth, epoch)
        expected = pca.transform(vectors)
        assert list(zip(frame["dataset_type"], frame["input_id"], strict=True)) == names
        assert frame["label"].tolist() == labels.tolist()
        for column, axis in (("x", 0), ("y", 1)):
            found = frame[column].to_numpy()
            # Up to the sign and scale of an axis: distances are compared, not units.
            assert abs(np.corrcoef(found, expected[:, axis])[0, 1]) > 0.9999


def test_neighbours_are_those_of_all_pairs(recorded: tuple[Trace, Rows]) -> None:
    trace, truth = recorded
    names, vectors, labels = all_features(truth, LAST)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :10]
    analysis = trace.analysis
    issues = analysis.label_issues().set_index(["dataset_type", "input_id"])
    for place, name in enumerate(names):
        expected = (labels[nearest[place]] != labels[place]).mean()
        assert issues.loc[name, "neighbour_disagreement"] == pytest.approx(expected)
    tenth = np.sort(distances, axis=1)[:, 9]
    outliers = analysis.outliers()
    assert len(outliers) == 60
    far = names[int(tenth.argmax())]
    assert (outliers["dataset_type"][0], outliers["input_id"][0]) == far
    np.testing.assert_allclose(outliers["distance"], np.sort(tenth / np.median(tenth))[::-1], rtol=1e-4)
    pairs = analysis.near_duplicates()
    first = distances.min(axis=1)
    assert pairs["distance"][0] == pytest.approx(first.min() / np.median(first), rel=1e-3)
    assert pairs["distance"].is_monotonic_increasing
    found = {(pairs["dataset_type"][0], pairs["input_id"][0])}
    found.add((pairs["other_dataset_type"][0], pairs["other_input_id"][0]))
    one = int(first.argmin())
    assert found == {names[one], names[int(distances[one].argmin())]}


def test_equal_samples_are_the_closest_pair(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype("<f4")
    vectors[31] = vectors[4]
    frame = one_call_trace(tmp_path, {"features": vectors}).analysis.near_duplicates()
    assert {frame["input_id"][0], frame["other_input_id"][0]} == {"s4", "s31"}
    assert frame["distance"][0] < 1e-5 < frame["distance"][1]


def test_drift_is_that_of_the_moments_of_whole_columns(recorded: tuple[Trace, Rows]) -> None:
    trace, truth = recorded
    frame = trace.analysis.drift()
    assert len(frame) == 2 * 3 + 4
    for _, row in frame.iterrows():
        groups = [
            truth.of(row[f"{end}_epoch"], row[f"{end}_dataset_type"])["features"].astype(np.float64)
            for end in ("from", "to")
        ]
        means = [group.mean(axis=0) for group in groups]
        covariances = [np.cov(group.T, bias=True) for group in groups]
        spread = np.sqrt(sum(np.trace(one) for one in covariances) / 2)
        assert row["mean_shift"] == pytest.approx(np.linalg.norm(means[0] - means[1]) / spread, rel=1e-4)
        # tr((C1 C2)^(1/2)) by the eigenvalues of the product
        root = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
        squared = ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root
        assert row["frechet_distance"] == pytest.approx(np.sqrt(max(squared, 0)) / spread, rel=1e-3, abs=1e-3)
        assert row["rows"] == min(map(len, groups))


def test_the_frechet_distance_of_two_known_distributions_is_the_textbook_value() -> None:
    # Four points at +-1 on two axes, and the same ones three times as wide and moved by 2.
    points = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], "<f4")
    one, other = Moments(2), Moments(2)
    one.add(points[:3])
    one.add(points[3:])
    other.add(3 * points + np.array([2, 0], "<f4"))
    spread = np.sqrt((2 + 18) / 2)
    assert mean_shift(one, other) == pytest.approx(2 / spread)
    assert frechet_distance(one, other) == pytest.approx(np.sqrt(4 + 2 * (3 - 1) ** 2) / spread)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "shape, axes", [((5,), ()), ((3, 5), (1,)), ((5, 2, 3), (2, 3)), ((5, 2, 3, 2), (2, 3, 4)), ((), ())]
)
def test_rows_of_more_dimensions_are_pooled(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=(4, *shape)).astype("<f2")
    vectors, finite = pool(values)
    expected = values.astype(np.float64).mean(axis=axes) if axes else values.astype(np.float64)
    assert vectors.dtype == np.float32 and finite.all()
    np.testing.assert_allclose(vectors, expected.reshape(4, -1), rtol=1e-5, atol=1e-6)


def test_tokens_of_differing_number_are_averaged_and_other_widths_left_out() -> None:
    ragged = np.empty(4, object)
    ragged[:] = [np.ones((2, 3)), np.full((5, 3), 2.0), np.ones((2, 7)), None]
    vectors, finite = pool(ragged)
    assert finite.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(vectors[:2], [[1, 1, 1], [2, 2, 2]])


def test_rows_with_features_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype("<f4")
    vectors[3, 2], vectors[7] = np.nan, np.inf
    analysis = one_call_trace(tmp_path, {"features": vectors}).analysis
    assert len(analysis.embedding()) == 28
    assert (
        "Layer 'features': 4 rows have features that are not finite; they are left out." in analysis.notes()
    )


@pytest.mark.parametrize("dtype", ["<f2", "<i4", "?", "<f8", "u1", "<c8"])
def test_features_of_every_dtype_have_a_map(tmp_path: Path, dtype: str) -> None:
    values = (3 * np.random.default_rng(0).normal(size=(30, 4))).astype(np.float32)
    analysis = one_call_trace(
        tmp_path, {"features": (values > 0 if dtype == "?" else values).astype(dtype)}
    ).analysis
    assert np.isfinite(analysis.embedding()[["x", "y"]].to_numpy()).all() and len(analysis.outliers()) == 30


def test_features_as_large_as_floats_get_are_compared(tmp_path: Path) -> None:
    vectors = (1e30 * np.random.default_rng(0).normal(size=(30, 4))).astype("<f4")
    small = (vectors / np.float32(1e30)).astype("<f4")
    large = one_call_trace(tmp_path / "a", {"features": vectors}).analysis.outliers()
    usual = one_call_trace(tmp_path / "b", {"features": small}).analysis.outliers()
    np.testing.assert_allclose(large["distance"], usual["distance"], rtol=1e-4)


def test_wide_vectors_are_projected_and_keep_their_neighbours(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 6000)).astype("<f4")
    vectors[9] = vectors[8] + 0.01 * generator.normal(size=6000).astype("<f4")
    analysis = one_call_trace(tmp_path, {"features": vectors}).analysis
    layer = analysis.layer()
    assert layer is not None and layer.space.width == features.MAX_WIDTH // 4
    frame = analysis.near_duplicates()
    assert {frame["input_id"][0], frame["other_input_id"][0]} == {"s8", "s9"}


@pytest.mark.parametrize(
    "values, sentence",
    [
        (np.ones((10, 4), "<f4"), "All samples of the newest epoch have equal features."),
        (np.full((10, 4), np.nan, "<f4"), "Fewer than three samples"),
        (np.ones((2, 4), "<f4"), "Fewer than three samples"),
        (np.ones((10, 0), "<f4"), "Fewer than three samples"),
        (np.ones((10, 0, 3), "<f4"), "Fewer than three samples"),
    ],
)
def test_a_layer_that_cannot_be_mapped_says_why(tmp_path: Path, values: np.ndarray, sentence: str) -> None:
    analysis = one_call_trace(tmp_path, {"features": values}).analysis
    for table in (analysis.embedding(), analysis.outliers(), analysis.near_duplicates(), analysis.drift()):
        assert len(table) == 0
    assert any(sentence in note for note in analysis.notes())


def test_of_many_samples_a_bounded_share_is_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "MAX_REFERENCE_ROWS", 100)
    monkeypatch.setattr(layers, "MAX_MAP_ROWS", 50)
    trace, _ = classifier_trace(tmp_path, samples=400)
    analysis = trace.analysis
    layer = analysis.layer()
    assert layer is not None and layer.space.reference is not None
    assert 60 < len(layer.space.reference.input_ids) <= 100
    # The same samples in every epoch, and every row is compared all the same.
    maps = [set(layer.maps[epoch].input_ids) for epoch in layer.epochs]
    assert maps[0] == maps[-1] and 20 < len(maps[0]) <= 50
    assert not analysis.label_issues()["neighbour_disagreement"].isna().any()
    assert "chosen by a hash of their ids" in analysis.notes()[-1]


def test_of_many_epochs_the_first_the_last_and_some_between_are_read(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(10, 4)).astype("<f4")
    analysis = one_call_trace(tmp_path, {"features": vectors}, epochs=tuple(range(40))).analysis
    frame = analysis.drift()
    assert (
        frame["from_epoch"].min() == 0
        and frame["to_epoch"].max() == 39
        and len(frame) == layers.MAX_EPOCHS - 1
    )
    assert "features were read of 12 of 40 epochs" in analysis.notes()[-1]
    assert len(analysis.embedding(n_epoch=20)) == 10  # also one that was not among them


def test_fields_of_tensors_are_layers_and_scalars_are_not(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    columns = {
        "body": Column(np.ones((2, 3), "<f4")),
        "logits": Column(np.ones((2, 2), "<f4")),
        "weight": Column(np.ones(2), "float"),
        "camera": Column(["a", "b"], "str"),
        "box": Column(np.ones((2, 4), "<f4")),
    }
    writer.call(0, ["a", "b"], columns)
    writer.write()
    analysis = open_trace("model", "v1", tmp_path).analysis
    assert analysis.layers == ["body", "box"]
    with pytest.raises(InvalidInputError, match="there is no layer 'camera'; the trace has 'body', 'box'"):
        analysis.drift("camera")
    assert analysis.embedding("logits").empty  # known, but constant
    with pytest.raises(InvalidInputError, match="there is no method 'tsne'"):
        analysis.embedding(method="tsne")


def test_a_map_by_umap_has_the_same_samples(tmp_path: Path) -> None:
    pytest.importorskip("umap")
    trace, _ = classifier_trace(tmp_path)
    one, other = trace.analysis.embedding(), trace.analysis.embedding(method="umap")
    assert one["input_id"].tolist() == other["input_id"].tolist()
    assert np.isfinite(other[["x", "y"]].to_numpy()).all()
