"""The collector: who may come in, what counts, what it shows, and what it refuses."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.client
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_debugger import load_export, open_trace
from ml_debugger.errors import AuthenticationError, InvalidInputError, StorageError, UploadError
from ml_debugger.uploading import upload_trace
from ml_debugger.uploading.transports.collector import CollectorTransport
from upload_support import KEY, QUICK, CountedItem, assert_same_trace, collector, item, write_trace

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from ml_debugger.collector import KeyRing, add_key, hashed_key, new_key, serve  # noqa: E402
from ml_debugger.collector.server import make_server  # noqa: E402

DATA = b"a slice " * 40
TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "collected"


@pytest.fixture
def url(storage: Path) -> Any:
    with collector(storage) as found:
        yield found


@pytest.fixture
def client(url: str) -> Any:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}", **TUS}) as found:
        yield found


def creation(upload: CountedItem, **changed: str) -> dict[str, str]:
    metadata = {"path": upload.path, "sha256": upload.sha256, **changed}
    pairs = [f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items()]
    return {"Upload-Length": str(upload.length_bytes), "Upload-Metadata": ",".join(pairs)}


def begin(client: Any, upload: CountedItem) -> str:
    answer = client.post("/files/", headers=creation(upload))
    assert answer.status_code == 201
    return f"/files/{answer.headers['location']}"


def patch(client: Any, place: str, offset: int, data: bytes, **headers: str) -> Any:
    sent = {"Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream", **headers}
    return client.patch(place, headers=sent, content=data)


# Keys


def test_a_key_is_needed_for_everything_but_the_health(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    trace = "a-000000000000/b-000000000000"
    routes = ["GET /", f"GET /list/{trace}", "GET /data/x", "PUT /data/x", f"GET /export/{trace}.zip"]
    routes += ["POST /files/", "PATCH /files/x", "HEAD /files/x", "DELETE /files/x"]
    for method, path in (route.split() for route in routes):
        for headers in (
            {},
            {"Authorization": "Bearer no"},
            {"Authorization": "Basic !!"},
            {"Authorization": KEY},
        ):
            assert httpx.request(method, f"{url}{path}", headers=headers).status_code == 401, (
                method,
                path,
                headers,
            )


def test_a_key_may_come_as_a_password_of_any_user(url: str) -> None:
    answer = httpx.get(url)
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic ")
    assert httpx.get(url, auth=("anybody", KEY)).status_code == 200


HTML = {"Accept": "text/html,*/*;q=0.8"}


def test_a_browser_is_asked_for_the_key_and_gets_a_cookie_that_opens_pages_only(url: str) -> None:
    with httpx.Client(base_url=url, headers=HTML) as person:
        asked = person.get("/")
        assert asked.status_code == 401 and 'type="password"' in asked.text
        assert asked.headers["www-authenticate"] == "Bearer", "a browser has no window of its own for this"
        wrong = person.post("/sign-in", data={"key": "no"})
        assert wrong.status_code == 401 and "not a key" in wrong.text and not person.cookies
        taken = person.post("/sign-in", data={"key": f" {KEY} "})
        assert (taken.status_code, taken.headers["location"]) == (303, ".")
        cookie = taken.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
        assert KEY.lower() not in cookie and "path=" not in cookie
        shown = person.get("/")
        assert shown.status_code == 200 and "Sign out" in shown.text and KEY not in shown.text
        assert person.get("/export/a-000000000000/b-000000000000.zip").status_code == 404
        for method, path in (
            ("GET", "/list/a/b"),
            ("PUT", "/data/x"),
            ("POST", "/files/"),
            ("GET", "/data/x"),
        ):
            assert person.request(method, path).status_code == 401, "a cookie is no key for programs"
        ((name, token),) = person.cookies.items()
        person.post("/sign-out")
        assert person.get("/").status_code == 401
        kept = httpx.get(url, headers={**HTML, "Cookie": f"{name}={token}"})
        assert kept.status_code == 401, "the session is over, not only the cookie"
    forwarded = httpx.post(f"{url}/sign-in", data={"key": KEY}, headers={"X-Forwarded-Proto": "https"})
    assert "secure" in forwarded.headers["set-cookie"].lower()


def test_a_key_that_is_taken_out_of_the_file_ends_its_sessions(storage: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path)
    server, url, listener = make_server("127.0.0.1", 0, storage, KeyRing(["other"], path))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with listener, httpx.Client(base_url=url, headers=HTML) as person:
        assert person.post("/sign-in", data={"key": key}).status_code == 303
        assert person.get("/").status_code == 200
        path.write_text("# nobody\n")
        assert person.get("/").status_code == 401
        assert person.post("/sign-in", data={"key": key}).status_code == 401
        server.should_exit = True
        thread.join(10)


def test_another_site_signs_nobody_in_and_a_form_has_an_end(url: str) -> None:
    crossed = httpx.post(f"{url}/sign-in", data={"key": KEY}, headers={"Sec-Fetch-Site": "cross-site"})
    assert crossed.status_code == 403 and "set-cookie" not in crossed.headers
    assert httpx.post(f"{url}/sign-in", content=b"key=" + b"x" * (1 << 20)).status_code == 413


def test_sessions_end_by_time_and_the_oldest_when_there_are_too_many() -> None:
    from ml_debugger.collector.door import SESSION_S, Sessions

    now = [0.0]
    sessions = Sessions(clock=lambda: now[0])
    (entry,) = KeyRing(["a"]).entries
    first = sessions.begin(entry)
    assert sessions.find(first) is entry and sessions.find("") is None
    others = [sessions.begin(entry) for _ in range(1000)]
    assert sessions.find(first) is None and all(sessions.find(token) for token in others)
    now[0] = SESSION_S + 1
    assert sessions.find(others[-1]) is None


def test_keys_may_be_plain_or_hashed_and_are_kept_hashed(storage: Path, tmp_path: Path) -> None:
    key = new_key()
    assert len(key) > 40 and new_key() != key
    ring = KeyRing(["# a comment", "", f"  {hashed_key(key)} 20GB ", "plain 5 MiB", "unlimited"])
    found = ring.find(key)
    assert found is not None and found.quota_bytes == 20 * 10**9
    assert ring.find("plain").quota_bytes == 5 << 20 and ring.find("unlimited").quota_bytes is None  # type: ignore[union-attr]
    for wrong in ("", "plain ", "Plain", hashed_key(key), key[:-1]):
        assert ring.find(wrong) is None
    assert key not in repr(vars(ring)) and "unlimited" not in repr(ring.entries)


@pytest.mark.parametrize("line", ["sha256:12", "key 5 parsecs", "ключ", "sha256:" + "g" * 64])
def test_a_malformed_line_of_keys_is_refused_and_not_shown(line: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        KeyRing(["fine", line])
    assert line not in str(caught.value) and "2" in str(caught.value)


def test_a_new_key_is_kept_as_its_hash_in_a_file_of_the_owners_own(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = add_key(path, quota="20GB", note="the cluster\nof anna")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with open(path, "a") as file:
        file.write("plain 5MB")  # as an editor may leave it, without an end of line
    path.chmod(0o640)
    second = add_key(path)
    assert path.read_text() == (
        f"# the cluster of anna\n{hashed_key(first)} 20GB\nplain 5MB\n{hashed_key(second)}\n"
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and [p.name for p in tmp_path.iterdir()] == ["keys"]
    ring = KeyRing([], path)
    quotas = [getattr(ring.find(key), "quota_bytes", "unknown") for key in (first, "plain", second, "x")]
    assert quotas == [20 * 10**9, 5 * 10**6, None, "unknown"]


def test_keys_that_are_added_at_once_are_all_kept_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "keys").symlink_to(tmp_path / "etc" / "keys")
    keys: list[str] = []
    threads = [threading.Thread(target=lambda: keys.append(add_key(tmp_path / "keys"))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ring = KeyRing([], tmp_path / "keys")
    assert len(keys) == 12 and all(ring.find(key) for key in keys) and (tmp_path / "keys").is_symlink()


@pytest.mark.parametrize(("content", "quota"), [("sha256:12", None), (b"\xff", None), ("", "5 parsecs")])
def test_no_key_is_added_to_what_is_no_keys_file(content: Any, quota: str | None, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    with pytest.raises(InvalidInputError):
        add_key(path, quota=quota)
    with pytest.raises(StorageError, match="nowhere"):
        add_key(tmp_path / "nowhere" / "keys")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_keys_file_that_changes_counts_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    first = add_key(path)
    ring = KeyRing([], path)
    second = add_key(path)
    assert ring.find(first) and ring.find(second)
    path.write_text(f"{hashed_key(second)}\n")
    assert ring.find(first) is None and ring.find(second)
    path.write_text("sha256:half of a ha")
    assert ring.find(second) and ring.find(second) and caplog.text.count("the keys of before hold") == 1
    path.write_text("# nobody any more\n")
    assert ring.find(second) is None and ring, "a file without keys lets nobody in"


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLD_API_KEYS", "one, two")
    (tmp_path / "keys").write_text("three\n\n# no\n")
    ring = KeyRing.from_environment(tmp_path / "keys")
    assert all(ring.find(key) for key in ("one", "two", "three")) and len(ring.entries) == 3
    for content in (None, "# only\n"):
        path = tmp_path / "other"
        if content is not None:
            path.write_text(content)
        with pytest.raises(InvalidInputError):
            KeyRing.from_environment(path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_without_keys_it_listens_on_loopback_only(host: str, storage: Path) -> None:
    with pytest.raises(InvalidInputError, match="keys"):
        serve(host, 0, storage, keys=KeyRing([]))
    assert not storage.exists()


def test_without_keys_it_answers_to_names_of_this_machine_only(storage: Path) -> None:
    with collector(storage, keys=()) as url:
        assert httpx.get(url).status_code == 200
        assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 421


def test_a_port_that_is_taken_is_said(storage: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InvalidInputError, match="cannot listen"):
            serve("127.0.0.1", taken.getsockname()[1], storage, keys=KeyRing([]))
    assert not storage.exists()


@pytest.mark.parametrize("place", ["http://host/", "ftp://host/", "s3://", "https://me:secret-9@host/"])
def test_a_storage_that_is_none_is_said(place: str) -> None:
    with pytest.raises(InvalidInputError, match="folder or an object store") as caught:
        serve("127.0.0.1", 0, place, keys=KeyRing([]))
    assert "secret-9" not in str(caught.value)


# Uploads


def test_what_arrives_is_the_trace_and_the_export_of_it(
    url: str, storage: Path, data_dir: Path, tmp_path: Path
) -> None:
    write_trace(data_dir, model="<b>&'\"\n模型")
    report = upload_trace("<b>&'\"\n模型", "v1", data_dir=data_dir, endpoint=url, api_key=KEY)
    assert report.segments_sent == 3
    assert_same_trace(data_dir, storage, "<b>&'\"\n模型")
    page = httpx.get(url, auth=("", KEY)).text
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page and "模型" in page
    trace = open_trace("<b>&'\"\n模型", "v1", data_dir)
    rows, labelled = (trace.num_rows(table) for table in ("extracted_feature", "ground_truth"))
    cells = dict(re.findall(r'<td data-name="([^"]+)"[^>]*><div>(.*?)</div></td>', page))
    assert (cells["rows"], cells["labelled"], cells["epochs"]) == (str(rows), str(labelled), "none, 0, 1")
    assert rows > labelled > 0 and " UTC</span></time>" in cells["last sync"]
    link = re.search('href="([^"]+)"', page)[1]  # type: ignore[index]
    answer = httpx.get(f"{url}/{link}", auth=("", KEY))
    assert answer.status_code == 200 and "attachment" in answer.headers["content-disposition"]
    (tmp_path / "got.zip").write_bytes(answer.content)
    assert load_export(tmp_path / "got.zip").num_rows("extracted_feature") == rows
    deadline = time.monotonic() + 10
    while list((storage / ".uploads").glob("export-*")):
        assert time.monotonic() < deadline, "nothing of a download stays"


def test_an_empty_collector_says_so(url: str) -> None:
    assert "Nothing has been uploaded yet" in httpx.get(url, auth=("", KEY)).text


def test_a_slice_counts_only_when_its_checksum_is_right(client: Any, storage: Path) -> None:
    upload = item(DATA)
    place = begin(client, upload)
    wrong = bytes(reversed(DATA))
    assert patch(client, place, 0, wrong).status_code == 460
    assert not (storage / upload.path).exists()
    assert client.head(place).status_code == 404, "it is forgotten"
    place = begin(client, upload)
    assert patch(client, place, 0, DATA).headers["upload-offset"] == str(len(DATA))
    assert (storage / upload.path).read_bytes() == DATA


def test_an_upload_goes_on_at_its_offset_and_nowhere_else(client: Any, storage: Path) -> None:
    upload = item(DATA)
    place = begin(client, upload)
    assert patch(client, place, 0, DATA[:100]).headers["upload-offset"] == "100"
    for offset in (0, 99, 101, 10**6):
        assert patch(client, place, offset, DATA[100:]).status_code == 409
    assert client.head(place).headers["upload-offset"] == "100"
    assert begin(client, upload) == place, "who has lost the place gets it again"
    assert patch(client, place, 100, DATA[100:] + b"x").status_code == 413
    offset = int(client.head(place).headers["upload-offset"])
    assert patch(client, place, offset, DATA[offset:]).status_code == 204
    assert client.head(place).headers["upload-offset"] == str(len(DATA)), "who has lost the answer asks again"
    assert (storage / upload.path).read_bytes() == DATA


def test_a_part_with_a_wrong_checksum_does_not_count(client: Any, storage: Path) -> None:
    upload = item(DATA)
    place = begin(client, upload)
    right = base64.b64encode(hashlib.sha1(DATA[:50]).digest()).decode()
    assert patch(client, place, 0, DATA[1:51], **{"Upload-Checksum": f"sha1 {right}"}).status_code == 460
    assert client.head(place).headers["upload-offset"] == "0"
    assert patch(client, place, 0, DATA[:50], **{"Upload-Checksum": f"sha1 {right}"}).status_code == 204
    for header in ("crc32 AAAA", "sha1 !!", "sha1"):
        assert patch(client, place, 50, DATA[50:], **{"Upload-Checksum": header}).status_code in (400, 460)


def test_an_upload_can_be_ended(client: Any, storage: Path) -> None:
    place = begin(client, item(DATA))
    assert client.delete(place).status_code == 204
    assert client.head(place).status_code == client.delete(place).status_code == 404
    assert not list((storage / ".uploads").glob("*.part"))


def test_an_upload_belongs_to_its_key(storage: Path) -> None:
    with collector(storage, keys=("one", "two")) as url:
        mine = httpx.Client(base_url=url, headers={"Authorization": "Bearer one", **TUS})
        other = httpx.Client(base_url=url, headers={"Authorization": "Bearer two", **TUS})
        with mine, other:
            place = begin(mine, item(DATA))
            assert other.head(place).status_code == 404
            assert patch(other, place, 0, DATA).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "", "/etc/passwd", "../x", "a/b", "{trace}/version.json", "{trace}/rank-00000/epoch-0/x.zip",
        "{trace}/rank-00000/../epoch-0/{name}", "{trace}/rank-00000/epoch-0/../{name}",
        "..-000000000000/{rest}", "{trace}/rank-00000/epoch-0/{name}\n",
        "{trace}/rank-00000/epoch-0/{name}/x",
        "{trace}/rank-0/epoch-0/{name}",
    ],
)  # fmt: skip
def test_only_slices_are_taken_and_only_to_their_place(path: str, client: Any, storage: Path) -> None:
    upload = item(DATA)
    trace, _, rest = upload.path.partition("/rank-")
    filled = path.format(trace=trace, name=upload.path.rpartition("/")[2], rest=f"x/rank-{rest}")
    assert client.post("/files/", headers=creation(upload, path=filled)).status_code == 400
    assert client.post("/files/", headers=creation(upload, sha256="0" * 64)).status_code == 400
    assert client.put(f"/data/{filled}".replace("\n", "%0a") or "/data/", content=b"x").status_code in (
        204,
        404,
        405,
    )
    known = (".uploads", ".incoming", "version.json")
    assert not [path for path in storage.rglob("*") if path.is_file() and not set(known) & set(path.parts)]


@pytest.mark.parametrize(
    "headers",
    [
        {"Upload-Length": "x"}, {"Upload-Length": "-1"}, {"Upload-Length": "0"}, {"Upload-Length": "9" * 30},
        {"Upload-Metadata": "path !!"}, {"Upload-Metadata": ""}, {"Upload-Metadata": "x" * 20000},
        {"Tus-Resumable": "0.2.2"},
    ],
)  # fmt: skip
def test_malformed_creations_are_refused(headers: dict[str, str], client: Any) -> None:
    answer = client.post("/files/", headers={**creation(item(DATA)), **headers})
    assert answer.status_code in (400, 412), answer.text


def test_patches_need_the_type_and_the_version(client: Any) -> None:
    place = begin(client, item(DATA))
    assert patch(client, place, 0, DATA, **{"Content-Type": "text/plain"}).status_code == 415
    assert patch(client, place, 0, DATA, **{"Tus-Resumable": "9"}).status_code == 412
    assert client.options("/files/").headers["tus-extension"] == "creation,checksum,termination"


def test_a_quota_is_kept_over_restarts(storage: Path) -> None:
    keys = (f"{KEY} {len(DATA) * 5 // 2}B",)
    for number in range(4):
        with collector(storage, keys=keys) as url:
            transport = CollectorTransport(f"{url}/", KEY, QUICK)
            if number < 2:
                transport.send(item(DATA + bytes([number]), number=number))
            elif number == 2:
                with pytest.raises(UploadError, match=r"413.*quota"):
                    transport.send(item(DATA, number=number))
            else:
                transport.send(
                    item(DATA + bytes([0]), number=0)
                )  # it is there already: it takes no more room
            transport.close()


def test_a_full_disk_is_507_and_what_has_arrived_stays(
    client: Any, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.collector.storage import Storage

    upload = item(DATA)
    place = begin(client, upload)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "finish", full)
        answer = patch(client, place, 0, DATA)
        assert answer.status_code == 507 and "full" in answer.json()["detail"]
        patched.setattr(Storage, "free_bytes", lambda self: 10)
        assert client.post("/files/", headers=creation(item(DATA, number=5))).status_code == 507
    assert client.head(place).headers["upload-offset"] == str(len(DATA))


def test_a_client_that_comes_again_is_served_though_its_old_connection_hangs(
    client: Any, url: str, storage: Path
) -> None:
    upload = item(DATA)
    place = begin(client, upload)
    port = int(url.rpartition(":")[2])
    hanging = http.client.HTTPConnection("127.0.0.1", port)
    hanging.putrequest("PATCH", place)
    for name, value in {**TUS, "Authorization": f"Bearer {KEY}", "Upload-Offset": "0",
                        "Content-Type": "application/offset+octet-stream",
                        "Content-Length": str(len(DATA))}.items():  # fmt: skip
        hanging.putheader(name, value)
    hanging.endheaders(DATA[:60])
    deadline = time.monotonic() + 10
    while (offset := int(client.head(place).headers["upload-offset"])) == 0 and time.monotonic() < deadline:
        pass
    assert offset == 60, "what came before is kept"
    assert patch(client, place, offset, DATA[offset:]).status_code == 204
    assert (storage / upload.path).read_bytes() == DATA
    hanging.close()


def test_a_client_that_comes_again_while_its_slice_is_verified_waits_for_that(
    client: Any, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by cutting the connection at every byte: a HEAD in that moment was answered with status 500."""
    from ml_debugger.uploading.transports.folder import FolderTransport

    upload = item(DATA)
    place = begin(client, upload)
    adopt = FolderTransport.adopt
    moved, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        adopt(*arguments)
        moved.set()
        go_on.wait(10)

    monkeypatch.setattr(FolderTransport, "adopt", slow)
    answers: list[int] = []
    sender = threading.Thread(target=lambda: answers.append(patch(client, place, 0, DATA).status_code))
    asker = threading.Thread(
        target=lambda: answers.append(int(client.head(place).headers.get("upload-offset", -1)))
    )
    sender.start()
    assert moved.wait(10)
    asker.start()
    time.sleep(0.2)
    go_on.set()
    asker.join(10)
    sender.join(10)
    assert len(DATA) in answers
    assert (storage / upload.path).read_bytes() == DATA


def test_bytes_that_were_never_verified_do_not_count_though_all_are_there(client: Any, storage: Path) -> None:
    """Found by cutting at every byte: the last part was written, its sender cut off before the check."""
    for data in (DATA, bytes(reversed(DATA))):
        upload = item(DATA)
        place = begin(client, upload)
        (part,) = (storage / ".uploads").glob("*.part")
        part.write_bytes(data)
        answer = client.head(place)
        if data == DATA:
            assert answer.headers["upload-offset"] == str(len(DATA))
            assert (storage / upload.path).read_bytes() == DATA
        else:
            assert answer.status_code == 404, "what is wrong is forgotten"


def test_a_slice_that_was_placed_when_the_collector_was_killed_counts_as_arrived(
    storage: Path,
) -> None:
    upload = item(DATA)
    headers = {"Authorization": f"Bearer {KEY}", **TUS}
    with collector(storage) as url, httpx.Client(base_url=url, headers=headers) as client:
        place, lost = begin(client, upload), begin(client, item(DATA, number=7))
        # What is on the disk after a kill behind the rename: the record of an upload, and no part.
        (record,) = (storage / ".uploads").glob(f"{place.rpartition('/')[2]}.upload")
        before = record.read_bytes()
        assert patch(client, place, 0, DATA).status_code == 204
        record.write_bytes(before)
    (part,) = (storage / ".uploads").glob("*.part")
    part.unlink()
    orphan = part.with_name("0" * 32 + ".part")
    orphan.touch()
    os.utime(orphan, (0, 0))
    with collector(storage) as url, httpx.Client(base_url=url, headers=headers) as client:
        assert client.head(place).headers["upload-offset"] == str(len(DATA))
        assert client.head(lost).status_code == 404
    assert (storage / upload.path).read_bytes() == DATA and not orphan.exists()


@pytest.mark.parametrize("restarts", [False, True])
def test_what_comes_in_parts_is_verified_as_a_whole(restarts: bool, storage: Path) -> None:
    """The hash runs along; a restart, or a part that was taken back, must not confuse it."""
    headers = {"Authorization": f"Bearer {KEY}", **TUS}
    data = random.Random(1).randbytes(3 << 20)
    right, wrong = item(data, number=1), item(data, number=2)
    with contextlib.ExitStack() as stack:
        for upload, sent in ((right, data), (wrong, data[:-1] + b"?" if data[-1:] != b"?" else b"!")):
            with collector(storage) as url, httpx.Client(base_url=url, headers=headers) as client:
                place = begin(client, upload)
                assert patch(client, place, 0, sent[: 2 << 20]).status_code == 204
                taken_back = {"Upload-Checksum": f"sha1 {base64.b64encode(bytes(20)).decode()}"}
                assert patch(client, place, 2 << 20, sent[: 1 << 20], **taken_back).status_code == 460
                if restarts:
                    url = stack.enter_context(collector(storage))
                    client = stack.enter_context(httpx.Client(base_url=url, headers=headers))
                answer = patch(client, place, 2 << 20, sent[2 << 20 :])
                assert answer.status_code == (204 if upload is right else 460)
    assert (storage / right.path).read_bytes() == data and not (storage / wrong.path).exists()


def test_a_slice_that_came_in_one_go_is_not_read_again(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ml_debugger.collector import storage as module

    lengths: list[int] = []
    of_all = module.Running.of_all

    def watched(running: Any, file: Any) -> str:
        lengths.append(running.length_bytes)
        return of_all(running, file)

    monkeypatch.setattr(module.Running, "of_all", watched)
    data = bytes(5 << 20)
    place = begin(client, item(data))
    assert patch(client, place, 0, data).status_code == 204
    assert lengths == [len(data)]


def test_documents_change_only_under_their_condition(client: Any) -> None:
    path = "/data/net-000000000000/v1-000000000000/version.json"
    assert client.get(path).status_code == 404
    assert client.put(path, content=b"{}", headers={"If-Match": '"x"'}).status_code == 412
    assert client.put(path, content=b"{}", headers={"If-None-Match": "*"}).status_code == 204
    assert client.put(path, content=b"[]", headers={"If-None-Match": "*"}).status_code == 412
    etag = client.get(path).headers["etag"]
    assert client.put(path, content=b"[]", headers={"If-Match": etag}).status_code == 204
    assert client.put(path, content=b"{}", headers={"If-Match": etag}).status_code == 412
    assert client.get(path).content == b"[]"
    assert client.put(path, content=bytes(9 << 20)).status_code == 413


def test_a_slice_that_is_placed_when_the_disk_has_no_room_to_note_it_counts(
    client: Any, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.collector import storage as module

    upload = item(DATA)
    place = begin(client, upload)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(module.layout, "write_json", full)
    assert patch(client, place, 0, DATA).status_code == 507
    monkeypatch.undo()
    assert client.head(place).headers["upload-offset"] == str(len(DATA))
    assert (storage / upload.path).read_bytes() == DATA


def test_stale_uploads_are_swept(client: Any, storage: Path) -> None:
    from ml_debugger.collector.storage import Storage

    place = begin(client, item(DATA))
    (part,) = (storage / ".uploads").glob("*.part")
    os.utime(part, (0, 0))
    Storage(storage)
    assert not part.exists() and place


SERVE = """
import signal, sys
from ml_debugger.collector import serve, server
server._GRACE_S = float(sys.argv[2])
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
serve(port=0, storage=sys.argv[1], on_ready=lambda url: print(url, flush=True))
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
print("returned")
"""


@contextlib.contextmanager
def served(storage: Path, grace_s: float = 5) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` as a program of somebody calls it, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(storage), str(grace_s)],
        env={**os.environ, "MLD_API_KEYS": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_names_its_address_and_returns_after_a_signal(number: int, storage: Path) -> None:
    with served(storage) as (process, url):
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(url, auth=("", KEY)).status_code == 200
        assert KEY.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("returned\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize("how", ["upload", "document", "twice"])
def test_a_request_that_hangs_does_not_hold_up_the_end_and_leaves_no_traceback(
    how: str, storage: Path
) -> None:
    with served(storage, 60 if how == "twice" else 0.5) as (process, url):
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}", **TUS}) as client:
            upload = item(DATA)
            place = begin(client, upload)
        method, path = ("PUT", "/data/net-000000000000/v1-000000000000/version.json")
        if how != "document":
            method, path = "PATCH", place
        hanging = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
        hanging.putrequest(method, path)
        for name, value in {**TUS, "Authorization": f"Bearer {KEY}", "Upload-Offset": "0",
                            "Content-Type": "application/offset+octet-stream",
                            "Content-Length": str(len(DATA))}.items():  # fmt: skip
            hanging.putheader(name, value)
        hanging.endheaders(DATA[:60])
        time.sleep(0.3)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        if how == "twice":
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("returned\n", "")
        assert time.monotonic() - began < 10
        hanging.close()
    if how == "upload":
        (part,) = (storage / ".uploads").glob("*.part")
        assert part.read_bytes() == DATA[:60], "what has arrived stays"


def test_an_export_that_is_being_made_does_not_hold_up_the_end(
    data_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.collector import overview, server

    write_trace(data_dir)
    upload_trace("net", "v1", data_dir=data_dir, endpoint=str(storage))
    monkeypatch.setattr(server, "_GRACE_S", 0.2)
    begun = threading.Event()

    def endless(*arguments: Any, progress: Any) -> Any:
        begun.set()
        while True:
            progress(1, 2)
            time.sleep(0.01)

    monkeypatch.setattr(overview, "export_trace", endless)
    with collector(storage, keys=()) as url:
        link = re.search('href="([^"]+)"', httpx.get(url).text)[1]  # type: ignore[index]

        def download() -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{url}/{link}", timeout=30)

        asker = threading.Thread(target=download)
        asker.start()
        assert begun.wait(10)
        ending = time.monotonic()
    assert time.monotonic() - ending < 8
    asker.join(10)
    assert not asker.is_alive() and not list((storage / ".uploads").glob("export-*"))


def test_a_collector_keeps_traces_in_an_object_store(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pytest.importorskip("obstore.store")
    from ml_debugger.uploading.transports import objects

    memory = store.MemoryStore()
    monkeypatch.setattr(objects, "_open_store", lambda address, policy: memory)
    monkeypatch.chdir(tmp_path)
    write_trace(data_dir)
    with collector("s3://bucket/collected") as url:  # type: ignore[arg-type]
        for sent in (3, 0):
            assert (
                upload_trace("net", "v1", data_dir=data_dir, endpoint=url, api_key=KEY).segments_sent == sent
            )
        page = httpx.get(url, auth=("", KEY)).text
        link = re.search('href="([^"]+)"', page)[1]  # type: ignore[index]
        answer = httpx.get(f"{url}/{link}", auth=("", KEY))
    (tmp_path / "got.zip").write_bytes(answer.content)
    assert zipfile.ZipFile(tmp_path / "got.zip").testzip() is None
    rows = open_trace("net", "v1", data_dir).num_rows("extracted_feature")
    assert load_export(tmp_path / "got.zip").num_rows("extracted_feature") == rows


def test_a_wrong_key_is_an_authentication_error(url: str, data_dir: Path) -> None:
    write_trace(data_dir)
    for key in ("wrong", None):
        with pytest.raises(AuthenticationError, match="401") as caught:
            upload_trace("net", "v1", data_dir=data_dir, endpoint=url, api_key=key)
        assert "MLD_API_KEY" in caught.value.hint


def test_open_trace_reads_a_collector_by_its_address(
    url: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLD_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_trace(data_dir)
    with pytest.raises(KeyError, match="no trace"):
        open_trace("net", "v1", url)
    assert not (tmp_path / "cache").exists()
    upload_trace("net", "v1", data_dir=data_dir, endpoint=url, n_epoch=0)
    assert open_trace("net", "v1", url).epochs == [0]
    upload_trace("net", "v1", data_dir=data_dir, endpoint=url)
    assert_same_trace(data_dir, url)  # type: ignore[arg-type]
    from ml_debugger.uploading.transports.collector import CollectorTransport

    trace = next(path for path in (tmp_path / "cache").glob("ml_debugger/*/*/*")).relative_to(
        next((tmp_path / "cache" / "ml_debugger").iterdir())
    )
    evil = {
        f"{trace}/version.json": 1,
        str(tmp_path / "version.json"): 1,
        f"{trace}/../../../version.json": 1,
    }
    with monkeypatch.context() as patched:
        real = CollectorTransport.read
        patched.setattr(CollectorTransport, "held", lambda self, trace, urls: evil)
        patched.setattr(
            CollectorTransport,
            "read",
            lambda self, path: real(self, path) if path == f"{trace}/version.json" else b"{}",
        )
        open_trace("net", "v1", url)
    assert not list(tmp_path.glob("**/cache/version.json")) and not (tmp_path / "version.json").exists()
    monkeypatch.setenv("MLD_API_KEY", "wrong")
    with pytest.raises(AuthenticationError):
        open_trace("net", "v1", url)
