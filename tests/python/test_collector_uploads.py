"""The collector: uploads on their way in, what counts, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.client
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ml_debugger.errors import UploadError
from ml_debugger.uploading.transports.collector import CollectorTransport
from upload_support import KEY, QUICK, collector, item

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import collector_support  # noqa: E402
from collector_support import DATA, TUS, begin, creation, patch  # noqa: E402

client, storage, url = collector_support.client, collector_support.storage, collector_support.url


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


@pytest.mark.parametrize("how", ["killed", "ended", "swept", "forgotten"])
def test_a_quota_counts_what_came_before_the_end_of_a_collector_once(how: str, storage: Path) -> None:
    """What keys have left is not written down for each slice: a collector that was killed finds it again."""
    from ml_debugger.collector.storage import Storage

    place = Storage(storage)
    for number in range(3):
        upload = item(DATA, number=number)
        begun = place.begin(upload.path, upload.length_bytes, upload.sha256, "anna")
        with place.open_part(begun) as part:
            part.append(DATA)
        place.finish(begun)
        if how == "forgotten" and number == 1:
            done = place.find(begun.number, "anna")
            assert done is not None
            place.forget(done)
    assert place.used_bytes("anna") == 3 * len(DATA)
    if how == "swept":
        place.sweep()
    if how == "ended":
        place.close()
    assert (storage / ".uploads" / "usage.json").exists() == (how != "killed")
    for _ in range(2):
        place = Storage(storage)
        assert place.used_bytes("anna") == 3 * len(DATA)


def test_a_slice_costs_the_collector_two_syncs_its_own_and_that_of_its_name(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = [item(DATA, number=number) for number in range(3)]
    places = [begin(client, upload) for upload in uploads]
    assert patch(client, places[0], 0, DATA).status_code == 204
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor))[1])
    for place in places[1:]:
        assert patch(client, place, 0, DATA).status_code == 204
    assert len(synced) == 4


def test_a_body_that_comes_in_pieces_of_any_size_is_kept_as_it_came(client: Any, storage: Path) -> None:
    """Blocks take turns in memory that is used again; no piece may meet what lay there before."""
    generator = random.Random(3)
    data = generator.randbytes((5 << 20) + 7)
    upload = item(data)
    place = begin(client, upload)

    def pieces(begin: int, end: int) -> Iterator[bytes]:
        while begin < end:
            size = min(generator.choice([1, 1000, 65_536, 300_001, 2_500_000]), end - begin)
            yield data[begin : begin + size]
            begin += size

    for begin_at, end_at in ((0, 1), (1, 3_500_000), (3_500_000, len(data))):
        answer = patch(client, place, begin_at, pieces(begin_at, end_at))  # type: ignore[arg-type]
        assert answer.status_code == 204
    assert (storage / upload.path).read_bytes() == data


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
