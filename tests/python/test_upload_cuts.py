"""Uploads over connections that are cut: at every byte, at random ones, for good."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ml_debugger.errors import UploadError
from ml_debugger.uploading.transports.collector import CollectorTransport
from upload_support import (
    KEY,
    QUICK,
    SMALL,
    CuttingProxy,
    assert_same_trace,
    collector,
    item,
    port_of,
    upload_quickly,
    write_trace,
)

pytest.importorskip("httpx")


def send_through(proxy: CuttingProxy, upload: Any, path: str = "") -> None:
    transport = CollectorTransport(f"http://127.0.0.1:{proxy.port}/{path}", KEY, QUICK)
    try:
        transport.send(upload)
    finally:
        transport.close()


def cut_everywhere(storage: Path, step: int, *, of_answers: bool) -> None:
    with collector(storage) as url:
        with CuttingProxy(("127.0.0.1", port_of(url))) as proxy:
            send_through(proxy, item(SMALL, number=0))
        longest = proxy.passed
        assert 1000 < longest < 5000
        cut = 0
        for at in range(0, longest, step):
            upload = item(SMALL, number=at + 1)
            with CuttingProxy(("127.0.0.1", port_of(url)), [at], of_answers=of_answers) as proxy:
                send_through(proxy, upload)
                cut += proxy.cut_connections
            assert (storage / upload.path).read_bytes() == SMALL, f"cut after {at} bytes"
            assert sum(upload.sent) <= 2 * len(SMALL)
        assert cut > 0, "no connection was cut: the test proves nothing"
        assert not list(storage.rglob("*.part")), "nothing half is left"


@pytest.mark.parametrize("of_answers", [False, True])
def test_a_cut_of_the_connection_anywhere_in_a_small_upload_loses_nothing(
    of_answers: bool, tmp_path: Path
) -> None:
    cut_everywhere(tmp_path / "storage", 23, of_answers=of_answers)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("of_answers", [False, True])
def test_a_cut_at_every_byte_of_a_small_upload_loses_nothing(of_answers: bool, tmp_path: Path) -> None:
    cut_everywhere(tmp_path / "storage", 1, of_answers=of_answers)


def cut_large(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    data = generator.randbytes(24 << 20)
    cuts = [generator.randrange(9 << 20) for _ in range(4)]
    print(f"seed {seed}, cuts {cuts}")
    with collector(tmp_path / "storage") as url, CuttingProxy(("127.0.0.1", port_of(url)), cuts) as proxy:
        upload = item(data)
        send_through(proxy, upload)
        assert (tmp_path / "storage" / upload.path).read_bytes() == data
        # What was in buffers when the link broke is sent again, and nothing else.
        assert sum(upload.sent) - len(data) <= len(cuts) * (8 << 20)
        assert len(upload.urls) == 1, "an upload that has begun is gone on with"


@pytest.mark.parametrize("seed", range(2))
def test_cuts_at_random_bytes_of_a_large_upload_send_only_the_cut_parts_again(
    seed: int, tmp_path: Path
) -> None:
    cut_large(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2, 60))
def test_many_cuts_at_random_bytes_of_a_large_upload(seed: int, tmp_path: Path) -> None:
    cut_large(tmp_path, seed)


def test_an_upload_that_is_cut_for_good_goes_on_where_it_stopped(data_dir: Path, tmp_path: Path) -> None:
    """The whole way: the second upload, over a sound link, sends only what has not arrived."""
    write_trace(data_dir, epochs=(0,), width=100_000)
    storage = tmp_path / "storage"
    with collector(storage) as url:
        with CuttingProxy(("127.0.0.1", port_of(url)), [300_000] * 3 + [0] * 50) as proxy:
            with pytest.raises(UploadError, match="gave up after 5 tries"):
                upload_quickly(data_dir, f"http://127.0.0.1:{proxy.port}")
            (part,) = (storage / ".uploads").glob("*.part")
            arrived = part.stat().st_size
            assert arrived > 300_000
            # The same address, so that it is the same endpoint for the ledger.
            proxy.cuts.clear()
            report = upload_quickly(data_dir, f"http://127.0.0.1:{proxy.port}")
        (path,) = storage.rglob("a*.zip")
        assert report.bytes_sent == path.stat().st_size - arrived
    assert_same_trace(data_dir, storage)
