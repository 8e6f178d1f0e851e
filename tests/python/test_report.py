"""The report: one HTML file that needs nothing else, shows hostile names as text, and says why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis_traces import classifier_trace, one_call_trace
from format_writer import Column, FormatWriter
from ml_debugger import TracerConfig, load_export, open_trace
from ml_debugger.errors import InvalidInputError, InvalidTypeError, StorageError
from ml_debugger.exporting import export_trace
from ml_debugger.report import write_report
from ml_debugger.report.document import build_document
from ml_debugger.trace import Trace
from ml_debugger.training import ClassificationTracer

pytest.importorskip("pandas")
pytest.importorskip("sklearn")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = [
    "</script ><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;b&gt;\"'`${1}$title",
    "\u2028\u2029\x00\x1b[31m",
    "x" * 5000,
]
GENERATOR = np.random.default_rng(4)
LOGITS = GENERATOR.normal(size=(24, 3)).astype("<f4")
FEATURES = GENERATOR.normal(size=(24, 5)).astype("<f4")
LABELS = (np.arange(24) % 3).astype("<i8")


def figures_in(path: Path) -> dict[str, Any]:
    """The document that a page contains."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)
    assert found is not None
    return dict(json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))


def in_browser(page: Path, folder: Path) -> str:
    """The page after its program ran; fails if the browser has something to say about it."""
    if BROWSER is None:
        pytest.skip("needs chromium")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    command = [BROWSER, *options, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert done.returncode == 0 and not said, said
    return done.stdout


class Loads(HTMLParser):
    """Collects what a page would fetch, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "href", "data", "action")
        ]


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    trace, _ = classifier_trace(tmp_path / "data")
    text = write_report(trace, tmp_path / "r.html").read_text(encoding="utf-8")
    page = Loads()
    page.feed(text)
    assert page.addresses == ["data:,"] and "default-src 'none'" in text
    assert page.tags.count("script") == 2 and not {"img", "iframe", "link"} & set(page.tags) - {"link"}
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert not re.search(
        r"https?://|url\(|@import|fetch\(|XMLHttpRequest|innerHTML|document\.write", without_namespace
    )


def test_the_page_holds_the_numbers_of_the_tables(tmp_path: Path) -> None:
    trace, _ = classifier_trace(tmp_path / "data")
    figures = figures_in(write_report(trace, tmp_path / "r.html"))
    analysis = trace.analysis

    def same(found: list[dict[str, Any]], frame: Any) -> None:
        assert len(found) == len(frame)
        for row, (_, expected) in zip(found, frame.iterrows(), strict=True):
            for name, value in row.items():
                assert value == (
                    pytest.approx(expected[name], rel=1e-8) if type(value) is float else expected[name]
                )

    same(figures["metrics"], analysis.metrics())
    same(figures["label_issues"]["rows"], analysis.label_issues())
    layer = figures["layers"][0]
    same(layer["drift"], analysis.drift())
    same(layer["outliers"], analysis.outliers())
    same(layer["near_duplicates"], analysis.near_duplicates())
    confusion = {
        (table["n_epoch"], table["dataset_type"], label, prediction): rows
        for table in figures["confusion"]["tables"]
        for label, prediction, rows in table["pairs"]
    }
    assert confusion == {tuple(row[:4]): row[4] for row in analysis.confusion().values.tolist()}
    assert figures["dynamics"]["samples"] == len(analysis.dynamics())
    last = layer["map"]["epochs"][-1]
    names = [tuple(layer["map"]["samples"][place]) for place in last["sample"]]
    frame = analysis.embedding()
    assert names == list(zip(frame["dataset_type"], frame["input_id"], strict=True))
    assert np.corrcoef(last["x"], frame["x"])[0, 1] > 0.9999


def hostile_trace(data_dir: Path) -> Trace:
    """Every name that a user can choose is hostile."""
    writer = FormatWriter(data_dir, model=HOSTILE[0], version=HOSTILE[1], aliases=[HOSTILE[2]])
    names = [HOSTILE[label] for label in LABELS]
    for epoch in range(2):
        for number, split in enumerate(HOSTILE[:2]):
            columns = {"<b>layer</b>": Column(FEATURES), "logits": Column(LOGITS)}
            ids = [HOSTILE[row % 5] + str(row) for row in range(24)]
            truths = {"label": Column(LABELS), "name": Column(names, "str")}
            writer.call(2 * epoch + number, ids, columns, truths, epoch=epoch, dataset_type=split)
    writer.gap(90, 91, 3, HOSTILE[0], epoch=0)
    writer.write()
    return open_trace(HOSTILE[0], HOSTILE[1], data_dir)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    path = write_report(hostile_trace(tmp_path / "data"), tmp_path)
    text = path.read_text(encoding="utf-8")
    page = Loads()
    page.feed(text)
    assert page.addresses == ["data:,"] and "img" not in page.tags and page.tags.count("script") == 2
    figures = figures_in(path)
    assert figures["model_name"] == HOSTILE[0] and figures["class_names"]["1"] == HOSTILE[1]
    assert max(len(row["input_id"]) for row in figures["label_issues"]["rows"]) == 200
    assert path.name.endswith("_report.html") and path.parent == tmp_path and "/" not in path.name


def test_hostile_names_stay_text_in_a_browser(tmp_path: Path) -> None:
    path = write_report(hostile_trace(tmp_path / "data"), tmp_path / "r.html")
    drawn = in_browser(path, tmp_path)
    page = Loads()
    page.feed(drawn)
    assert "img" not in page.tags and page.tags.count("script") == 2
    assert "&lt;/script &gt;&lt;img src=x onerror=alert(1)&gt;" in drawn


def test_a_browser_draws_every_section(tmp_path: Path) -> None:
    trace, _ = classifier_trace(tmp_path / "data")
    drawn = in_browser(write_report(trace, tmp_path / "r.html"), tmp_path)
    for name in ("learning", "confusion", "map", "labels", "dynamics", "neighbours", "drift", "capture"):
        assert f'<section id="{name}">' in drawn
    assert drawn.count("<canvas") == 2 and drawn.count("<svg") == 5 and "<polyline" in drawn


def odd_traces() -> dict[str, dict[str, Any]]:
    """Traces that lack something, or have something unusual."""
    both = {"features": FEATURES, "logits": LOGITS}
    logits = {"logits": LOGITS}
    ragged = [np.ones((row % 3 + 1, 4), "<f4") * row for row in range(24)]
    maps = {"features": GENERATOR.normal(size=(24, 4, 3, 3)), "logits": np.ones((24, 3, 4, 4))}
    impossible = np.where(np.eye(3)[LABELS] > 0, -np.inf, LOGITS)
    nan = np.float32("nan")
    return {
        "no labels": {"features": both},
        "no epochs": {"features": both, "label": LABELS, "epochs": (None,)},
        "epochs and none": {"features": logits, "label": LABELS, "epochs": (None, 0, 1)},
        "one epoch": {"features": both, "label": LABELS, "epochs": (7,)},
        "no layer": {"features": logits, "label": LABELS},
        "no logits": {"features": {"features": FEATURES}, "label": LABELS},
        "soft labels": {"features": both, "label": np.full((24, 3), 1 / 3, "<f4")},
        "multi-label": {"features": both, "label": np.ones((24, 3), "<i8")},
        "one class": {"features": both, "label": np.zeros(24, "<i8")},
        "one output": {"features": both | {"logits": LOGITS[:, 0]}, "label": LABELS % 2},
        "one output, other labels": {"features": {"logits": LOGITS[:, :1]}, "label": LABELS},
        "all NaN": {"features": {"features": FEATURES * nan, "logits": LOGITS * nan}, "label": LABELS},
        "constant": {"features": {"features": FEATURES * 0, "logits": LOGITS * 0}, "label": LABELS},
        "tokens": {"features": both | {"features": GENERATOR.normal(size=(24, 7, 5))}, "label": LABELS},
        "ragged": {"features": both | {"features": ragged}, "label": LABELS},
        "segmentation": {"features": maps, "label": np.zeros((24, 4, 4), "<i8")},
        "integer logits": {"features": {"logits": np.arange(72).reshape(24, 3)}, "label": LABELS},
        "infinite loss": {"features": {"logits": impossible}, "label": LABELS},
        "labels out of range": {"features": logits, "label": LABELS + 100},
        "two samples": {"features": {name: one[:2] for name, one in both.items()}, "label": LABELS[:2]},
        "one id": {"features": both, "label": LABELS, "ids": [""] * 24, "epochs": (None, 0)},
        "text alone": {"features": logits, "names": ["<b>"] * 24},
    }


@pytest.mark.parametrize("kind", odd_traces())
def test_whatever_the_trace_is_there_is_a_report(tmp_path: Path, kind: str) -> None:
    trace = one_call_trace(tmp_path / "data", **odd_traces()[kind])
    figures = figures_in(write_report(trace, tmp_path / "r.html"))
    for name in ("confusion", "dynamics", "label_issues"):
        section = figures[name]
        has_content = section.get("tables") or section.get("points") or section.get("rows")
        assert bool(section["why"]) != bool(has_content), section["why"]
    for layer in figures["layers"]:
        assert bool(layer["why"]) != bool(layer.get("map", {}).get("epochs"))
    assert bool(figures["layers"]) != ("No layer was recorded." in figures["notes"])


def test_a_browser_draws_reports_on_odd_traces(tmp_path: Path) -> None:
    for number, kind in enumerate(
        ("no labels", "no epochs", "no layer", "all NaN", "one epoch", "infinite loss")
    ):
        trace = one_call_trace(tmp_path / str(number), **odd_traces()[kind])
        drawn = in_browser(write_report(trace, tmp_path / "r.html"), tmp_path)
        assert drawn.count("<section") == 8, kind
    FormatWriter(tmp_path / "empty").write()
    drawn = in_browser(
        write_report(open_trace("model", "v1", tmp_path / "empty"), tmp_path / "r.html"), tmp_path
    )
    assert drawn.count("<section") == 8


def test_an_export_has_the_report_of_its_trace(tmp_path: Path) -> None:
    trace, _ = classifier_trace(tmp_path / "data")
    directory = next(path.parent for path in (tmp_path / "data").rglob("version.json"))
    archive = load_export(export_trace(directory, tmp_path / "out.zip"))
    one, other = build_document(trace), build_document(archive)
    for name in ("metrics", "confusion", "dynamics", "layers", "label_issues", "notes"):
        assert one[name] == other[name]
    assert other["capture"]["totals"]["rows"] == 240


def test_the_page_stays_small_however_many_samples_epochs_and_classes(tmp_path: Path) -> None:
    rows, ids = 3000, [f"{row:060d}" for row in range(3000)]
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    with ClassificationTracer(
        model, "model", "v1", {"features": "0"}, config=TracerConfig(data_dir=tmp_path)
    ) as tracer:
        for epoch in range(20):
            tracer(torch.randn(rows, 100), torch.randint(100, (rows,)), ids, "train", epoch)
    path = write_report(open_trace("model", "v1", tmp_path), tmp_path / "r.html")
    assert path.stat().st_size < 3e6
    figures = figures_in(path)
    assert len(figures["confusion"]["tables"]) == 12
    table = figures["confusion"]["tables"][0]
    assert len(table["pairs"]) == 2500 or len(table["pairs"]) == table["all"] < 3000
    assert len(figures["layers"][0]["map"]["epochs"][0]["x"]) == 2000


def test_layers_are_chosen_by_name_and_the_last_four_otherwise(tmp_path: Path) -> None:
    columns = {f"layer{number}": FEATURES + number for number in range(6)} | {"logits": LOGITS}
    trace = one_call_trace(tmp_path, columns, LABELS)
    found = build_document(trace)
    assert [layer["name"] for layer in found["layers"]] == [f"layer{number}" for number in range(2, 6)]
    assert "Layers that were left out: 'layer0', 'layer1'." in found["notes"]
    found = build_document(trace, ["layer1", "logits"])
    assert [layer["name"] for layer in found["layers"]] == ["layer1", "logits"]
    assert found["label_issues"]["layer"] == "logits"
    with pytest.raises(InvalidInputError, match="there is no layer 'head'"):
        build_document(trace, ["head"])


def test_a_report_is_written_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, _ = classifier_trace(tmp_path / "data", samples=12, epochs=2)
    path = tmp_path / "new" / "r.htm"
    assert write_report(trace, path) == path
    before = path.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left on device"):
            write_report(trace, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["r.htm"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_report(trace, tmp_path / "file" / "r.html")
    with pytest.raises(InvalidInputError, match="non-empty path"):
        write_report(trace, "")
    with pytest.raises(InvalidTypeError, match="must be a path, got int"):
        write_report(trace, 3)  # type: ignore[arg-type]


def test_waits_and_throughput_of_a_tracer_are_in_the_report(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    with ClassificationTracer(model, "m", "v", {"h": "0"}, config=TracerConfig(data_dir=tmp_path)) as tracer:
        for epoch in range(2):
            tracer(torch.randn(8, 4), torch.arange(8) % 2, range(8), "train", epoch)
        tracer.flush()
        found = build_document(open_trace("m", "v", tmp_path))  # while it writes
    (writer,) = found["capture"]["writers"]
    assert writer["rows_committed"] == writer["rows_submitted"] == 16 and writer["commits"] >= 1
    assert writer["stalls"] == 0 and writer["stall_seconds"] == 0
    assert writer["write_throughput_bytes_per_s"] > 0
    assert found["capture"]["totals"]["lost_rows"] == 0


def test_a_method_that_is_missing_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, _ = classifier_trace(tmp_path / "data", samples=12, epochs=2)
    monkeypatch.setitem(sys.modules, "umap", None)
    read: list[int] = []
    with pytest.raises(InvalidInputError, match=re.escape('pip install "ml-debugger[umap]"')):
        write_report(trace, tmp_path / "r.html", map_method="umap", progress=read.append)
    with pytest.raises(InvalidInputError, match="there is no method 'tsne'"):
        write_report(trace, tmp_path / "r.html", map_method="tsne", progress=read.append)
    assert not read and not (tmp_path / "r.html").exists()


def test_maps_by_umap_show_the_newest_epoch(tmp_path: Path) -> None:
    pytest.importorskip("umap")
    trace, _ = classifier_trace(tmp_path / "data", epochs=2)
    found = build_document(trace, map_method="umap")["layers"][0]["map"]
    assert found["method"] == "umap" and [one["n_epoch"] for one in found["epochs"]] == [1]
    assert len(found["epochs"][0]["x"]) == 60


def test_the_script_takes_screenshots_of_a_report(tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("needs chromium")
    trace, _ = classifier_trace(tmp_path / "data")
    page = write_report(trace, tmp_path / "r.html")
    script = Path(__file__).resolve().parents[2] / "scripts" / "screenshots.py"
    command = [sys.executable, str(script), str(page), "--out", str(tmp_path / "images")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    images = sorted((tmp_path / "images").iterdir())
    committed = sorted(path.name for path in (script.parents[1] / "docs" / "images").glob("report*.png"))
    assert [path.name for path in images] == committed
    for path in images:
        assert (
            path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
        )  # more than a blank page


# ---- the command ----


def run(folder: Path, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ml_debugger.cli", "report", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=100,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def test_the_command_writes_the_file_and_prints_its_path(tmp_path: Path) -> None:
    classifier_trace(tmp_path / "data", epochs=2)
    done = run(tmp_path, "model", "v1", "--data-dir", "data")
    path = tmp_path / "model_v1_report.html"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    done = run(
        tmp_path, "model", "v1", "--data-dir", "data", "--output", "a/b.html", "--layer", "logits", "--json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed, written = json.loads(done.stdout), figures_in(tmp_path / "a" / "b.html")
    assert printed["path"] == "a/b.html" and printed["bytes"] == (tmp_path / "a" / "b.html").stat().st_size
    for name in ("metrics", "confusion", "label_issues", "notes", "capture"):
        assert printed[name] == written[name]
    assert [layer["name"] for layer in printed["layers"]] == ["logits"]
    assert printed["layers"][0]["drift"] == written["layers"][0]["drift"]


def test_the_command_ends_with_the_status_of_the_others(tmp_path: Path) -> None:
    classifier_trace(tmp_path / "data", epochs=1, samples=12)
    for arguments, status, said in (
        (("model", "v2"), 1, "error: no trace at"),
        (("model",), 2, "Missing argument 'VERSION'"),
        (("model", "v1", "--layer", "head"), 2, "there is no layer 'head'; the trace has 'features'"),
        (("model", "v1", "--map", "tsne"), 2, "'tsne'"),
        (("model", "v1", "--output", ""), 2, "expected a file"),
        (("model", "v1", "--output", "data/model/x"), 0, ""),
    ):
        done = run(tmp_path, *arguments, "--data-dir", "data")
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr, arguments
        assert bool(done.stdout) == (status == 0)
    (tmp_path / "pandas.py").write_text("raise ImportError('hidden')")
    done = run(
        tmp_path,
        "model",
        "v1",
        "--data-dir",
        "data",
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert done.returncode == 1 and 'pip install "ml-debugger[report]"' in done.stderr
