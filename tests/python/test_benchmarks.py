"""The benchmarks themselves, with tiny sizes: they run, their results have one form, and a run that lost or
changed something has no figure."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import report
from benchmarks.baselines import ALL, Baseline
from benchmarks.baselines.lmdb_msgpack import LmdbInThread
from benchmarks.cpu import (
    baselines,
    drop,
    export,
    hook_cost,
    import_time,
    rival,
    scaling,
    sustained,
    training_overhead,
    upload,
)
from benchmarks.cpu.__main__ import BENCHMARKS
from benchmarks.harness.machine import ROOT, describe_machine
from benchmarks.harness.results import Findings, write_results
from benchmarks.harness.setting import Setting, WrongDataError
from benchmarks.instructions import counting
from ml_debugger import benchmarking, errors

LIMITS = ROOT / "benchmarks" / "limits"
QUESTIONS = (hook_cost, training_overhead, sustained, rival, export, drop, upload, scaling, import_time)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    folders = [tmp_path / name for name in ("memory", "disk")]
    for folder in folders:
        folder.mkdir()
    return Setting(torch.device("cpu"), True, folders[0], folders[1], 0)


def all_losses(value: Any) -> list[dict[str, Any]]:
    return list(report._losses(value))


def written(findings: Findings, module: ModuleType, folder: Path) -> dict[str, Any]:
    """What is written of findings."""
    path = write_results(
        folder, module.NAME, module.QUESTION, describe_machine(torch.device("cpu")), findings
    )
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.parametrize("module", QUESTIONS, ids=lambda module: module.NAME)
def test_a_question_is_answered_with_machine_options_samples_and_losses(
    module: ModuleType, setting: Setting, tmp_path: Path
) -> None:
    if module is upload:
        for package in ("httpx", "starlette", "uvicorn"):
            pytest.importorskip(package)
    findings = module.measure(setting)
    document = written(findings, module, tmp_path)
    for key in ("name", "question", "machine", "options", "summary", "samples"):
        assert document[key], key
    for key in ("cpu", "torch", "lmdb", "git_revision", "date", "python", "package"):
        assert key in document["machine"]
    assert document["options"]["quick"] is True
    losses = all_losses(document["summary"])
    assert losses
    assert all(counted["rows_submitted"] == counted["rows_committed"] > 0 for counted in losses)
    assert findings.bars
    assert not list(setting.memory_dir.iterdir())
    opening = module.__doc__ or ""
    assert opening.startswith("Question: ")
    assert "\nMethod: " in opening
    assert "\nExcluded: " in opening


def test_every_tool_that_is_installed_is_compared_and_the_others_are_named(setting: Setting) -> None:
    with pytest.MonkeyPatch.context() as patch:
        light = [tool for tool in ALL if not tool.requires or tool.requires[0] in ("lmdb", "safetensors")]
        heavy = [tool for tool in ALL if tool not in light]
        for tool in heavy:  # their packages take seconds to import
            patch.setattr(tool, "requires", ("a_package_that_nobody_has",))
        findings = baselines.measure(setting)
    job = findings.summary["jobs"][0]
    assert set(findings.summary["skipped"]) >= {tool.name for tool in heavy}
    compared = {baselines.Tracer, baselines.DurableTracer, *(t for t in light if t.missing() is None)}
    assert set(job["arms"]) == {tool.name for tool in compared}
    assert not job["failed"]
    assert job["captured_bytes_a_step"] == 4 * (4 * 512 + 4 * 100 + 8 + (16 << 10))


class Forgetful(Baseline):
    """Stores every second step."""

    name = "forgetful"
    steps = 0

    def open(self) -> None:
        self.kept: list[tuple[list[str], dict[str, np.ndarray[Any, Any]]]] = []

    def save(self, ids: list[str], columns: dict[str, torch.Tensor]) -> None:
        self.steps += 1
        if self.steps % 2:
            self.kept.append((ids, {name: values.clone().numpy() for name, values in columns.items()}))

    def read(self) -> dict[str, np.ndarray[Any, Any]]:
        names = self.kept[0][1]
        columns = {name: np.concatenate([step[name] for _, step in self.kept]) for name in names}
        return {**columns, "input_id": np.concatenate([ids for ids, _ in self.kept])}


class Careless(Baseline):
    """Stores the tensors themselves and changes one."""

    name = "careless"

    def open(self) -> None:
        self.kept: list[tuple[list[str], dict[str, np.ndarray[Any, Any]]]] = []

    save = Forgetful.save

    def read(self) -> dict[str, np.ndarray[Any, Any]]:
        columns = Forgetful.read(self)  # type: ignore[arg-type]
        columns["features"][-1, 0] += 1
        return columns


def test_a_tool_that_loses_or_changes_rows_has_no_figure(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Careless, "steps", 0, raising=False)
    _, found = baselines.time_job(
        setting,
        [baselines.Tracer, baselines.DurableTracer, Forgetful, Careless],
        4,
        training_overhead.FEATURE_LAYERS,
    )
    assert set(found["arms"]) == {"ml_debugger", "ml_debugger, power"}
    assert set(found["failed"]) == {"forgetful", "careless"}
    assert "WrongDataError" in found["failed"]["careless"]


def test_a_run_with_a_lost_row_has_no_figure(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    losses_of = sustained.settings.losses_of

    def one_lost(tracer: Any) -> dict[str, Any]:
        losses = losses_of(tracer)
        return {**losses, "rows_committed": losses["rows_committed"] - 1}

    monkeypatch.setattr(sustained.settings, "losses_of", one_lost)
    with pytest.raises(WrongDataError, match="lost rows"):
        sustained.write_traced(setting.disk_dir / "run", torch.zeros(4, 4), 2, "process")


def test_a_run_that_reads_back_different_has_no_figure(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_column = sustained.settings.read_column

    def one_bit(*arguments: Any, **selection: Any) -> Any:
        stored = read_column(*arguments, **selection).clone()
        stored.view(torch.uint8)[-1, -1] ^= 1
        return stored

    monkeypatch.setattr(sustained.settings, "read_column", one_bit)
    with pytest.raises(WrongDataError, match="reads back different"):
        sustained.write_traced(setting.disk_dir / "run", torch.zeros(4, 4), 2, "process")


def test_a_rival_that_forgets_rows_has_no_figure(setting: Setting) -> None:
    load = rival.Load(layers=2, batch_size=4, width=8, calls=3, disk_calls=3)
    rival.time_load(setting, load, setting.memory_dir, baselines.Tracer, LmdbInThread)
    with pytest.raises(WrongDataError, match="forgetful: expected"):
        rival.time_load(setting, load, setting.memory_dir, baselines.Tracer, Forgetful)


def test_the_programs_of_limits_are_short_and_without_us() -> None:
    programs = [path for path in LIMITS.iterdir() if path.is_file() and path.name != "run.py"]
    assert len(programs) >= 4
    for path in programs:
        text = path.read_text()
        assert len(text.splitlines()) < 80, path.name
        assert "ml_debugger" not in text, path.name


def some_results(folder: Path, *, quick: bool = False, committed: int = 10) -> None:
    ratio = {"median": 1.02, "low": 1.0, "high": 1.05}
    arm = {"ratio": ratio, "thread_ratio": ratio, "survives": "kill", "captured_bytes_per_s": 4e7}
    losses = {"rows_submitted": 10, "rows_committed": committed}
    jobs = [
        {"job": f"B = {batch}", "captured_bytes_a_step": batch * 2456, "arms": {"ml_debugger": arm, "x": arm}}
        for batch in (32, 256)
    ]
    summaries = {
        "cpu_baselines": {"jobs": jobs},
        "cpu_training_overhead": {
            "B = 256": {
                "arms": {
                    "untraced again": {"ratio": ratio, "thread_ratio": ratio},
                    "features, disk": {**arm, "losses": losses},
                }
            }
        },
    }
    folder.mkdir()
    for name, summary in summaries.items():
        machine = describe_machine(torch.device("cpu"))
        document = {"machine": machine, "options": {"quick": quick}, "summary": summary}
        (folder / f"{name}.json").write_text(json.dumps(document))


def test_the_report_writes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    some_results(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path / "results"), "--readme", str(readme)]
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert (
        "B = 256, features, disk, 40 MB/s | <= 1.01 | 1.020 (1.000 to 1.050); its thread's CPU 1.020 |"
        in text
    )
    assert "untraced again / untraced, B = 256 |  | 1.020 (1.000 to 1.050); its thread's CPU 1.020 |" in text
    assert report.main(arguments) == 0
    assert readme.read_text() == text


def test_a_rehearsal_and_a_lossy_result_are_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    some_results(tmp_path / "quick", quick=True)
    some_results(tmp_path / "lossy", committed=9)
    for folder, why in (("quick", "rehearsal"), ("lossy", "lost rows"), ("missing", "no results")):
        assert report.main(["--results", str(tmp_path / folder), "--readme", str(readme)]) == 1
        assert why in capsys.readouterr().err
    assert "old" in readme.read_text()


def test_the_readme_has_the_markers_of_the_report() -> None:
    text = (report.ROOT / "README.md").read_text()
    assert report.put_between_markers(text, "x").count(report.BEGIN) == 1


def test_make_bench_asks_every_question() -> None:
    assert set(BENCHMARKS.values()) == {*QUESTIONS, baselines}


# Instruction counts


def test_a_count_that_grows_by_more_than_a_tenth_is_told() -> None:
    recorded = {"hook": 1000, "call": 2000, "gone": 5}
    assert counting.grown(recorded, {"hook": 1100, "call": 1000, "gone": 5}) == []
    complaints = counting.grown(recorded, {"hook": 1101, "call": 2000})
    assert complaints == [
        "hook: 1000 instructions before, 1101 now (+10%)",
        "gone: 5 instructions before, not counted now",
    ]


def test_counts_are_made_of_the_differences_of_dumps(tmp_path: Path) -> None:
    totals = {"none-2/call": 100, "none-12/call": 600, "empty-2/call": 200, "empty-12/call": 1200}
    totals |= {"tracer-2/call": 1000, "tracer-12/call": 2500}
    for batch_size in counting.BATCHES:
        for calls in (counting.FEW_CALLS, counting.MANY_CALLS):
            totals[f"batch{batch_size}-{calls}/call"] = calls * 30
            totals[f"batch{batch_size}-{calls}/commit"] = 77 + calls * (10 + batch_size)
    for number, (name, total) in enumerate(totals.items()):
        text = f"desc: Trigger: Client Request: {name}\nsummary: {total}\n"
        (tmp_path / f"counts.{number}").write_text(text)
    counts = counting.derive(counting.read_dumps(tmp_path))
    assert counts["hook"] == round((1500 - 500) / counting.REPEATS / 10)
    assert counts["empty Python hook"] == round((1000 - 500) / counting.REPEATS / 10)
    assert counts["call, B = 32"] == 30
    assert counts["writer, a call of B = 32"] == 42
    assert counts["writer, a row"] == 1
    (tmp_path / "counts.0").unlink()
    with pytest.raises(counting.CannotCountError, match="none-2"):
        counting.derive(counting.read_dumps(tmp_path))


# The user's benchmark


def test_the_short_benchmark_says_what_limits_and_leaves_nothing_behind(tmp_path: Path) -> None:
    found = benchmarking.run(True, tmp_path / "disk")
    assert list((tmp_path / "disk").iterdir()) == []
    assert found.limit in ("hook", "ring", "disk")
    assert found.rows_committed > 0
    figures = found.as_dict()
    assert json.loads(json.dumps(figures)) == figures
    rates = [value for name, value in figures.items() if name.endswith("_per_s")]
    assert len(rates) == 5
    assert min(rates) > 0
    assert f"limit: {found.limit}" in str(found)


def report_of(**figures: Any) -> benchmarking.BenchmarkReport:
    values: dict[str, Any] = {
        "data_dir": "/d",
        "bytes": 1 << 28,
        "ring_bytes": 256 << 20,
        "commit_bytes": 32 << 20,
        "hook_us": 1.0,
        "call_us": 30.0,
        "copy_bytes_per_s": 8e9,
        "hook_bytes_per_s": 8e9,
        "process_bytes_per_s": 2e9,
        "power_bytes_per_s": 1e9,
        "disk_bytes_per_s": 1.1e9,
        "flush_ms": 1.0,
        "stalls": 0,
        "rows_committed": 1,
    }
    return benchmarking.BenchmarkReport(**{**values, **figures})


def test_the_part_that_limits_follows_from_the_rates() -> None:
    assert report_of().limit == "disk"
    assert any('durability="process"' in line for line in report_of().advice)
    assert report_of(power_bytes_per_s=7e9).limit == "hook"
    small = report_of(ring_bytes=64 << 20, power_bytes_per_s=5e8)
    assert small.limit == "ring"
    assert any("ring_bytes to 134217728" in line for line in small.advice)


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="cannot write"):
        benchmarking.run(True, tmp_path / "file" / "below")
