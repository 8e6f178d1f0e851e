"""What tests of the collector share: a collector that runs, a client of it, the verbs of tus."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from upload_support import KEY, CountedItem, collector

httpx = pytest.importorskip("httpx")

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
