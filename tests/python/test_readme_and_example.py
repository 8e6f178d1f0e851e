"""The README's code runs as it stands, and the example prints what its export holds."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ml_debugger
from ml_debugger import TracerConfig, open_trace
from ml_debugger.training import ClassificationTracer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "digits.py"
SEGMENTATION = ROOT / "examples" / "segmentation.py"
README = ROOT / "README.md"
EPOCHS = 2
MAX_SECONDS = 100

COMPARISON = re.compile(
    r"^ +(\d+)  (train|val) +(\d+) / (\d+) = +([\d.]+)% +(\d+) / (\d+) = +([\d.]+)%  (equal|DIFFERENT)$", re.M
)
MOMENT = re.compile(r"^  (before|after): +(\d+) rows, +([\d.]+) MB on disk, epochs (\[.*\])$", re.M)


def run(program: Path, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program as a user would, in ``folder``, with this test's package and without its settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLD_")}
    environment |= {
        "PYTHONWARNINGS": "error::RuntimeWarning",
        "OMP_NUM_THREADS": "1",
        "MLD_RING_BYTES": str(8 << 20),
    }
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS, check=False
    )


def python_blocks(page: Path = README) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("example")


@pytest.fixture(scope="module")
def example(folder: Path) -> subprocess.CompletedProcess[str]:
    """One run of the example: its output is what the tests below look at."""
    options = ["--epochs", str(EPOCHS), "--data-dir", "traces", "--output", "out.zip"]
    result = run(EXAMPLE, *options, folder=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def accuracies_of(archive_path: Path) -> dict[tuple[str, int], tuple[int, int]]:
    """(right answers, samples) by split and epoch, row by row, each label found by its row_id."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    with np.load(archive_path) as archive:
        label_of = dict(
            zip(archive["ground_truth/row_id"].tolist(), archive["ground_truth/label"].tolist(), strict=True)
        )
        rows = zip(
            archive["extracted_feature/row_id"].tolist(),
            archive["extracted_feature/dataset_type"].tolist(),
            archive["extracted_feature/n_epoch"].tolist(),
            archive["extracted_feature/logits"],
            strict=True,
        )
        for row_id, split, epoch, logits in rows:
            correct, samples = found.get((split, epoch), (0, 0))
            found[split, epoch] = (correct + int(np.argmax(logits) == label_of[row_id]), samples + 1)
    return found


def test_python_blocks_of_the_readme_run_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    program = tmp_path / "readme.py"
    program.write_text("\n".join(python_blocks()), encoding="utf-8")
    result = run(program, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert Path(lines[0]) == tmp_path / "mlp_v1.zip"
    base = "'row_id', 'input_id', 'dataset_type', 'n_epoch'"
    assert lines[1] == f"[0, 1, 2] [{base}, 'hidden', 'logits'] [{base}, 'label']"
    # 512 samples in batches of 64: the third epoch is the calls 16 to 23.
    assert lines[3:11] == [f"{call} (64, 3)" for call in range(16, 24)]
    assert lines[11].startswith("UploadReport(segments_")
    assert len(lines) == 12


def test_shell_lines_of_the_readme_make_a_key_run_a_collector_and_upload(tmp_path: Path) -> None:
    for package in ("starlette", "uvicorn", "httpx"):
        pytest.importorskip(package)
    config = TracerConfig(data_dir=tmp_path / "mld_data")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with ClassificationTracer(model, "mlp", "v3", config=config) as tracer:
        tracer(torch.zeros(3, 2), None, ["a", "b", "c"], n_epoch=0)
    (block,) = re.findall(r"^```sh\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(block.splitlines()) == 3
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    lines = block.replace("8420", port).replace("serve --host", f"serve --port {port} --host")
    command = tmp_path / "bin" / "ml-debugger"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ml_debugger.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"set -m\n{lines}status=$?\nkill %1\nwait %1\nexit $status"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sent 1 segments" in done.stdout and "Traceback" not in done.stderr
    assert open_trace("mlp", "v3", tmp_path / "traces").num_rows("extracted_feature") == 3
    assert open_trace("mlp", "v3", tmp_path / "mld_data").num_rows("extracted_feature") == 3


PAGES = sorted([README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings of a page, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", ["record.md", "read.md", "export.md", "look.md"])
def test_python_blocks_of_the_pages_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    for package in ("pyarrow", "pandas", "sklearn"):
        pytest.importorskip(package)
    program = tmp_path / "page.py"
    program.write_text("\n".join(python_blocks(ROOT / "docs" / page)), encoding="utf-8")
    result = run(program, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_first_block_of_the_readme_has_fifteen_lines() -> None:
    assert len([line for line in python_blocks()[0].splitlines() if line]) == 15


def test_readme_quotes_what_the_setup_says_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "scripts" / "development_environment.py"
    specification = importlib.util.spec_from_file_location("development_environment", path)
    assert specification is not None and specification.loader is not None
    setup = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(setup)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(setup.SetupError) as raised:
        setup.check_compilers()
    assert f"[setup] {raised.value}" in " ".join(README.read_text(encoding="utf-8").split())


def test_example_prints_the_accuracies_that_its_export_holds(
    example: subprocess.CompletedProcess[str], folder: Path
) -> None:
    lines = COMPARISON.findall(example.stdout)
    assert len(lines) == 2 * EPOCHS
    held = accuracies_of(folder / "out.zip")
    assert len(held) == 2 * EPOCHS
    for epoch, split, *figures, verdict in lines:
        correct, samples = held[split, int(epoch)]
        expected = [str(correct), str(samples), f"{correct / samples:.2%}".rstrip("%")]
        assert figures == expected * 2
        assert verdict == "equal"


def test_example_records_every_sample_once_an_epoch(
    example: subprocess.CompletedProcess[str], folder: Path
) -> None:
    with np.load(folder / "out.zip") as archive:
        ids, epochs = archive["extracted_feature/input_id"], archive["extracted_feature/n_epoch"]
        names, labels = archive["ground_truth/digit_name"], archive["ground_truth/label"]
        assert archive["extracted_feature/conv"].shape == (EPOCHS * 1797, 32, 4, 4)
        assert archive["extracted_feature/hidden"].shape == (EPOCHS * 1797, 64)
        assert archive["extracted_feature/ink"].dtype == np.float64
    for epoch in range(EPOCHS):
        assert sorted(ids[epochs == epoch].tolist(), key=int) == [str(number) for number in range(1797)]
    assert set(zip(labels.tolist(), names.tolist(), strict=True)) >= {(0, "zero"), (9, "nine")}
    assert len(set(zip(labels.tolist(), names.tolist(), strict=True))) == 10
    rows = EPOCHS * 1797
    counts = f"{rows} rows submitted: {rows} committed, 0 discarded, 0 failed, 0 in flight"
    assert counts in example.stdout


def test_example_drops_one_epoch_and_gets_its_disk_space_back(
    example: subprocess.CompletedProcess[str], folder: Path
) -> None:
    before, after = MOMENT.findall(example.stdout)
    assert (before[0], after[0]) == ("before", "after")
    assert (int(before[1]), int(after[1])) == (EPOCHS * 1797, (EPOCHS - 1) * 1797)
    assert (before[3], after[3]) == ("[0, 1]", "[1]")
    now = sum(path.stat().st_blocks * 512 for path in (folder / "traces").rglob("*.mdb")) / 1e6
    assert float(after[2]) == pytest.approx(now, abs=0.1)
    assert float(after[2]) < 0.6 * float(before[2])
    trace = ml_debugger.open_trace("digits_cnn", "v1", data_dir=folder / "traces")
    assert trace.epochs == [1]
    assert trace.num_rows("ground_truth") == (EPOCHS - 1) * 1797


def test_example_ends_by_naming_its_report(example: subprocess.CompletedProcess[str], folder: Path) -> None:
    path = folder / "digits_cnn_v1_report.html"
    assert example.stdout.splitlines()[-1] == f"Report, to be opened in a browser: {path.relative_to(folder)}"
    text = path.read_text(encoding="utf-8")
    assert '"epochs":[0,1]' in text and '"class_names":{"0":"zero"' in text


def test_example_says_what_its_report_needs(folder: Path) -> None:
    (folder / "hidden").mkdir()
    (folder / "hidden" / "pandas.py").write_text("raise ImportError('there is none')\n")
    program = folder / "without.py"
    program.write_text(
        f"import sys; sys.path[:0] = [{str(folder / 'hidden')!r}, {str(EXAMPLE.parent)!r}]\n"
        "import digits; digits.main()\n"
    )
    result = run(program, "--epochs", "1", "--data-dir", "traces4", folder=folder)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("No report: the analysis needs pandas") and '"ml-debugger[report]"' in last


def test_example_shows_a_progress_bar(example: subprocess.CompletedProcess[str]) -> None:
    assert re.search(r"training: 100%.*60/60", example.stderr)


def test_example_is_deterministic_and_starts_anew_each_time(
    example: subprocess.CompletedProcess[str], folder: Path
) -> None:
    again = run(EXAMPLE, "--epochs", str(EPOCHS), "--data-dir", "traces2", "--output", "again", folder=folder)
    assert again.returncode == 0, again.stderr
    assert COMPARISON.findall(again.stdout) == COMPARISON.findall(example.stdout)
    first, second = (folder / "out.zip").read_bytes(), (folder / "again" / "digits_cnn_v1.zip").read_bytes()
    assert first == second


def test_segmentation_example_records_masks_and_scores(folder: Path) -> None:
    result = run(SEGMENTATION, "--epochs", "3", "--data-dir", "masks", folder=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    means = re.findall(r"^epoch (\d): 96 images, mean IoU ([\d.]+), worst ", result.stdout, re.M)
    assert [int(epoch) for epoch, _ in means] == [0, 1, 2]
    assert float(means[2][1]) > 1.5 * float(means[0][1])
    trace = ml_debugger.open_trace("segmentation", "v1", data_dir=folder / "masks")
    last = {table: trace.arrays(table, n_epoch=2) for table in ("extracted_feature", "ground_truth")}
    features, truth = last["extracted_feature"], last["ground_truth"]
    assert features["encoded"].shape == (96, 32, 8, 8)
    assert features["logits"].shape == (96, 3, 16, 16)
    assert sorted(map(int, truth["input_id"])) == list(range(96))
    # Intersection over union again, in numpy.
    predicted, masks = features["logits"].argmax(1).reshape(96, -1), truth["label"]
    for number in range(3):
        ours, theirs = predicted == number, masks == number
        union = (ours | theirs).sum(1)
        scores = np.where(union > 0, (ours & theirs).sum(1) / np.maximum(union, 1), 1)
        assert np.allclose(truth["iou"][:, number], scores, atol=1e-6)


def test_example_fails_when_the_export_holds_something_else(folder: Path) -> None:
    program = folder / "wrong.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import digits\n"
        "honest = digits.accuracies_in\n"
        "def one_more(path):\n"
        "    found = honest(path)\n"
        "    found['val', 0] = found['val', 0]._replace(correct=found['val', 0].correct + 1)\n"
        "    return found\n"
        "digits.accuracies_in = one_more\n"
        "digits.main()\n",
        encoding="utf-8",
    )
    result = run(program, "--epochs", "1", "--data-dir", "traces3", folder=folder)
    assert result.returncode == 1, result.stdout
    assert "FAILED: the export and the training loop disagree" in result.stderr
    assert [(split, verdict) for _, split, *_, verdict in COMPARISON.findall(result.stdout)] == [
        ("train", "equal"),
        ("val", "DIFFERENT"),
    ]
