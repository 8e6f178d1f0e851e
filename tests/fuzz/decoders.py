"""What reads bytes from elsewhere: for each decoder sound bytes to begin with, and what to do with mutants.

A decoder may refuse with an error of the package or take the bytes; everything else is a finding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from format_writer import Column, FormatWriter, crc32c
from ml_debugger import load_export, open_trace
from ml_debugger.errors import MlDebuggerError
from ml_debugger.exporting import export_trace
from ml_debugger.store import layout, status
from ml_debugger.trace.header import HeaderDecoder
from ml_debugger.trace.recover import recover_trace
from ml_debugger.trace.slice_file import SliceFile
from ml_debugger.trace.verify import verify_trace
from ml_debugger.uploading.upload import upload_trace

MODEL, VERSION = "model", "v1"
TABLES = ("extracted_feature", "ground_truth")


@dataclass(frozen=True)
class Decoder:
    """One target: ``run`` takes a mutant of one of the ``seeds``."""

    seeds: list[bytes]
    run: Callable[[bytes], object]


def _writer(folder: Path) -> FormatWriter:
    writer = FormatWriter(folder)
    for call in range(3):
        columns = {
            "features": Column(np.full((2, 300), call, "<f4")),
            "ragged": Column([np.ones(2, "<f4"), np.ones((3, 1), "<f4")]),
            "camera": Column(["left", "right"], "str"),
        }
        labels = {"label": Column(np.array([1, 2], "<i8"))}
        writer.call(call % 2, [f"a{call}", f"b{call}"], columns, labels, inline=["camera"])
    return writer


def _resealed(value: bytes) -> bytes:
    """With a right checksum: else nothing behind it is ever reached."""
    body = value[:-5]
    return body + b"\xce" + crc32c(body).to_bytes(4, "big")


def _read(data_dir: Path) -> None:
    trace = open_trace(MODEL, VERSION, data_dir=data_dir)
    for table in TABLES:
        trace.arrays(table)
        trace.num_rows(table, dedupe=True)


def decoders(folder: Path) -> dict[str, Decoder]:
    """All targets; they work in ``folder``, which exists and is empty."""
    writer = _writer(folder / "sound")
    headers = [value for epoch in (0, 1) for _, value in writer.segment(epoch).calls]
    trace_dir = writer.write()
    export = export_trace(trace_dir, folder / "sound.zip")
    upload_trace(MODEL, VERSION, data_dir=folder / "sound", endpoint=str(folder / "collected"))
    slices = sorted((folder / "collected").rglob("a*.zip"))
    work = folder / "work"
    small = [*sorted(trace_dir.rglob("*.json")), *sorted((folder / "collected").rglob("*.json"))]
    decoder = HeaderDecoder(0, 0, 0, 0)

    def header(data: bytes) -> None:
        decoder.decode(0, _resealed(data))

    def small_file(data: bytes) -> None:
        for name in ("version.json", "attempts.json", "segment.json", "sealed.json"):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder / "sound", work)
            for path in work.rglob(name):
                path.write_bytes(data)
            _tolerate(lambda: _read(work))
            verify_trace(layout.trace_directory(work, MODEL, VERSION))
        status._decode(data)
        layout.parse_slice_name(data.decode("utf-8", "replace"))

    def archive(data: bytes) -> None:
        path = folder / "mutant.zip"
        path.write_bytes(data)
        trace = load_export(path)
        for table in TABLES:
            trace.arrays(table)
            trace.num_rows(table, dedupe=True)

    def member(data: bytes) -> None:
        """One member of an export, with a manifest that agrees."""
        with zipfile.ZipFile(export) as sound:
            members = {name: sound.read(name) for name in sound.namelist()}
        name = sorted(members)[hashlib.sha256(data).digest()[0] % len(members)]
        members[name] = data
        manifest = json.loads(members["manifest.json"]) if name != "manifest.json" else None
        if manifest is not None:
            manifest["members"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            members["manifest.json"] = json.dumps(manifest).encode()
        path = folder / "member.zip"
        with zipfile.ZipFile(path, "w") as mutant:
            for key, value in members.items():
                mutant.writestr(key, value)
        archive(path.read_bytes())

    def slice_file(data: bytes) -> None:
        path = slices[0].with_name(f"{slices[0].name}.mutant")
        path.write_bytes(data)
        found = SliceFile(path)
        try:
            found.meta()
            for key, value in found.headers():
                decoder.decode(key, value)
            _tolerate(lambda: found.read([(0, 0, 8, 0)], bytearray(8)))
        finally:
            found.close()

    def pages(data: bytes) -> None:
        """A whole data.mdb: never opened with LMDB unless its structure is sound."""
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(folder / "recovered", ignore_errors=True)
        shutil.copytree(folder / "sound", work)
        next(work.rglob("data.mdb")).write_bytes(data)
        verify_trace(layout.trace_directory(work, MODEL, VERSION))
        recover_trace(work, MODEL, VERSION, folder / "recovered")

    with zipfile.ZipFile(export) as sound:
        members = [sound.read(name) for name in sound.namelist()]
    return {
        "header": Decoder(headers[:1], header),
        "small file": Decoder([path.read_bytes() for path in small], small_file),
        "export": Decoder([export.read_bytes()], archive),
        "member of an export": Decoder(members, member),
        "slice": Decoder([path.read_bytes() for path in slices], slice_file),
        "pages": Decoder([next(trace_dir.rglob("data.mdb")).read_bytes()], pages),
    }


def _tolerate(work: Callable[[], object]) -> None:
    try:
        work()
    except MlDebuggerError:
        return
