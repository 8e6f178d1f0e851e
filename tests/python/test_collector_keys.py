"""The collector: who may come in, keys and where they are kept, sessions of browsers."""

from __future__ import annotations

import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from ml_debugger.errors import InvalidInputError, StorageError
from upload_support import KEY, collector

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import collector_support  # noqa: E402
from ml_debugger.collector import KeyRing, add_key, hashed_key, new_key, serve  # noqa: E402
from ml_debugger.collector.server import make_server  # noqa: E402

storage, url = collector_support.storage, collector_support.url


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
