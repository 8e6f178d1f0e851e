"""The collector when several requests, or somebody who deletes its files, get into each other's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from upload_support import KEY, item

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import collector_support  # noqa: E402
from collector_support import DATA, TUS, begin, patch  # noqa: E402

client, storage, url = collector_support.client, collector_support.storage, collector_support.url


def test_a_storage_that_was_cleared_while_the_collector_runs_takes_uploads_again(
    client: Any, storage: Path
) -> None:
    """Everything was answered with status 500 until the collector was started anew."""
    upload = item(DATA)
    place = begin(client, upload)
    assert patch(client, place, 0, DATA[:60]).status_code == 204
    for path in sorted(storage.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert client.head(place).status_code == 404
    place = begin(client, upload)
    assert client.head(place).headers["upload-offset"] == "0"
    next((storage / ".uploads").glob("*.part")).unlink()
    place = begin(client, upload)
    assert patch(client, place, 0, DATA).status_code == 204
    assert (storage / upload.path).read_bytes() == DATA


def test_an_upload_that_is_deleted_while_it_comes_in_is_not_said_to_have_arrived(
    client: Any, storage: Path
) -> None:
    place = begin(client, item(DATA))
    (part,) = (storage / ".uploads").glob("*.part")

    def body() -> Iterator[bytes]:
        yield DATA[:60]
        time.sleep(0.1)  # the request is in its handler
        part.unlink()
        yield DATA[60:]

    assert patch(client, place, 0, body(), **{"Content-Length": str(len(DATA))}).status_code == 404
    assert not list(storage.rglob("*.zip"))


def test_requests_that_waited_for_another_slice_do_not_write_at_once(
    client: Any, url: str, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They found nobody at work on their upload, before they waited: the bytes of all were appended."""
    from ml_debugger.collector.storage import Part, Storage

    upload, other = item(DATA), item(DATA, number=9)
    place, elsewhere = begin(client, upload), begin(client, other)
    is_verified, finish, append = threading.Event(), Storage.finish, Part.append

    def slowly(self: Storage, found: Any) -> None:
        if found.path == other.path:
            is_verified.wait(10)
        finish(self, found)

    def late(self: Part, data: Any) -> None:
        time.sleep(0.1)
        append(self, data)

    monkeypatch.setattr(Storage, "finish", slowly)
    monkeypatch.setattr(Part, "append", late)
    headers = {"Authorization": f"Bearer {KEY}", **TUS}
    answers: list[int] = []

    def come() -> None:
        with httpx.Client(base_url=url, headers=headers) as own:
            answers.append(patch(own, place, 0, DATA).status_code)

    first = threading.Thread(target=lambda: patch(client, elsewhere, 0, DATA))
    first.start()
    time.sleep(0.1)
    many = [threading.Thread(target=come) for _ in range(3)]
    for thread in many:
        thread.start()
    time.sleep(0.2)
    is_verified.set()
    for thread in (first, *many):
        thread.join(10)
    assert set(answers) <= {204, 409}  # who comes last takes over, and finds out where it stands
    assert client.head(place).headers["upload-offset"] == str(len(DATA))
    assert (storage / upload.path).read_bytes() == DATA
