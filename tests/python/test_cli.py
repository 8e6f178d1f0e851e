"""The command ``ml-debugger``, run as a process: what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from format_writer import Column, FormatWriter
from ml_debugger import load_export, open_trace
from test_export_zip import rich_trace

FIGURES = {"rows", "ground_truth_rows", "calls", "discarded_rows", "bytes"}
SUMMARY = FIGURES | {"model_name", "version_name", "directory", "epochs", "ranks", "writing"}
COMMANDS = ["ls", "info", "export", "upload", "drop", "verify", "report"]

WRITER = """
import sys, torch
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer
model = torch.nn.Sequential(torch.nn.Linear(3, 2))
config = TracerConfig(data_dir=sys.argv[1], ring_bytes=1 << 20)
with ClassificationTracer(model, "live", "v1", {"hidden": "0"}, config=config) as tracer:
    tracer(torch.ones(4, 3), [0, 1, 0, 1], list("abcd"), "train", 0)
    tracer.flush()
    print("ready", flush=True)
    sys.stdin.read()
"""


def run(*arguments: Any, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with standard streams that are no terminal."""
    return subprocess.run(
        [sys.executable, "-m", "ml_debugger.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **(environment or {})},
        stdin=subprocess.DEVNULL,
    )


def fine(*arguments: Any, **options: Any) -> str:
    """Standard output of a command that must end with 0 and say nothing else."""
    done = run(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    return done.stdout


def fine_json(*arguments: Any) -> Any:
    return json.loads(fine(*arguments, "--json"))


def refused(status: int, message: str, *arguments: Any) -> None:
    """The command ends with a status, nothing on standard output, and a plain sentence."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr and "\x1b" not in done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A data directory with the rich trace "model" / "v1" in it."""
    rich_trace(tmp_path / "data").write()
    return tmp_path / "data"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A data directory where another process records "live" / "v1"."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            yield tmp_path
        finally:
            writer.communicate("", timeout=60)
    assert writer.returncode == 0


def test_version_is_that_of_the_package() -> None:
    from ml_debugger import __version__

    assert fine("--version") == f"ml-debugger {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_takes_the_data_dir(command: str) -> None:
    text = fine(command, "--help")
    assert "--data-dir" in text and "--json" in text
    assert command in fine("--help")


def test_the_console_script_names_the_entry_point() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'ml-debugger = "ml_debugger.cli:main"' in text


@pytest.mark.parametrize(
    "arguments", [["--version"], ["ls"], ["info", "model", "v1"], ["drop", "x", "y", "--epoch", "1"]]
)
def test_starting_imports_no_torch(store: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom ml_debugger.cli.app import cli\n"
        f"try: cli({['--data-dir', str(store), *arguments]!r})\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["info"],
        ["info", "model"],
        ["info", "model", ""],
        ["info", "model", "v1", "extra"],
        ["ls", "--data-dir", ""],
        ["ls", "--nonsense"],
        ["export", "model", "v1", "--format", "csv"],
        ["export", "model", "v1", "--epoch", "x"],
        ["export", "model", "v1", "--epoch", "-2"],
        ["drop", "model", "v1"],
        ["drop", "model", "v1", "--all"],
        ["drop", "model", "v1", "--yes"],
        ["drop", "model", "v1", "--epoch", "1", "--all", "--yes"],
        ["drop", "model", "v1", "--epoch", "1.5"],
    ],
)
def test_wrong_usage_is_status_two_and_changes_nothing(store: Path, arguments: list[str]) -> None:
    refused(2, "", "--data-dir", store, *arguments)
    assert open_trace("model", "v1", store).num_rows("extracted_feature") == 24


@pytest.mark.parametrize("command", [["info"], ["export"], ["verify"], ["drop", "--epoch", "0"]])
def test_an_unknown_trace_is_status_one_and_creates_nothing(tmp_path: Path, command: list[str]) -> None:
    refused(1, "no trace", command[0], "model", "v1", *command[1:], "--data-dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ls_lists_what_is_recorded(store: Path) -> None:
    FormatWriter(store, "other", "v2").write()
    found = fine_json("ls", "--data-dir", store)
    assert [(one["model_name"], one["version_name"]) for one in found] == [("model", "v1"), ("other", "v2")]
    assert all(set(one) == SUMMARY for one in found)
    assert found[0]["rows"] == 24 and found[0]["epochs"] == [-1, 0, 1] and found[0]["ranks"] == [0, 1]
    assert found[0]["bytes"] > 0 and found[0]["writing"] is False and found[0]["discarded_rows"] == 8
    assert found[1]["rows"] == 0 and found[1]["epochs"] == []
    lines = fine("ls", "--data-dir", store).splitlines()
    assert len(lines) == 3 and lines[1].split()[:5] == ["model", "v1", "none,", "0-1", "24"]
    assert [line.split()[-1] for line in lines] == ["STATE", "idle", "idle"]


def test_the_data_dir_comes_from_the_group_the_command_or_the_environment(
    store: Path, tmp_path: Path
) -> None:
    expected = fine("ls", "--data-dir", store)
    assert "model" in expected
    assert fine("--data-dir", store, "ls") == expected
    assert fine("ls", environment={"MLD_DATA_DIR": str(store)}) == expected
    assert fine("--data-dir", tmp_path / "none", "ls", "--data-dir", store) == expected


def test_ls_of_nothing_is_an_empty_list(tmp_path: Path) -> None:
    done = run("ls", "--data-dir", tmp_path / "none")
    assert (done.returncode, done.stdout) == (0, "") and "no traces" in done.stderr
    assert fine_json("ls", "--data-dir", tmp_path / "none") == []


def test_ls_names_a_damaged_trace_and_lists_the_others(store: Path) -> None:
    directory = FormatWriter(store, "other", "v2").write()
    (directory / "version.json").write_text("{")
    done = run("ls", "--json", "--data-dir", store)
    assert done.returncode == 1 and "version.json" in done.stderr
    assert [one["model_name"] for one in json.loads(done.stdout)] == ["model"]


def test_info_tells_what_a_trace_holds(store: Path) -> None:
    found = fine_json("info", "model", "v1", "--data-dir", store)
    assert SUMMARY | {"attempts", "fingerprint", "target_layers", "additional_fields"} <= set(found)
    trace = open_trace("model", "v1", store)
    for one in found["epochs"]:
        assert one["rows"] == trace.num_rows("extracted_feature", one["n_epoch"])
        assert one["ground_truth_rows"] == trace.num_rows("ground_truth", one["n_epoch"])
        assert set(one) == FIGURES | {"n_epoch"}
    assert [one["rank"] for one in found["ranks"]] == [0, 1] and found["attempts"] == trace.attempts
    assert sum(one["rows"] for one in found["ranks"]) == found["rows"] == 24
    assert all(one["counters"] == [] and one["pid"] is None for one in found["ranks"])
    text = fine("info", "model", "v1", "--data-dir", store)
    assert "24 (18 with ground truth)" in text and "none" in text


def test_info_shows_the_counters_of_a_writing_process(live: Path) -> None:
    found = fine_json("info", "live", "v1", "--data-dir", live)
    (rank,) = found["ranks"]
    (counters,) = rank["counters"]
    assert found["writing"] and rank["writing"] and rank["pid"] not in (None, os.getpid())
    assert counters["rows_submitted"] == counters["rows_committed"] == found["rows"] == 4
    assert counters["rows_in_flight"] == counters["rows_discarded"] == counters["rows_failed"] == 0
    assert str(rank["pid"]) in fine("info", "live", "v1", "--data-dir", live)
    assert "writing" in fine("ls", "--data-dir", live)


def test_a_trace_that_is_written_is_exported_and_verified_and_not_dropped(live: Path, tmp_path: Path) -> None:
    path = fine("export", "live", "v1", "--data-dir", live, "--output", tmp_path / "live.zip").strip()
    assert load_export(path).num_rows("extracted_feature") == 4
    assert fine_json("verify", "live", "v1", "--data-dir", live)["ok"]
    for what in (["--epoch", 0], ["--all", "--yes"]):
        refused(1, "another process", "drop", "live", "v1", "--data-dir", live, *what)
    assert open_trace("live", "v1", live).num_rows("extracted_feature") == 4


def test_export_writes_where_it_is_told(store: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "mine.zip"
    found = fine_json("export", "model", "v1", "--data-dir", store, "--output", target, "--epoch", 1)
    assert set(found) == {
        "path", "bytes", "seconds", "rows_recorded", "rows_written", "rows_deduplicated", "discarded",
    }  # fmt: skip
    assert found["path"] == str(target) and found["bytes"] == target.stat().st_size
    assert found["rows_written"] == load_export(target).num_rows("extracted_feature") < found["rows_recorded"]
    whole = fine("export", "model", "v1", "--data-dir", store, "-o", tmp_path, "--no-dedupe").strip()
    assert whole == str(tmp_path / "model_v1.zip")
    assert load_export(whole).num_rows("extracted_feature") == 24
    assert load_export(whole).epochs == [-1, 0, 1] and load_export(target).epochs == [1]


def test_export_writes_parquet(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    fine("export", "model", "v1", "--data-dir", store, "--output", tmp_path, "--format", "parquet")
    with zipfile.ZipFile(tmp_path / "model_v1.zip") as archive:
        assert "extracted_feature.parquet" in archive.namelist()


def test_an_output_that_leads_through_a_file_is_wrong_usage(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(
        2, "--output", "export", "model", "v1", "--data-dir", store, "--output", tmp_path / "file" / "x.zip"
    )


def test_an_output_that_cannot_be_written_is_status_one(store: Path) -> None:
    refused(1, "cannot write", "export", "model", "v1", "--data-dir", store, "--output", "/proc/none/x.zip")


def test_drop_deletes_an_epoch_of_all_ranks(store: Path) -> None:
    before = open_trace("model", "v1", store).num_rows("ground_truth", 0)
    found = fine_json("drop", "model", "v1", "--epoch", 0, "--data-dir", store)
    assert found == {"extracted_feature": 10, "ground_truth": before}
    trace = open_trace("model", "v1", store)
    assert trace.epochs == [-1, 1] and trace.num_rows("extracted_feature") == 14
    assert fine("drop", "model", "v1", "--epoch", 0, "--data-dir", store).startswith("deleted 0 rows")
    fine("drop", "model", "v1", "--epoch", -1, "--data-dir", store)
    assert trace.epochs == [1]


def test_drop_all_leaves_empty_tables(store: Path) -> None:
    found = fine_json("drop", "model", "v1", "--all", "--yes", "--data-dir", store)
    assert found["extracted_feature"] == 24
    trace = open_trace("model", "v1", store)
    assert trace.epochs == [] and trace.num_rows("ground_truth") == 0
    assert "camera" in trace.columns("extracted_feature")


@pytest.mark.parametrize(
    "name", ["a b", "..", "-x", "ü€😀", "a/b", "[red]x", "tab\there", "x" * 300, "%s", "*"]
)
def test_odd_names_are_names(tmp_path: Path, name: str) -> None:
    writer = FormatWriter(tmp_path / "data", name, "v[1]")
    writer.call(0, ["a"], {"features": Column(np.ones((1, 2), "<f4"))})
    writer.write()
    (found,) = fine_json("ls", "--data-dir", tmp_path / "data")
    assert found["model_name"] == name and found["version_name"] == "v[1]"
    line = fine("ls", "--data-dir", tmp_path / "data").splitlines()[1]
    assert line.startswith(name.replace("\t", "\\t")) and "v[1]" in line
    options = ["--data-dir", tmp_path / "data"]
    assert json.loads(fine("info", *options, "--json", "--", name, "v[1]"))["rows"] == 1
    path = fine("export", *options, "--output", tmp_path / "out", "--", name, "v[1]").rstrip("\n")
    assert Path(path).parent == tmp_path / "out" and load_export(path).model_name == name


def test_a_name_that_is_no_utf8_is_an_unknown_trace(store: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ml_debugger.cli", "info", b"\xff\xfe", "v1", "--data-dir", str(store)],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1 and b"no trace" in done.stderr


def test_a_closed_pipe_ends_quietly(store: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ml_debugger.cli", "ls", "--data-dir", str(store)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert b"Traceback" not in errors


@pytest.mark.parametrize("arguments", [["ls"], ["info", "model", "v1"], ["info", "model", "v1", "--json"]])
def test_a_full_disk_behind_standard_output_is_status_one_in_a_sentence(
    store: Path, arguments: list[str]
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ml_debugger.cli", "--data-dir", str(store), *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["ls", "info model v1", "ls --json"])
def test_standard_output_that_the_shell_has_closed_is_no_error(store: Path, arguments: str) -> None:
    done = subprocess.run(
        f'"{sys.executable}" -m ml_debugger.cli --data-dir "{store}" {arguments} >&-',
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("command", [["ls"], ["info", "名前", "v1"]])
def test_names_that_standard_output_cannot_encode_are_escaped(
    tmp_path: Path, command: list[str], encoding: str
) -> None:
    FormatWriter(tmp_path, "名前", "v1").write()
    done = subprocess.run(
        [sys.executable, "-m", "ml_debugger.cli", *command, "--data-dir", str(tmp_path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    # click writes UTF-8 where a terminal claims to know ASCII only.
    assert rb"\u540d\u524d" in done.stdout or "名前".encode() in done.stdout


def test_completion_knows_the_names(store: Path) -> None:
    def complete(words: str, position: int) -> str:
        return fine(
            environment={
                "_ML_DEBUGGER_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(position),
                "MLD_DATA_DIR": str(store),
            }
        )

    assert "info" in complete("ml-debugger in", 1)
    assert "model" in complete("ml-debugger info mo", 2)
    assert "v1" in complete("ml-debugger info model ", 3)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
def test_progress_is_shown_on_a_terminal_only(store: Path, tmp_path: Path) -> None:
    leader, follower = os.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ml_debugger.cli", "export", "model", "v1", "--data-dir", str(store)],
            stdout=subprocess.PIPE,
            stderr=follower,
            cwd=tmp_path,
            timeout=60,
        )
        shown = os.read(leader, 1 << 16)
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 0 and b"export: 100 %" in shown, shown
    assert done.stdout.strip() == str(tmp_path / "model_v1.zip").encode()


def test_bench_says_which_part_limits_and_leaves_nothing_behind(tmp_path: Path) -> None:
    report = fine_json("bench", "--quick", "--data-dir", tmp_path / "data")
    assert report["limit"] in ("hook", "ring", "disk")
    assert report["advice"]
    assert report["hook_us"] > 0
    assert list((tmp_path / "data").iterdir()) == []
