"""`trace.analysis`: what it says of logits and labels equals plain numpy over the whole trace."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from analysis_traces import SPLITS, Rows, classifier_trace, log_softmax, one_call_trace
from format_writer import Column, FormatWriter
from ml_debugger import load_export, open_trace
from ml_debugger.analysis import predictions, rows, samples
from ml_debugger.errors import InvalidInputError
from ml_debugger.exporting import export_trace
from ml_debugger.trace import Trace

pytest.importorskip("pandas")
metrics_of = pytest.importorskip("sklearn.metrics")

EPOCHS = range(4)
LOGITS = np.random.default_rng(1).normal(size=(12, 3)).astype("<f4")
LABELS = np.arange(12).astype("<i8") % 3


@pytest.fixture(params=["store", "npy"])
def recorded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Trace, Rows]:
    """A trace on disk, and its export."""
    trace, truth = classifier_trace(tmp_path / "data")
    if request.param == "store":
        return trace, truth
    directory = next(path.parent for path in (tmp_path / "data").rglob("version.json"))
    return load_export(export_trace(directory, tmp_path / "out.zip")), truth


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that end in the middle of calls."""
    monkeypatch.setattr(rows, "_MAX_BATCH_ROWS", 7)


def test_accuracy_and_loss_are_those_of_the_stored_logits(
    recorded: tuple[Trace, Rows], small_batches: None
) -> None:
    trace, truth = recorded
    frame = trace.analysis.metrics()
    assert list(zip(frame["n_epoch"], frame["dataset_type"], strict=True)) == [
        (e, s) for e in EPOCHS for s in SPLITS
    ]
    for _, row in frame.iterrows():
        own = truth.of(row["n_epoch"], row["dataset_type"])
        logs = log_softmax(own["logits"])
        assert row["rows"] == row["labelled"] == row["judged"] == len(own["ids"]) and row["nonfinite"] == 0
        assert row["accuracy"] == (own["logits"].argmax(1) == own["labels"]).mean()
        assert row["loss"] == pytest.approx(-logs[np.arange(len(logs)), own["labels"]].mean(), rel=1e-12)


def test_confusion_is_that_of_scikit_learn(recorded: tuple[Trace, Rows], small_batches: None) -> None:
    trace, truth = recorded
    frame = trace.analysis.confusion(n_epoch=1)
    assert set(frame["n_epoch"]) == {1}
    for split in SPLITS:
        own = truth.of(1, split)
        expected = metrics_of.confusion_matrix(own["labels"], own["logits"].argmax(1), labels=range(4))
        found = np.zeros((4, 4), int)
        for _, row in frame[frame["dataset_type"] == split].iterrows():
            found[row["label"], row["prediction"]] = row["rows"]
        np.testing.assert_array_equal(found, expected)


def test_dynamics_are_those_of_a_loop_over_epochs_and_samples(
    recorded: tuple[Trace, Rows], small_batches: None
) -> None:
    trace, truth = recorded
    frame = trace.analysis.dynamics().set_index(["dataset_type", "input_id"])
    assert len(frame) == 60
    for split in SPLITS:
        series: dict[str, list[tuple[int, int, float, float]]] = {}
        for epoch in EPOCHS:
            own = truth.of(epoch, split)
            chances = np.exp(log_softmax(own["logits"]))
            for one, label, row in zip(own["ids"], own["labels"], chances, strict=True):
                others = np.delete(row, label).max()
                series.setdefault(one, []).append((label, row.argmax(), row[label], row[label] - others))
        for one, entries in series.items():
            label, predicted, confidence, margin = map(np.array, zip(*entries, strict=True))
            right = label == predicted
            row = frame.loc[split, one]
            assert row["epochs"] == 4 and row["label"] == label[0] and row["prediction"] == predicted[-1]
            assert row["confidence"] == pytest.approx(confidence.mean())
            assert row["variability"] == pytest.approx(confidence.std(), abs=1e-7)
            assert row["margin"] == pytest.approx(margin.mean())
            assert row["correctness"] == right.mean()
            assert row["forgetting_events"] == (right[:-1] & ~right[1:]).sum()
            assert row["flips"] == (predicted[1:] != predicted[:-1]).sum()
            assert row["first_learned"] == (right.argmax() if right.any() else -1)


def test_labels_find_their_rows_where_some_calls_have_none(tmp_path: Path, small_batches: None) -> None:
    writer = FormatWriter(tmp_path)
    generator = np.random.default_rng(0)
    right = labelled = 0
    for number in range(30):
        count = number % 5 + 1
        logits = generator.normal(size=(count, 3)).astype("<f4")
        truths = None
        if number % 3:
            label = generator.integers(3, size=count).astype("<i8")
            truths = {"label": Column(label)}
            labelled += count
            right += int((logits.argmax(1) == label).sum())
        ids = [f"{number}-{row}" for row in range(count)]
        writer.call(number, ids, {"logits": Column(logits)}, truths, rank=number % 2)
    writer.write()
    row = open_trace("model", "v1", tmp_path).analysis.metrics().iloc[0]
    assert (row["labelled"], row["judged"]) == (labelled, labelled) and row["rows"] == 90
    assert row["accuracy"] == right / labelled


def test_labels_that_come_late_in_an_epoch_are_found(tmp_path: Path, small_batches: None) -> None:
    writer = FormatWriter(tmp_path)
    for number in range(5):
        truths = {"label": Column(LABELS)} if number == 4 else None
        writer.call(number, [f"{number}-{row}" for row in range(12)], {"logits": Column(LOGITS)}, truths)
    writer.write()
    row = open_trace("model", "v1", tmp_path).analysis.metrics().iloc[0]
    assert (row["rows"], row["labelled"], row["judged"]) == (60, 12, 12)


def test_of_a_repeated_sample_the_newest_row_counts(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    right, wrong = np.array([[5, 0]], "<f4"), np.array([[0, 5]], "<f4")
    label = {"label": Column(np.array([0], "<i8"))}
    for attempt, logits in enumerate((wrong, right)):
        writer.call(0, ["a"], {"logits": Column(logits)}, label, attempt=attempt)
    for number, logits in ((1, right), (2, wrong)):  # rows without an epoch are all kept
        writer.call(number, ["a"], {"logits": Column(logits)}, label, epoch=None)
    writer.write()
    frame = open_trace("model", "v1", tmp_path).analysis.metrics()
    assert frame[["n_epoch", "rows", "accuracy"]].values.tolist() == [[-1, 2, 0.5], [0, 1, 1.0]]


def test_rows_without_an_epoch_are_followed_by_the_newest_of_each_sample(tmp_path: Path) -> None:
    trace = one_call_trace(
        tmp_path, {"logits": LOGITS}, LABELS, ids=[f"s{row % 5}" for row in range(12)], epochs=(None, None)
    )
    frame = trace.analysis.dynamics().set_index("input_id")
    newest = {"s0": 10, "s1": 11, "s2": 7, "s3": 8, "s4": 9}
    chances = np.exp(log_softmax(LOGITS))
    for name, row in newest.items():
        assert frame.loc[name, "confidence"] == pytest.approx(chances[row, LABELS[row]])
        assert frame.loc[name, "epochs"] == 1


def test_outputs_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    logits = LOGITS.copy()
    logits[0, 1], logits[1, 2], logits[2] = np.nan, np.inf, -np.inf
    logits[3, (LABELS[3] + 1) % 3] = -np.inf  # a class that cannot be: fine
    analysis = one_call_trace(tmp_path, {"logits": logits}, LABELS).analysis
    row = analysis.metrics().iloc[0]
    assert (row["rows"], row["judged"], row["nonfinite"]) == (12, 9, 3)
    logs = log_softmax(logits[3:])
    assert row["loss"] == pytest.approx(-logs[np.arange(9), LABELS[3:]].mean())
    assert "6 labelled rows have outputs with NaN or +inf" in analysis.notes()[0]


def test_labels_that_name_no_class_are_not_judged(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:2] = -100, 3
    analysis = one_call_trace(tmp_path, {"logits": LOGITS}, labels).analysis
    assert analysis.metrics()["judged"].tolist() == [10, 10]
    assert analysis.notes()[0].startswith("4 rows are not judged: their labels do not name one of")


def test_outputs_of_another_number_of_classes_are_not_called_infinite(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    for epoch, width in ((0, 4), (1, 3)):
        outputs = np.ones((12, width), "<f4")
        ids = [str(row) for row in range(12)]
        writer.call(epoch, ids, {"logits": Column(outputs)}, {"label": Column(LABELS)}, epoch=epoch)
    writer.write()
    analysis = open_trace("model", "v1", tmp_path).analysis
    frame = analysis.metrics()
    assert frame["judged"].tolist() == [0, 12] and frame["nonfinite"].tolist() == [0, 0]
    (note,) = (one for one in analysis.notes() if "not judged" in one)
    assert note.startswith("12 rows") and "outputs do not have one number for each" in note


def test_soft_labels_give_their_cross_entropy(tmp_path: Path) -> None:
    soft = np.exp(log_softmax(np.random.default_rng(2).normal(size=(12, 3)))).astype("<f4")
    row = one_call_trace(tmp_path, {"logits": LOGITS}, soft).analysis.metrics().iloc[0]
    assert row["loss"] == pytest.approx(-(soft * log_softmax(LOGITS)).sum(1).mean(), rel=1e-6)
    assert row["accuracy"] == (soft.argmax(1) == LOGITS.argmax(1)).mean()


@pytest.mark.parametrize("dtype", ["<i8", "?", "<f4", "u1"])
def test_one_output_is_the_logit_of_the_second_class(tmp_path: Path, dtype: str) -> None:
    logits = LOGITS[:, :1]
    labels = (np.arange(12) % 2).astype(dtype)
    row = one_call_trace(tmp_path, {"logits": logits}, labels).analysis.metrics().iloc[0]
    exact = logits[:, 0].astype(np.float64)
    expected = np.log1p(np.exp(-exact)) + (1 - labels.astype(float)) * exact
    assert row["loss"] == pytest.approx(expected.mean())
    assert row["accuracy"] == ((exact > 0) == labels.astype(bool)).mean()


def test_one_output_from_0_to_1_is_the_probability_of_the_second_class(tmp_path: Path) -> None:
    chances = 1 / (1 + np.exp(-LOGITS[:, :1].astype(np.float64)))
    labels = np.arange(12) % 2
    analysis = one_call_trace(tmp_path, {"logits": chances}, labels).analysis
    row = analysis.metrics().iloc[0]
    chance = np.where(labels == 1, chances[:, 0], 1 - chances[:, 0])
    assert row["loss"] == pytest.approx(-np.log(chance).mean())
    assert row["accuracy"] == ((chances[:, 0] > 0.5) == labels).mean()
    assert any("taken for the probability of class 1" in note for note in analysis.notes())


def test_probabilities_are_taken_for_what_they_are(tmp_path: Path) -> None:
    chances = np.exp(log_softmax(LOGITS)).astype("<f4")
    analysis = one_call_trace(tmp_path, {"logits": chances}, LABELS).analysis
    expected = -np.log(chances[np.arange(12), LABELS]).mean()
    assert analysis.metrics()["loss"][0] == pytest.approx(expected, rel=1e-6)
    assert any("taken for probabilities" in note for note in analysis.notes())


@pytest.mark.parametrize(
    "logits, labels, sentence",
    [
        (LOGITS, None, "There are no labels."),
        (LOGITS, np.ones((12, 3), "<f4"), "several classes a sample (multi-label)"),
        # Some rows name one class, by chance.
        (LOGITS, np.array([[1, 0, 0], [1, 0, 1]] * 6, "<f4"), "several classes a sample (multi-label)"),
        (LOGITS, np.full(12, 0.5, "<f4"), "numbers with fractions"),
        (LOGITS, np.zeros((12, 4, 4), "<i8"), "a label of shape (4, 4) and 3 outputs"),
        (LOGITS, [np.zeros(row + 1) for row in range(12)], "not numbers of one shape"),
        (LOGITS.reshape(12, 3, 1), LABELS, "outputs of shape (3, 1)"),
        ([np.zeros(row + 1) for row in range(12)], LABELS, "outputs are not numbers of one shape"),
        (LOGITS[:, 0], np.full(12, 0.5, "<f4"), "labels that are not 0 or 1"),
        (LOGITS[:, 0], None, "one output a sample does not tell classes"),
        (LOGITS.astype("<c8"), LABELS, "outputs are not numbers of one shape"),
    ],
)
def test_what_cannot_be_judged_is_said_in_a_sentence(
    tmp_path: Path, logits: object, labels: object, sentence: str
) -> None:
    analysis = one_call_trace(tmp_path, {"logits": logits}, labels).analysis
    assert any(sentence in note for note in analysis.notes())
    frame = analysis.metrics()
    assert frame["rows"].tolist() == [12, 12] and frame["judged"].tolist() == [0, 0]
    assert frame["accuracy"].isna().all()
    for table in (analysis.confusion(), analysis.dynamics(), analysis.label_issues()):
        assert len(table) == 0 and len(table.columns) > 4


def test_a_text_field_that_names_the_classes_is_found(tmp_path: Path) -> None:
    names = [("zero", "one", "two")[label] for label in LABELS]
    found = one_call_trace(tmp_path / "one", {"logits": LOGITS}, LABELS, names=names).analysis
    assert found.predictions.class_names == {0: "zero", 1: "one", 2: "two"}
    names[11] = "zero"  # the name of another class
    found = one_call_trace(tmp_path / "two", {"logits": LOGITS}, LABELS, names=names).analysis
    assert found.predictions.class_names == {}


def test_of_too_many_samples_a_share_is_followed_the_same_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MAX_SAMPLES", 30)
    trace, _ = classifier_trace(tmp_path, samples=200)
    analysis = trace.analysis
    frame = analysis.dynamics()
    assert 10 < len(frame) < 60 and set(frame["epochs"]) == {4}
    assert analysis.metrics()["rows"].sum() == 800
    assert any("15.0%, chosen by a hash of their ids, were followed" in note for note in analysis.notes())


def test_samples_that_never_come_again_do_not_push_out_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "MAX_SAMPLES", 12)
    writer = FormatWriter(tmp_path)
    for epoch in range(300):
        ids = ["always"] + [f"{epoch}-{row}" for row in range(11)]
        writer.call(
            epoch, ids, {"logits": Column(LOGITS)}, {"label": Column(LABELS)}, epoch=epoch, inline=["logits"]
        )
    writer.write()
    analysis = open_trace("model", "v1", tmp_path).analysis
    frame = analysis.dynamics().set_index("input_id")
    assert frame.loc["always", "epochs"] == 300 and len(frame) == int(1.1 * 12) + 1000
    assert any("More samples came than can be followed" in note for note in analysis.notes())


def test_too_many_classes_leave_the_ranking_to_the_margins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_PROBABILITIES", 10)
    trace, _ = classifier_trace(tmp_path)
    frame = trace.analysis.label_issues()
    assert frame["is_issue"].isna().all()
    margins = trace.analysis.dynamics().set_index(["dataset_type", "input_id"])["margin"]
    for _, row in frame.iterrows():
        expected = (margins[row["dataset_type"], row["input_id"]] + 1) / 2
        assert row["label_quality"] == pytest.approx(expected)


def test_epochs_do_not_count_against_the_bound_on_samples_times_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "MAX_PROBABILITIES", 60 * 4)
    trace, _ = classifier_trace(tmp_path, epochs=4, samples=60, classes=4)
    expected = trace.analysis.label_issues()
    assert expected["is_issue"].notna().all()
    monkeypatch.setattr(samples, "MAX_PROBABILITIES", 60 * 4 - 1)
    assert trace.analysis.label_issues()["is_issue"].isna().all()


def test_a_trace_without_rows_gives_empty_tables(tmp_path: Path) -> None:
    FormatWriter(tmp_path).write()
    analysis = open_trace("model", "v1", tmp_path).analysis
    tables = [analysis.metrics(), analysis.confusion(), analysis.dynamics(), analysis.label_issues()]
    tables += [analysis.outliers(), analysis.near_duplicates(), analysis.drift(), analysis.embedding()]
    assert all(len(table) == 0 and len(table.columns) for table in tables)
    assert analysis.notes()[0] == "There are no rows."


@pytest.mark.parametrize("package", ["pandas", "sklearn"])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    trace, _ = classifier_trace(tmp_path, samples=8)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidInputError, match=f"needs {package}") as raised:
        _ = trace.analysis
    assert raised.value.hint == 'pip install "ml-debugger[report]"'


def test_the_capture_names_losses_by_cause_and_figures_by_epoch(tmp_path: Path) -> None:
    writer = FormatWriter(tmp_path)
    writer.call(0, ["a", "b"], {"logits": Column(np.ones((2, 2), "<f4"))})
    writer.gap(5, 6, 7, "ring_full", epoch=0)
    writer.write()
    frame = (
        open_trace("model", "v1", tmp_path).analysis.capture().set_index(["scope", "name", "figure"])["value"]
    )
    assert frame["trace", "", "rows"] == 2 and frame["trace", "", "lost_rows"] == 7
    assert frame["lost", "ring_full", "rows"] == 7
    assert frame["epoch", "0", "calls"] == 1 and frame["rank", "0", "rows"] == 2
