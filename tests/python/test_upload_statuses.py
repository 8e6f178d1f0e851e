"""Uploads to servers that refuse, fail for a while, or lie about what has arrived."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import time
from typing import Any

import pytest

from ml_debugger.errors import AuthenticationError, UploadError
from ml_debugger.uploading.retry import MAX_TRIES, Retries, RetryPolicy, TransientError, retry_after_s
from ml_debugger.uploading.transports.tus import TusTransport, _pieces
from upload_support import (
    KEY,
    SMALL,
    TusServer,
    item,
    send,
)

pytest.importorskip("httpx")


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "PATCH"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_once_and_not_tried_again(status: int, method: str) -> None:
    with TusServer(lambda m, path, headers: (status, {}, b"go away") if m == method else None) as server:
        with pytest.raises(AuthenticationError, match=f"answered {status} to {method}") as caught:
            send(server)
        assert server.count(method) == 1
        assert KEY not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize("status", [400, 402, 405, 406, 411, 412, 413, 415, 418, 422, 431, 451])
def test_other_4xx_fail_at_once(status: int, method: str) -> None:
    with TusServer(lambda m, path, headers: (status, {}, b"no") if m == method else None) as server:
        with pytest.raises(UploadError, match=f"answered {status} to {method}"):
            send(server)
        assert server.count(method) == 1


@pytest.mark.parametrize("status", [408, 409, 423, 425, 429, 460, 500, 502, 503, 504, 507, 599])
def test_what_may_pass_is_tried_five_times_without_progress(status: int) -> None:
    with TusServer(lambda m, path, headers: (status, {}, b"") if m == "PATCH" else None) as server:
        with pytest.raises(UploadError, match=f"{status}.*gave up after {MAX_TRIES} tries"):
            send(server)
        assert server.count("PATCH") == MAX_TRIES
        assert server.count("POST") == 1


@pytest.mark.parametrize("status", [408, 409, 423, 429, 460, 500, 502, 503, 504, 507])
@pytest.mark.parametrize("method", ["POST", "PATCH", "HEAD"])
def test_what_has_passed_is_forgotten(status: int, method: str) -> None:
    failures = {"POST": 3, "PATCH": 3, "HEAD": 1}
    first_patch = {"PATCH": 1}

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH" and first_patch["PATCH"]:
            first_patch["PATCH"] -= 1
            return 503, {}, b""
        if m == method and failures[m]:
            failures[m] -= 1
            return status, {}, b""
        return None

    with TusServer(script) as server:
        send(server)
        assert bytes(server.data["/files/0"]) == SMALL


def test_progress_begins_the_count_of_tries_anew() -> None:
    data = random.Random(0).randbytes(40 << 20)
    turns = iter(range(1000))

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        return (503, {}, b"") if m == "PATCH" and next(turns) % 4 != 3 else None

    with TusServer(script) as server:
        send(server, data)
        assert bytes(server.data["/files/0"]) == data


def test_a_retry_after_is_waited_for_up_to_a_minute() -> None:
    slept: list[float] = []
    for asked, expected in ((7.0, 7.0), (60.0, 60.0)):
        retries = Retries(RetryPolicy(base_s=0.001), sleep=slept.append)
        retries.failed(TransientError("503", retry_after_s=asked))
        assert slept.pop() == pytest.approx(expected)
    assert retry_after_s("3600", None) == 60.0
    assert retry_after_s("12", None) == 12.0
    # Clocks that are years apart: what counts is the server's own.
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert retry_after_s("Wed, 21 Oct 2015 07:28:30 GMT", date) == 30.0
    assert retry_after_s(date, "Wed, 21 Oct 2020 07:28:30 GMT") == 0.0
    for nonsense in ("soon", "-5", "1e9", "٣", "", date):
        assert retry_after_s(nonsense, None) in (None, 0.0)


def test_a_retry_after_reaches_the_pause() -> None:
    answers = [(503, {"Retry-After": "1"}, b"")]
    with TusServer(lambda m, path, headers: answers.pop() if m == "POST" and answers else None) as server:
        begin = time.monotonic()
        send(server)
        assert 1.0 <= time.monotonic() - begin < 5


def test_no_progress_within_the_deadline_ends_the_tries() -> None:
    now = [0.0]
    retries = Retries(
        RetryPolicy(stall_timeout_s=50.0), sleep=lambda s: now.append(now.pop() + s), clock=lambda: now[0]
    )
    retries.failed(TransientError("busy", retry_after_s=40.0))
    with pytest.raises(UploadError, match="stall_timeout_s=50"):
        retries.failed(TransientError("busy", retry_after_s=40.0))


def test_a_part_that_travels_longer_than_the_deadline_is_tried_again_when_it_fails() -> None:
    """On a slow link its first failure was the last one: 'no progress', though bytes had moved all along."""

    class SlowFile(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            time.sleep(0.12)
            return super().read(size)

    data = SMALL * 20_000
    failures = iter([503])

    def script(method: str, path: str, headers: dict[str, str]) -> Any:
        return (next(failures), {}, b"") if method == "PATCH" and failures.__length_hint__() else None

    with TusServer(script, extensions="creation,termination") as server:
        transport = TusTransport(server.url, None, RetryPolicy(0.3, base_s=0.001, cap_s=0.002))
        slow = dataclasses.replace(item(data), file=SlowFile(data))
        transport.send(slow)
        transport.close()
        assert server.count("PATCH") == 2 and [bytes(found) for found in server.data.values()] == [data]


def test_pieces_grow_on_a_fast_link_and_are_small_again_when_it_slows_down() -> None:
    data = random.Random(0).randbytes(5 << 20)
    sent = []
    for piece in _pieces(item(data), 0, len(data), lambda: None):
        sent.append(piece)
        if len(sent) == 4:
            time.sleep(0.1)
    assert b"".join(sent) == data
    kib = [len(piece) >> 10 for piece in sent]
    # The machine may be slow by itself, at any of them.
    assert kib[0] == kib[4] == 256 and max(kib) > 256
    assert all(after <= 2 * before and after <= 1024 for before, after in itertools.pairwise(kib))


@pytest.mark.parametrize("told", ["0", "7", "101", "999999", "-1", "x", "", "١٠"])
def test_a_lying_offset_after_a_part_is_not_believed(told: str) -> None:
    lies = [1]

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH" and lies:
            lies.pop()
            return 204, {"Upload-Offset": told.encode("utf-8").decode("latin-1")}, b""
        return None

    with TusServer(script) as server:
        send(server)
        assert any(bytes(data) == SMALL for data in server.data.values())


@pytest.mark.parametrize("told", ["101", "999999", "x", ""])
def test_an_offset_that_cannot_be_begins_anew_and_ends_in_bounded_time(told: str) -> None:
    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH":
            return 503, {}, b""
        return (200, {"Upload-Offset": told, "Upload-Length": "100"}, b"") if m == "HEAD" else None

    with TusServer(script) as server:
        with pytest.raises(UploadError, match="gave up"):
            send(server)
        assert 1 < server.count("POST") <= MAX_TRIES
        assert server.count("DELETE") >= server.count("POST") - 1, "what is stale is terminated"


def test_an_upload_that_the_server_lost_is_begun_anew() -> None:
    lost = [1]

    def script(m: str, path: str, headers: dict[str, str]) -> Any:
        if m == "PATCH" and lost:
            lost.pop()
            return 404, {}, b""
        return None

    with TusServer(script) as server:
        send(server)
        assert server.count("POST") == 2 and bytes(server.data["/files/1"]) == SMALL


def test_checksums_go_along_where_the_server_knows_them() -> None:
    with TusServer() as server:
        send(server)
        assert all("upload-checksum" in h for m, _, h in server.requests if m == "PATCH")
    with TusServer(extensions="creation") as server:
        send(server)
        assert not any("upload-checksum" in h for _, _, h in server.requests)


def test_metadata_names_the_file() -> None:
    with TusServer() as server:
        upload = send(server)
        assert server.metadata == [
            {
                "filename": upload.path.rpartition("/")[2],
                "filetype": "application/zip",
                "path": upload.path,
                "sha256": upload.sha256,
            }
        ]
