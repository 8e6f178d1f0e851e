"""``ml-debugger upload`` and ``serve``, run as processes: what travels, what is said, and the exit status."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_debugger import open_trace
from test_cli import fine, refused, run
from upload_support import KEY, TusServer, assert_same_trace, write_trace

REPORT = {"segments_sent", "segments_skipped", "bytes_sent", "seconds"}
WRONG = "canary-0c11d2-wrong"
SERVE = [sys.executable, "-m", "ml_debugger.cli", "serve"]


class Served:
    """A collector that runs as a process."""

    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.process = process
        self.line = line
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        self.url = found[0]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Status and standard error after a signal."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=30)
        assert output == ""
        return self.process.returncode, errors


@contextlib.contextmanager
def served(*arguments: Any, keys: str | None = KEY, cwd: Path | None = None) -> Iterator[Served]:
    """``ml-debugger serve`` on a free port of this machine."""
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package)
    environment = {**os.environ, **({} if keys is None else {"MLD_API_KEYS": keys})}
    with subprocess.Popen(
        [*SERVE, "--port", "0", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=cwd,
    ) as process:
        try:
            assert process.stdout is not None
            yield Served(process, process.stdout.readline())
        finally:
            process.kill()


def upload(data_dir: Path, endpoint: object, *arguments: Any, key: str = KEY) -> dict[str, Any]:
    """The figures of an upload that must end with 0 and say nothing else."""
    options = ["--data-dir", data_dir, "--endpoint", endpoint, "--json", *arguments]
    document = json.loads(fine("upload", "net", "v1", *options, environment={"MLD_API_KEY": key}))
    assert isinstance(document, dict) and set(document) == REPORT | {"model_name", "version_name", "endpoint"}
    assert (document["model_name"], document["version_name"]) == ("net", "v1")
    return document


def assert_nowhere(secret: str, *places: Path) -> None:
    """No file, and no name of one, holds a text."""
    for place in places:
        for path in place.rglob("*"):
            assert secret not in str(path)
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


# Both


def test_what_is_uploaded_is_collected_bit_for_bit_and_only_once(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    write_trace(data_dir, rank=1, seed=1)
    storage = tmp_path / "collected"
    with served("--storage", storage) as collector:
        first = upload(data_dir, collector.url)
        assert first["segments_sent"] > 0 == first["segments_skipped"] and first["bytes_sent"] > 0
        assert first["endpoint"] == f"{collector.url}/" and first["seconds"] > 0
        assert_same_trace(data_dir, storage)
        second = upload(data_dir, collector.url)
        assert (second["segments_sent"], second["bytes_sent"]) == (0, 0)
        assert second["segments_skipped"] == first["segments_sent"]
        again = upload(data_dir, collector.url, "--force")
        assert again["segments_sent"] == first["segments_sent"]
        assert again["bytes_sent"] == first["bytes_sent"]
        assert collector.end() == (0, "")
    assert_same_trace(data_dir, storage)
    assert_nowhere(KEY, data_dir, storage)


def test_a_wrong_key_is_said_once_and_shown_nowhere(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    storage = tmp_path / "collected"
    with served("--storage", storage) as collector:
        options = ["--data-dir", data_dir, "--endpoint", collector.url]
        for key in (WRONG, ""):
            done = run("upload", "net", "v1", *options, environment={"MLD_API_KEY": key})
            assert (done.returncode, done.stdout) == (1, "")
            assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
            assert "key" in done.stderr and WRONG not in done.stderr
        status, errors = collector.end()
        assert status == 0 and WRONG not in errors and KEY not in errors and KEY not in collector.line
    assert not list(storage.rglob("*.zip"))
    assert_nowhere(WRONG, data_dir, storage)


# upload


def test_a_folder_is_an_endpoint_and_takes_one_epoch_or_all(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    there = tmp_path / "there"
    one = upload(data_dir, there, "--epoch", 1)
    assert one["segments_sent"] == 1 and one["endpoint"] == str(there)
    assert open_trace("net", "v1", there).epochs == [1]
    assert upload(data_dir, there.as_uri(), "--epoch", 7)["segments_sent"] == 0
    text = fine("upload", "net", "v1", "--data-dir", data_dir, "--endpoint", there)
    assert text.startswith("sent 2 segments, ") and text.endswith("; 1 were there already\n")
    assert_same_trace(data_dir, there)


def test_the_endpoint_may_come_from_the_environment(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    environment = {"MLD_API_ENDPOINT": str(tmp_path / "there")}
    fine("upload", "net", "v1", "--data-dir", data_dir, environment=environment)
    assert_same_trace(data_dir, tmp_path / "there")
    other = tmp_path / "other"
    fine("upload", "net", "v1", "--data-dir", data_dir, "--endpoint", other, environment=environment)
    assert_same_trace(data_dir, other)


def test_without_an_endpoint_it_is_wrong_usage_with_the_remedy(data_dir: Path) -> None:
    write_trace(data_dir)
    refused(2, "pass --endpoint or set MLD_API_ENDPOINT", "upload", "net", "v1", "--data-dir", data_dir)


@pytest.mark.parametrize("endpoint", ["", "ftp://host/", "https://me:secret-9@host/", "s3://", "http:///x"])
def test_an_endpoint_that_nothing_handles_is_wrong_usage(data_dir: Path, endpoint: str) -> None:
    write_trace(data_dir)
    done = run("upload", "net", "v1", "--data-dir", data_dir, "--endpoint", endpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--endpoint" in done.stderr and "secret-9" not in done.stderr
    assert "api_key" not in done.stderr or "MLD_API_KEY" in done.stderr, "the remedy is one of a command line"


def test_a_key_does_not_travel_in_clear(data_dir: Path) -> None:
    write_trace(data_dir)
    options = ["--data-dir", data_dir, "--endpoint", "http://192.0.2.1/"]
    done = run("upload", "net", "v1", *options, environment={"MLD_API_KEY": KEY})
    assert done.returncode == 2 and "https://" in done.stderr and KEY not in done.stderr


@pytest.mark.parametrize("option", ["--key", "--api-key"])
def test_no_argument_takes_a_key(data_dir: Path, option: str) -> None:
    for command in (["upload", "net", "v1"], ["serve"]):
        done = run(*command, option, KEY)
        assert done.returncode == 2 and "No such option" in done.stderr and KEY not in done.stderr


def test_an_unknown_trace_is_status_one_and_creates_nothing(tmp_path: Path) -> None:
    options = ["--data-dir", tmp_path / "none", "--endpoint", tmp_path / "there"]
    refused(1, "no trace", "upload", "net", "v1", *options)
    assert not list(tmp_path.iterdir())


def test_an_endpoint_that_fails_is_status_one(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    (tmp_path / "file").write_text("")
    options = ["--data-dir", data_dir, "--endpoint"]
    refused(1, "error: ", "upload", "net", "v1", *options, tmp_path / "file")
    with TusServer(lambda method, path, headers: (403, {}, b"")) as server:
        refused(1, "error: ", "upload", "net", "v1", *options, f"tus+{server.url}")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo terminal")
def test_progress_is_shown_on_a_terminal_only(data_dir: Path, tmp_path: Path) -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    write_trace(data_dir)
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        options = ["--data-dir", str(data_dir), "--endpoint", str(tmp_path / "there")]
        done = subprocess.run(
            [sys.executable, "-m", "ml_debugger.cli", "upload", "net", "v1", *options],
            stdout=subprocess.PIPE,
            stderr=follower,
            timeout=60,
        )
        shown = os.read(leader, 1 << 16)
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 0 and b"upload: " in shown and b"upload: " not in done.stdout


def test_sending_imports_no_torch(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    arguments = ["upload", "net", "v1", "--data-dir", str(data_dir), "--endpoint", str(tmp_path / "there")]
    code = (
        "import sys\nfrom ml_debugger.cli.app import cli\n"
        f"try: cli({arguments!r})\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("sent ") and done.stdout.splitlines()[-1] == "False", done.stderr


# serve


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_collector_with_status_zero(tmp_path: Path, number: int) -> None:
    with served("--storage", tmp_path / "collected") as collector:
        assert collector.end(number) == (0, "")


def test_keys_come_from_a_file_too(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    (tmp_path / "keys").write_text(f"# ours\n{KEY}\n")
    with served("--storage", tmp_path / "a", "--keys-file", tmp_path / "keys", keys="one,two") as collector:
        upload(data_dir, collector.url)
        assert upload(data_dir, collector.url, key="two")["segments_sent"] == 0
        done = run("upload", "net", "v1", "--data-dir", data_dir, "--endpoint", collector.url)
        assert done.returncode == 1
        assert collector.end() == (0, "")
    assert_nowhere(KEY, tmp_path / "a")


def test_a_new_key_is_printed_once_and_counts_while_the_collector_runs(
    data_dir: Path, tmp_path: Path
) -> None:
    write_trace(data_dir)
    path = tmp_path / "keys"
    key = fine("serve", "new-key", "--keys-file", path, "--quota", "5GB", "--note", "anna").strip()
    assert key.startswith("mld-") and key not in path.read_text() and "# anna\n" in path.read_text()
    with served("--storage", tmp_path / "a", "--keys-file", path, keys=None) as collector:
        assert upload(data_dir, collector.url, key=key)["segments_sent"] == 3
        another = fine("serve", "new-key", "--keys-file", path).strip()
        assert another != key and upload(data_dir, collector.url, key=another)["segments_skipped"] == 3
        assert collector.end() == (0, "")
    assert_nowhere(key, tmp_path)


def test_a_new_key_comes_as_json_with_what_the_file_holds_of_it(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    arguments = ("serve", "new-key", "--keys-file", path, "--json")
    made = json.loads(fine(*arguments, "--quota", "5GB", "--note", "anna"))
    assert made["key"].startswith("mld-") and made["key"] not in path.read_text()
    assert path.read_text() == f"# anna\n{made['hash']} 5GB\n"
    assert (made["quota_bytes"], made["note"], made["keys_file"]) == (5 * 10**9, "anna", str(path))
    plain = json.loads(fine(*arguments))
    assert (plain["quota_bytes"], plain["note"]) == (None, None) and plain["key"] != made["key"]


@pytest.mark.parametrize(
    "arguments", [[], ["--keys-file", ""], ["--keys-file", "{tmp}/keys", "--quota", "5 parsecs"]]
)
def test_wrong_usage_of_new_key_is_status_two_and_makes_nothing(arguments: list[str], tmp_path: Path) -> None:
    refused(2, "", "serve", "new-key", *(text.format(tmp=tmp_path) for text in arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_without_keys_it_listens_to_this_machine_only(tmp_path: Path, host: str) -> None:
    storage = tmp_path / "collected"
    refused(2, "MLD_API_KEYS", "serve", "--host", host, "--port", 0, "--storage", storage)
    assert not storage.exists()


def test_without_keys_it_takes_what_this_machine_sends(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    with served("--storage", tmp_path / "collected", keys=None) as collector:
        fine("upload", "net", "v1", "--data-dir", data_dir, "--endpoint", collector.url)
    assert_same_trace(data_dir, tmp_path / "collected")


def test_with_keys_it_listens_to_others(tmp_path: Path) -> None:
    with served("--host", "0.0.0.0", "--storage", tmp_path / "collected") as collector:
        assert collector.url.startswith("http://0.0.0.0:")
        socket.create_connection(("127.0.0.1", int(collector.url.rpartition(":")[2])), timeout=10).close()


def test_the_storage_is_a_folder_of_its_own_unless_it_is_named(tmp_path: Path) -> None:
    with served(cwd=tmp_path) as collector:
        assert collector.end() == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["mld_collected"]
    with served("--data-dir", tmp_path / "data") as collector:
        assert collector.end() == (0, "")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mld_collected"]


@pytest.mark.parametrize("content", [None, "", "# none\n", f"{KEY} 5 parsecs\n", "sha256:12\n"])
def test_a_keys_file_that_holds_no_keys_is_wrong_usage(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    done = run("serve", "--port", 0, "--storage", tmp_path / "a", "--keys-file", path)
    assert (done.returncode, done.stdout) == (2, "") and KEY not in done.stderr
    assert "key" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["ftp://host/", "https://me:secret-9@host/", "s3://"])
def test_a_storage_that_is_none_is_said_in_words_of_storage(place: str) -> None:
    done = run("serve", "--port", 0, "--storage", place)
    assert done.returncode == 2 and "secret-9" not in done.stderr
    assert "--storage" in done.stderr and "folder or an object store" in done.stderr
    assert "endpoint" not in done.stderr and "uploader" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "-1"],
        ["--port", "65536"],
        ["--port", "http"],
        ["--host", ""],
        ["--storage", ""],
        ["--storage", "http://host/"],
        ["--storage", "ftp://host/"],
        ["extra"],
    ],
)
def test_wrong_usage_of_serve_is_status_two(arguments: list[str]) -> None:
    refused(2, "", "serve", *arguments)


def test_a_port_that_is_taken_is_status_one(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(1, "cannot listen", "serve", "--port", port, "--storage", tmp_path / "collected")


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_a_missing_extra_is_named_with_the_pip_command(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("serve", "--port", 0, "--storage", tmp_path / "a", environment={"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (1, "")
    assert package in done.stderr and 'pip install "ml-debugger[server]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_serve_names_where_keys_come_from_and_takes_the_data_dir() -> None:
    text = fine("serve", "--help")
    for option in ("--host", "--port", "--storage", "--keys-file", "--data-dir", "MLD_API_KEYS"):
        assert option in text
    assert "serve" in fine("--help") and "upload" in fine("--help")
