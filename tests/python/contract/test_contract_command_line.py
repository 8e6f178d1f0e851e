"""Contract 6: the commands as processes: --help, --json, --data-dir everywhere, exit status 0, 1 and 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from contract_models import batch

from ml_debugger import __version__, load_export, open_trace

COMMANDS = ["ls", "info", "export", "upload", "drop", "verify", "recover", "report", "serve", "bench"]
ON_TRACES = ["info", "export", "upload", "drop", "verify", "recover", "report"]
# What a command needs beside the trace; {out} is a folder of the test.
REST = {
    "upload": ["--endpoint", "{out}/endpoint"],
    "drop": ["--epoch", "0"],
    "recover": ["--output", "{out}/saved"],
    "export": ["--output", "{out}/x.zip"],
    "report": ["--output", "{out}/r.html"],
}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, with no terminal anywhere."""
    return subprocess.run(
        [sys.executable, "-m", "ml_debugger.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "MLD_API_ENDPOINT": "", **environment},
    )


def on_trace(command: str, out: Path, *names: str) -> list[str]:
    return [command, *names, *(one.format(out=out) for one in REST.get(command, []))]


@pytest.fixture
def recorded(make_tracer: Any, store: Path) -> Path:
    """("net", "v1") with 5 rows in each of the epochs 0 and 1, one sample twice in epoch 1; its data_dir."""
    tracer = make_tracer()
    x, y, ids = batch(5)
    tracer(x, y, ids, "train", 0)
    tracer(x, y, [*ids[:4], ids[0]], "train", 1)
    tracer.close()
    return store


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_takes_a_data_dir(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "") and "--data-dir" in done.stdout
    assert command == "serve" or "--json" in done.stdout  # serve prints no figures


def test_version_and_the_list_of_commands() -> None:
    assert run("--version").stdout.split()[-1] == __version__
    listed = run("--help").stdout
    assert all(f"  {command} " in listed for command in COMMANDS)


@pytest.mark.parametrize("command", ON_TRACES)
def test_an_unknown_trace_is_status_one_and_creates_nothing(
    command: str, recorded: Path, tmp_path: Path
) -> None:
    if command == "report":
        pytest.importorskip("sklearn")
    before = sorted(path for path in tmp_path.rglob("*"))
    for names in (("net", "v2"), ("nobody", "v1")):
        done = run(*on_trace(command, tmp_path / "out", *names), "--json")
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert "Traceback" not in done.stderr and done.stderr.startswith("error: ")
    done = run(*on_trace(command, tmp_path / "out", "net", "v1"), "--data-dir", tmp_path / "none")
    assert done.returncode == 1 and sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["ls", *ON_TRACES])
def test_json_is_all_that_comes_and_the_data_dir_may_stand_before_or_behind(
    command: str, recorded: Path, tmp_path: Path
) -> None:
    if command == "report":
        pytest.importorskip("sklearn")
    arguments = [command] if command == "ls" else on_trace(command, tmp_path / "out", "net", "v1")
    for words in (["--data-dir", recorded, *arguments], [*arguments, "--data-dir", recorded]):
        done = run(*words, "--json", MLD_DATA_DIR=str(tmp_path / "none"))
        assert (done.returncode, done.stderr) == (0, "")
        assert isinstance(json.loads(done.stdout), (dict, list))
        if command == "recover":  # it saves into a new directory only
            break


@pytest.mark.parametrize("command", ON_TRACES)
def test_a_name_may_begin_with_a_dash(command: str, make_tracer: Any, tmp_path: Path) -> None:
    if command == "report":
        pytest.importorskip("sklearn")
    tracer = make_tracer(name="-x", version="--help")
    x, y, ids = batch(4)
    tracer(x, y, ids, n_epoch=0)
    tracer.close()
    words = [*on_trace(command, tmp_path / "out"), "--json", "--", "-x", "--help"]
    done = run(*words)
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr


def test_export_takes_output_epoch_format_and_no_dedupe(recorded: Path, tmp_path: Path) -> None:
    def export(*options: object) -> Any:
        done = run("export", "net", "v1", "--output", tmp_path / "out", *options)
        assert (done.returncode, done.stderr) == (0, "")
        return load_export(done.stdout.strip())

    assert export().num_rows("extracted_feature") == 9
    assert export("--no-dedupe").num_rows("extracted_feature") == 10
    assert export("--epoch", 1).num_rows("extracted_feature") == 4
    assert export("--epoch", -1).num_rows("extracted_feature") == 0
    pytest.importorskip("pyarrow")
    export("--format", "parquet")
    names = [zipfile.ZipFile(path).namelist() for path in (tmp_path / "out").glob("net_v1.zip")]
    assert "extracted_feature.parquet" in names[0]


@pytest.mark.parametrize(
    "words",
    [
        [], ["--epoch", "-2"], ["--epoch", "x"], ["--all"], ["--yes"], ["--epoch", "0", "--all", "--yes"],
    ],
)  # fmt: skip
def test_drop_is_refused_without_epoch_or_all_and_yes(words: list[str], recorded: Path) -> None:
    done = run("drop", "net", "v1", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert open_trace("net", "v1").num_rows("extracted_feature") == 10


def test_drop_says_what_it_deleted(recorded: Path) -> None:
    done = run("drop", "net", "v1", "--epoch", "0", "--json")
    assert json.loads(done.stdout) == {"extracted_feature": 5, "ground_truth": 5}
    assert open_trace("net", "v1").epochs == [1]
    done = run("drop", "net", "v1", "--all", "--yes", "--json")
    assert json.loads(done.stdout) == {"extracted_feature": 5, "ground_truth": 5}
    assert open_trace("net", "v1").epochs == []


def test_damage_is_status_one(recorded: Path) -> None:
    assert run("verify", "net", "v1").returncode == 0
    data = next(recorded.rglob("epoch-0/*/data.mdb"))
    content = bytearray(data.read_bytes())
    for place in range(3 * 4096, len(content)):
        content[place] ^= 0xFF
    data.write_bytes(content)
    done = run("verify", "net", "v1", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False


@pytest.mark.parametrize(
    "words",
    [["nonsense"], ["info"], ["info", "net"], ["ls", "x"], ["export", "net", "v1", "--format", "csv"],
     ["upload", "net", "v1"], ["upload", "net", "v1", "--api-key", "k", "--endpoint", "x"],
     ["serve", "--host", "0.0.0.0"], ["serve", "--key", "k"], ["bench", "--data-dir"]],
)  # fmt: skip
def test_wrong_usage_is_status_two(words: list[str], recorded: Path) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
