"""The collector: traces that have arrived, its page, downloads, reading by address."""

from __future__ import annotations

import re
import time
import zipfile
from pathlib import Path

import pytest

from ml_debugger import load_export, open_trace
from ml_debugger.errors import AuthenticationError
from ml_debugger.uploading import upload_trace
from ml_debugger.uploading.transports.collector import CollectorTransport
from upload_support import KEY, assert_same_trace, collector, write_trace

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import collector_support  # noqa: E402

storage, url = collector_support.storage, collector_support.url


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
