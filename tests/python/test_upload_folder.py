"""Uploads into a folder: what arrives is the trace, and nothing is sent that is there already."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from ml_debugger import open_trace
from ml_debugger.errors import CorruptDataError, InvalidTypeError, NotFoundError, UploadError
from ml_debugger.store import layout
from ml_debugger.uploading import UploadReport, upload_trace
from ml_debugger.uploading.client import UploadClient
from ml_debugger.uploading.transports.folder import FolderTransport
from upload_support import assert_same_trace, write_trace


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "endpoint"


def upload(data_dir: Path, there: Path | str, **arguments: object) -> UploadReport:
    return upload_trace("net", "v1", data_dir=data_dir, endpoint=str(there), **arguments)  # type: ignore[arg-type]


def slices(there: Path) -> list[Path]:
    return sorted(there.rglob("*.zip"))


@pytest.mark.parametrize("sealed", [True, False])
def test_what_arrives_is_the_trace_bit_for_bit(sealed: bool, data_dir: Path, there: Path) -> None:
    write_trace(data_dir, sealed=sealed)
    report = upload(data_dir, there)
    assert report.segments_sent == 3 and report.segments_skipped == 0
    assert report.bytes_sent == sum(path.stat().st_size for path in slices(there))
    assert_same_trace(data_dir, there)


@pytest.mark.parametrize("name", ["version.json", "attempts.json"])
def test_a_document_that_others_change_all_the_time_ends_the_upload(
    name: str, data_dir: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices that nobody can place would not be a trace."""
    swap = FolderTransport.swap

    def lost(self: FolderTransport, path: str, old: bytes | None, new: bytes) -> bool:
        return False if path.endswith(name) else swap(self, path, old, new)

    write_trace(data_dir)
    monkeypatch.setattr(FolderTransport, "swap", lost)
    with pytest.raises(UploadError, match=rf"{name} at the endpoint changed 20 times"):
        upload(data_dir, there)
    assert slices(there) == []
    monkeypatch.undo()
    upload(data_dir, there)
    assert_same_trace(data_dir, there)


def test_an_export_of_what_arrived_is_the_export_of_the_trace(
    data_dir: Path, there: Path, tmp_path: Path
) -> None:
    from ml_debugger.exporting import export_trace

    local = write_trace(data_dir)
    upload(data_dir, there)
    one = export_trace(local, tmp_path / "one.zip")
    other = export_trace(there / local.relative_to(data_dir), tmp_path / "other.zip")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("address", ["path", "file:"])
def test_a_second_upload_sends_nothing_and_force_sends_all(address: str, data_dir: Path, there: Path) -> None:
    write_trace(data_dir)
    to = str(there) if address == "path" else there.as_uri()
    first = upload(data_dir, to)
    before = {path: path.read_bytes() for path in slices(there)}
    second = upload(data_dir, to)
    assert (second.segments_sent, second.segments_skipped, second.bytes_sent) == (0, 3, 0)
    third = upload(data_dir, to, force=True)
    assert (third.segments_sent, third.bytes_sent) == (first.segments_sent, first.bytes_sent)
    assert {path: path.read_bytes() for path in slices(there)} == before


@pytest.mark.parametrize("damage", ["gone", "cut", "all gone"])
def test_what_vanished_at_the_endpoint_is_sent_again(damage: str, data_dir: Path, there: Path) -> None:
    write_trace(data_dir)
    upload(data_dir, there)
    if damage == "all gone":
        shutil.rmtree(there)
    elif damage == "gone":
        slices(there)[1].unlink()
    else:
        os.truncate(slices(there)[1], 100)
    assert upload(data_dir, there).segments_sent == (3 if damage == "all gone" else 1)
    assert_same_trace(data_dir, there)


@pytest.mark.parametrize("how", ["lost", "emptied", "halved"])
def test_a_ledger_that_a_power_cut_has_taken_costs_no_duplicates(
    how: str, data_dir: Path, there: Path
) -> None:
    trace = write_trace(data_dir)
    upload(data_dir, there)
    before = slices(there)
    ledger = trace / "rank-00000" / "uploads"
    for path in list(ledger.rglob("a*.json")):
        os.truncate(path, 0 if how == "emptied" else path.stat().st_size // 2)
    if how == "lost":
        shutil.rmtree(ledger)
    upload(data_dir, there)
    assert slices(there) == before, "the same rows give the same slices"
    assert_same_trace(data_dir, there)


@pytest.mark.parametrize("epoch, sent", [(0, 1), (-1, 1), (7, 0)])
def test_only_the_epoch_that_is_asked_for_goes(epoch: int, sent: int, data_dir: Path, there: Path) -> None:
    write_trace(data_dir)
    assert upload(data_dir, there, n_epoch=epoch).segments_sent == sent
    if not sent:
        assert not there.exists(), "of an epoch that is not there nothing is sent"
    else:
        assert open_trace("net", "v1", there).epochs == [epoch]
        assert upload(data_dir, there).segments_sent == 2
        assert_same_trace(data_dir, there)


def test_ranks_of_several_machines_merge(tmp_path: Path, there: Path) -> None:
    both = tmp_path / "both"
    for rank in (0, 1):
        write_trace(tmp_path / f"machine{rank}", rank=rank, seed=rank)
        write_trace(both, rank=rank, seed=rank)
        upload(tmp_path / f"machine{rank}", there)
    assert_same_trace(both, there)


def test_a_run_on_another_machine_under_the_same_name_is_another_attempt(tmp_path: Path, there: Path) -> None:
    for machine in (0, 1, 1):
        trace = write_trace(tmp_path / f"machine{machine}", seed=machine)
        path = trace / "rank-00000" / "attempts.json"
        document = json.loads(path.read_text())
        document["attempts"][0]["started_unix_s"] = float(machine)
        path.write_text(json.dumps(document))
    for machine in (0, 1):
        assert upload(tmp_path / f"machine{machine}", there).segments_sent == 3
        assert upload(tmp_path / f"machine{machine}", there).segments_sent == 0
    merged = open_trace("net", "v1", there)
    assert merged.attempts == [0, 1]
    rows = [open_trace("net", "v1", tmp_path / f"machine{machine}") for machine in (0, 1)]
    assert merged.num_rows("extracted_feature") == sum(trace.num_rows("extracted_feature") for trace in rows)
    row_ids = merged.arrays("extracted_feature", columns=["row_id"])["row_id"]
    assert len(set(row_ids.tolist())) == len(row_ids)


def test_a_version_that_was_recreated_hides_what_was_sent_of_the_old_one(data_dir: Path, there: Path) -> None:
    trace = write_trace(data_dir)
    upload(data_dir, there)
    old = slices(there)
    shutil.rmtree(trace / "rank-00000")
    write_trace(data_dir, epochs=(5,), seed=1)
    version = json.loads((trace / "version.json").read_text())
    (trace / "version.json").write_text(json.dumps(version | {"fingerprint": "e" * 64}))
    upload(data_dir, there)
    assert_same_trace(data_dir, there)
    assert all(path.exists() for path in old), "nothing is deleted at an endpoint"


def test_dropped_rows_stay_at_the_endpoint_and_stop_nothing(data_dir: Path, there: Path) -> None:
    trace = write_trace(data_dir)
    upload(data_dir, there)
    shutil.rmtree(trace / "rank-00000" / "epoch-0")
    slices(there)[0].unlink()
    report = upload(data_dir, there, force=True)
    assert report.segments_sent == 2
    assert not list((trace / "rank-00000" / "uploads").glob("*/epoch-0/*.json"))


def test_an_upload_that_died_before_the_endpoint_answered_sends_nothing_twice(
    data_dir: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.uploading.ledger import Entry

    write_trace(data_dir)
    monkeypatch.setattr(Entry, "confirmed", lambda entry: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        upload(data_dir, there)
    assert len(slices(there)) == 1
    monkeypatch.undo()
    report = upload(data_dir, there)
    assert (report.segments_sent, report.segments_skipped) == (2, 1)
    assert len(slices(there)) == 3
    assert_same_trace(data_dir, there)


def test_large_calls_are_cut_into_several_slices(
    data_dir: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml_debugger.uploading import slices as module

    monkeypatch.setattr(module, "SLICE_BYTES", 4000)
    monkeypatch.setattr(module, "_IN_MEMORY_BYTES", 3000)
    monkeypatch.setattr(module, "_STEP_BYTES", 1000)
    write_trace(data_dir, calls=9, width=300)
    assert upload(data_dir, there).segments_sent == 3 * 5
    assert_same_trace(data_dir, there)


def test_two_uploaders_of_one_trace_send_every_slice_once(data_dir: Path, there: Path) -> None:
    write_trace(data_dir, epochs=tuple(range(12)))
    reports: list[UploadReport] = []
    threads = [threading.Thread(target=lambda: reports.append(upload(data_dir, there))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.segments_sent for report in reports) == [0, 12]
    assert_same_trace(data_dir, there)


@pytest.mark.parametrize("name", ["a/b\\c", "..", "ümläut 模型", "x" * 300, "a\nb", "%s", "\udc80"])
def test_odd_names_arrive(name: str, tmp_path: Path, there: Path) -> None:
    import torch

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with ClassificationTracer(model, name, name, config=TracerConfig(data_dir=tmp_path / "data")) as tracer:
        tracer(torch.zeros(3, 2), None, ["a", "b", name[:1].encode("utf-8", "replace").decode()], n_epoch=1)
    upload_trace(name, name, data_dir=tmp_path / "data", endpoint=str(there))
    assert_same_trace(tmp_path / "data", there, name, name)


def test_a_damaged_slice_is_said_and_never_read(data_dir: Path, there: Path) -> None:
    write_trace(data_dir, epochs=(0,))
    upload(data_dir, there)
    path = slices(there)[0]
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        try:
            assert_same_trace(data_dir, there)  # padding, a ZIP's own checksums: bytes that no reader needs
        except CorruptDataError as error:
            assert str(path) in str(error) or "header" in str(error)
    path.write_bytes(whole)
    assert_same_trace(data_dir, there)


def test_a_damaged_row_here_is_an_error_that_names_the_segment(data_dir: Path, there: Path) -> None:
    trace = write_trace(data_dir, epochs=(0,), width=4000)
    data = next(trace.rglob("data.mdb"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptDataError, match="checksum"):
        upload(data_dir, there)
    assert not slices(there)


@pytest.mark.parametrize(
    "endpoint",
    ["ftp://host/x", "file://host/x", "s3://", "http://", "https://u:pw@host/", "https://host/?q=1", "a\0b"],
)
def test_an_endpoint_that_nothing_handles_is_refused(endpoint: str, data_dir: Path) -> None:
    write_trace(data_dir)
    with pytest.raises(UploadError, match="endpoint") as caught:
        upload(data_dir, endpoint)
    assert caught.value.hint and "pw" not in str(caught.value)


def test_the_data_dir_itself_is_no_endpoint(data_dir: Path) -> None:
    write_trace(data_dir)
    with pytest.raises(UploadError, match="data_dir"):
        upload(data_dir, data_dir)


def test_a_folder_that_cannot_be_written_is_an_upload_error(data_dir: Path, tmp_path: Path) -> None:
    write_trace(data_dir)
    (tmp_path / "file").write_text("")
    with pytest.raises(UploadError, match="file"):
        upload(data_dir, tmp_path / "file" / "below")


def test_an_unknown_trace_creates_nothing(data_dir: Path, there: Path) -> None:
    with pytest.raises(NotFoundError):
        upload(data_dir, there)
    assert not data_dir.exists() and not there.exists()


def test_a_tracer_records_on_in_a_folder_that_was_collected_and_drops_what_lies_there(
    data_dir: Path, there: Path
) -> None:
    import torch

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def record(where: Path, *names: str) -> ClassificationTracer:
        tracer = ClassificationTracer(model, "net", "v1", config=TracerConfig(data_dir=where))
        tracer(torch.zeros(len(names), 2), torch.zeros(len(names)), list(names), n_epoch=3)
        tracer.flush()
        return tracer

    record(data_dir, "a", "b").close()
    upload(data_dir, there)
    tracer = record(there, "c")
    trace = open_trace("net", "v1", there)
    assert trace.attempts == [0, 1]
    assert trace.arrays("extracted_feature")["input_id"].tolist() == ["a", "b", "c"]
    assert tracer.drop_epoch_data(3) == {"extracted_feature": 3, "ground_truth": 3}
    assert trace.epochs == []
    tracer.close()


def test_runs_of_keys_give_the_keys_back() -> None:
    from ml_debugger.uploading.ledger import Entry, runs_of

    for keys in ([], [3], [0, 1, 2, 3], [0, 2, 4, 9, 10, 11, 50], list(range(1, 9000, 3))):
        assert Entry(0, 0, 0, "", 0, runs_of(keys)).keys.tolist() == keys
    assert len(runs_of(range(0, 100_000, 2))) == 1


def test_calls_that_are_committed_late_are_found(data_dir: Path) -> None:
    """Calls of two threads are numbered when they begin and committed when they end."""
    from ml_debugger.uploading.backlog import Backlog
    from ml_debugger.uploading.ledger import Entry, runs_of

    backlog = Backlog(0, layout.rank_directory(write_trace(data_dir, epochs=(0,), calls=4, sealed=False), 0))
    found = [key for draft in backlog.drafts(None, tail_age_s=0.0) for key in draft.keys]
    assert found == [0, 1, 2, 3, 4]
    backlog.cover(Entry(0, 0, 0, "", 0, runs_of([0, 1, 3, 4])))
    shutil.rmtree(data_dir)
    assert [draft.keys for draft in backlog.drafts(None, tail_age_s=0.0)] == []
    write_trace(data_dir, epochs=(0,), calls=6, sealed=False)
    again = []
    for draft in backlog.drafts(None, tail_age_s=0.0):
        again += draft.keys
        backlog.cover(Entry(0, 0, 0, "", 0, runs_of(draft.keys)))
    assert sorted(again) == [2, 5, 6]


def test_rows_without_labels_are_dropped_from_a_directory_that_an_upload_has_filled(tmp_path: Path) -> None:
    """Whether there is ground truth at all is asked of what came by upload too, which is no LMDB file."""
    import torch

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 3))
    for data_dir, endpoint in ((tmp_path / "local", str(tmp_path / "there")), (tmp_path / "there", None)):
        config = TracerConfig(data_dir=data_dir, durability="process", ring_bytes=1 << 20)
        with ClassificationTracer(
            model, "net", "v1", {"stem": "0"}, api_endpoint=endpoint, config=config
        ) as tracer:
            tracer(torch.ones(2, 4), None, ["a", "b"], "train", 0)
            tracer(torch.ones(2, 4), None, ["c", "d"], "train", 1)
            if endpoint is not None:
                tracer.upload()
                continue
            assert tracer.drop_epoch_data(0) == {"extracted_feature": 4}
            tracer(torch.ones(1, 4), [1], ["e"], "train", 1)
            assert tracer.drop_epoch_data(7) == {"extracted_feature": 0, "ground_truth": 0}


@pytest.mark.parametrize("text", [" ", "\t\n"])
def test_an_endpoint_of_blanks_is_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "data")
    with pytest.raises(UploadError, match="no endpoint"):
        upload(tmp_path / "data", text)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "text",
    ["https:/host/", "http:host", "tus+https:/host/files/", "S3:bucket/x", "file:/x", "https:/u:pw9@h/"],
)
def test_a_url_with_a_slip_of_the_pen_is_no_folder(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "data")
    with pytest.raises(UploadError, match="'://' is missing") as caught:
        upload(tmp_path / "data", text)
    assert "pw9" not in str(caught.value) and "./" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert upload(tmp_path / "data", f"./{text}").segments_sent == 3


def test_a_folder_may_be_named_by_a_path_object(data_dir: Path, there: Path) -> None:
    write_trace(data_dir)
    assert upload_trace("net", "v1", data_dir=data_dir, endpoint=there).segments_sent == 3
    assert_same_trace(data_dir, there)
    assert UploadClient(there, None).require_endpoint() == str(there)
    with pytest.raises(InvalidTypeError, match="bytes"):
        UploadClient(b"/there", None)
