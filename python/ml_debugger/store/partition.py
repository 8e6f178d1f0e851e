"""What lies in a partition: segments, also those that are staged elsewhere, and slices; names and states.

Nothing here opens an LMDB environment, and nothing that lists ever creates a file.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from ml_debugger.errors import CorruptDataError
from ml_debugger.store.files import (
    FORMAT_VERSION,
    check_format_version,
    read_json,
    storage_errors,
    write_json,
)
from ml_debugger.store.paths import matching
from ml_debugger.store.version_file import read_version, version_tag

DATA_FILE = "data.mdb"
SEALED_FILE = "sealed.json"
SEGMENT_FILE = "segment.json"
# Slices stand beside segments in a partition; their numbers must not meet.
FIRST_SLICE_SEQUENCE = 1 << 32

_STAGING_FILE = "staging.json"
_SEGMENT = re.compile(r"a(\d{5,})-s(\d{5,})\Z")
_SLICE = re.compile(r"a(\d{5,})-c(\d{10,})-r(\d+)-g(\d+)-([0-9a-f]{12})-([0-9a-f]{64})\.zip\Z")


class SegmentEntry(NamedTuple):
    """One LMDB environment; ``usable`` is False when a power cut may have torn it (it must not be opened)."""

    attempt: int
    sequence: int
    path: Path
    sealed: bool
    usable: bool


class SliceName(NamedTuple):
    """What the file name of a slice says (`ml_debugger.trace.slice_file`)."""

    attempt: int
    first_call: int
    rows: int
    ground_truth_rows: int
    version_tag: str
    sha256: str

    def __str__(self) -> str:
        return (
            f"a{self.attempt:05d}-c{self.first_call:010d}-r{self.rows}-g{self.ground_truth_rows}"
            f"-{self.version_tag}-{self.sha256}.zip"
        )


def segments(partition_dir: Path) -> list[SegmentEntry]:
    """The segments of a partition by (attempt, sequence).

    A directory without `segment.json` holds no row yet and is left out. ``usable`` is False for an unsealed
    segment of durability ``process`` that carries another boot id than this machine.
    """
    entries = []
    for attempt, sequence, listed in segment_directories(partition_dir):
        path = listed
        try:
            description = read_json(path / SEGMENT_FILE)
            if description is None and path.parent != partition_dir:  # moved since it was listed
                path = partition_dir / path.name
                description = read_json(path / SEGMENT_FILE)
        except CorruptDataError:
            entries.append(SegmentEntry(attempt, sequence, path, sealed=False, usable=False))
            continue
        if description is None:
            continue
        check_format_version(description, path / SEGMENT_FILE)
        sealed = (path / SEALED_FILE).exists()
        usable = sealed or not is_torn(description)
        entries.append(SegmentEntry(attempt, sequence, path, sealed, usable))
    return sorted(entries) + _slices(partition_dir)


def segment_directories(partition_dir: Path) -> list[tuple[int, int, Path]]:
    """(Attempt, sequence, directory) of what is named like a segment, in order, whatever it holds.

    Those that are still staged are listed too, under the directory where they lie.
    """
    staged = [place / partition_dir.name for place in staging_directories(partition_dir.parent)]
    found = {}
    # The home comes last: what is moved between two of these listings is in both, and is read there.
    for directory in (*staged, partition_dir):
        for match, path in matching(directory, _SEGMENT):
            found[int(match[1]), int(match[2])] = path
    return sorted((attempt, sequence, path) for (attempt, sequence), path in found.items())


def is_torn(description: dict[str, Any]) -> bool:
    """Whether an unsealed segment, by its `segment.json`, was open in a power cut without each sync."""
    return description.get("durability") != "power" and description.get("boot_id") != boot_id()


@functools.cache
def boot_id() -> str:
    """Identity of this boot of the machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def slice_files(partition_dir: Path) -> list[tuple[SliceName, Path]]:
    """What is named like a slice, of whatever version, in order."""
    names = ((parse_slice_name(path.name), path) for _, path in matching(partition_dir, _SLICE))
    return sorted((name, path) for name, path in names if name is not None)


def _slices(partition_dir: Path) -> list[SegmentEntry]:
    """Slices of a partition that an upload has brought, of the version that `version.json` describes now."""
    found = slice_files(partition_dir)
    if not found:
        return []
    tag = version_tag(read_version(partition_dir.parent.parent))
    return [
        SegmentEntry(name.attempt, FIRST_SLICE_SEQUENCE + number, path, sealed=True, usable=True)
        for number, (name, path) in enumerate(found)
        if name.version_tag == tag
    ]


def parse_slice_name(name: str) -> SliceName | None:
    """What a file name says if it is that of a slice."""
    match = _SLICE.match(name)
    if match is None:
        return None
    attempt, first_call, rows, ground_truth_rows = map(int, match.groups()[:4])
    return SliceName(attempt, first_call, rows, ground_truth_rows, match[5], match[6])


def data_bytes(path: Path) -> int:
    """Size of the data file of a segment, or of a slice, which is one file; 0 if it is gone."""
    try:
        return os.stat(path / DATA_FILE if path.is_dir() else path).st_size
    except OSError:
        return 0


def staging_entries(rank_dir: Path) -> list[dict[str, Any]]:
    """Where segments of a rank are staged, or were and have not all been moved: ``directory``, ``host``."""
    document = read_json(rank_dir / _STAGING_FILE)
    entries = [] if document is None else document.get("directories")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("directory"), str) for entry in entries
    ):
        raise CorruptDataError(f"{rank_dir / _STAGING_FILE} holds no list of directories", "remove the file")
    return entries


def staging_directories(rank_dir: Path) -> list[Path]:
    """Those of `staging_entries` that are on this machine."""
    found = [Path(entry["directory"]) for entry in staging_entries(rank_dir)]
    return [path for path in found if path.is_dir()]


def write_staging(rank_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Replace `staging.json`; without entries it goes."""
    path = rank_dir / _STAGING_FILE
    if entries:
        write_json(path, {"format_version": FORMAT_VERSION, "directories": entries})
    else:
        with storage_errors(f"delete {path}"):
            path.unlink(missing_ok=True)
