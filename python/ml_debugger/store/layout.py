"""Paths and small JSON files of a trace, as `docs/record_format.md` describes them.

Only names and listings live here: rows are written and read by `_core`. Nothing here opens an LMDB
environment, and nothing that lists ever creates a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ml_debugger.errors import (
    CorruptDataError,
    InvalidInputError,
    InvalidTypeError,
    NotFoundError,
    StorageError,
)
from ml_debugger.job import Job

FORMAT_VERSION = 1
DEFAULT_DATA_DIR = "mld_data"
NO_EPOCH = -1
MAX_RANKS = 1 << 14
MAX_ATTEMPTS = 1 << 13

LOCK_FILE = "writer.lock"
DATA_FILE = "data.mdb"
SEALED_FILE = "sealed.json"
SEGMENT_FILE = "segment.json"

_STAGING_FILE = "staging.json"
_VERSION_FILE = "version.json"
_ATTEMPTS_FILE = "attempts.json"
_SLUG_CHARACTERS = 40
_SLUG_HASH_DIGITS = 12

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_RANK = re.compile(r"rank-(\d{5,})\Z")
_EPOCH = re.compile(r"epoch-(\d+|none)\Z")
_SEGMENT = re.compile(r"a(\d{5,})-s(\d{5,})\Z")
_SLICE = re.compile(r"a(\d{5,})-c(\d{10,})-r(\d+)-g(\d+)-([0-9a-f]{12})-([0-9a-f]{64})\.zip\Z")
# Slices stand beside segments in a partition; their numbers must not meet.
_FIRST_SLICE_SEQUENCE = 1 << 32


class Partition(NamedTuple):
    """One epoch of one rank; ``epoch`` is -1 for the rows without one."""

    epoch: int
    path: Path


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


@dataclass(frozen=True)
class VersionInfo:
    """What `version.json` holds: the true names, and what the tables consist of.

    Attributes:
        model_name: Name of the model, as given.
        version_name: Name of the version, as given.
        fingerprint: Hex digest of the architecture.
        aliases: Module path by alias, in column order; the path of a head that is searched for is ``None``.
        additional_fields: Specifications of the extra columns of ``extracted_feature``.
        additional_label_fields: Specifications of the extra columns of ``ground_truth``.
    """

    model_name: str
    version_name: str
    fingerprint: str
    aliases: dict[str, str | None]
    additional_fields: list[dict[str, Any]]
    additional_label_fields: list[dict[str, Any]]


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Directory of all traces: the argument, ``MLD_DATA_DIR``, or ``./mld_data``; absolute, not created."""
    if data_dir is None:
        data_dir = os.environ.get("MLD_DATA_DIR") or DEFAULT_DATA_DIR
    elif not isinstance(data_dir, (str, os.PathLike)):
        raise InvalidTypeError(
            f"data_dir must be a path, got {type(data_dir).__name__}", "pass a str or a pathlib.Path"
        )
    text = os.fspath(data_dir)
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidInputError(f"data_dir must be a non-empty path, got {text!r}", "name a directory")
    return Path(os.path.abspath(os.path.expanduser(text)))


def check_name(name: object, parameter: str) -> str:
    """Return ``name`` if it can name a model or a version: any non-empty text.

    Raises:
        InvalidTypeError: Not a str.
        InvalidInputError: Empty.
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"{parameter} must be a str, got {type(name).__name__}", "pass non-empty text")
    if not name:
        raise InvalidInputError(f"{parameter} must not be empty", "pass non-empty text")
    return str(name)


def slug(name: str) -> str:
    """Directory name for a model or a version: readable, safe, and different for different names."""
    readable = _UNSAFE.sub("_", name)
    stripped = readable.lstrip(".")
    readable = "_" * (len(readable) - len(stripped)) + stripped
    # surrogatepass: "any non-empty text" includes text that UTF-8 proper cannot encode.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{readable[:_SLUG_CHARACTERS]}-{digest[:_SLUG_HASH_DIGITS]}"


def trace_directory(data_dir: Path, model_name: str, version_name: str) -> Path:
    """Directory of one (model, version); not created."""
    return data_dir / slug(model_name) / slug(version_name)


def rank_directory(trace_dir: Path, rank: int) -> Path:
    """Directory of one rank; not created."""
    return trace_dir / f"rank-{rank:05d}"


def partition_directory(rank_dir: Path, epoch: int) -> Path:
    """Directory of one epoch (-1: rows without one); not created."""
    return rank_dir / ("epoch-none" if epoch == NO_EPOCH else f"epoch-{epoch}")


def rank_directories(trace_dir: Path) -> list[tuple[int, Path]]:
    """(rank, directory) of every rank that has recorded here, by rank."""
    return sorted((int(match[1]), path) for match, path in _matching(trace_dir, _RANK))


def partitions(rank_dir: Path) -> list[Partition]:
    """The epochs of a rank in rising order, -1 (rows without one) first; dropped ones are not listed."""
    found = _matching(rank_dir, _EPOCH)
    return sorted(Partition(NO_EPOCH if match[1] == "none" else int(match[1]), path) for match, path in found)


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


def is_torn(description: dict[str, Any]) -> bool:
    """Whether an unsealed segment, by its `segment.json`, was open in a power cut without each sync."""
    return description.get("durability") != "power" and description.get("boot_id") != boot_id()


def segment_directories(partition_dir: Path) -> list[tuple[int, int, Path]]:
    """(Attempt, sequence, directory) of what is named like a segment, in order, whatever it holds.

    Those that are still staged are listed too, under the directory where they lie.
    """
    staged = [place / partition_dir.name for place in staging_directories(partition_dir.parent)]
    found = {}
    # The home comes last: what is moved between two of these listings is in both, and is read there.
    for directory in (*staged, partition_dir):
        for match, path in _matching(directory, _SEGMENT):
            found[int(match[1]), int(match[2])] = path
    return sorted((attempt, sequence, path) for (attempt, sequence), path in found.items())


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


def slice_files(partition_dir: Path) -> list[tuple[SliceName, Path]]:
    """What is named like a slice, of whatever version, in order."""
    names = ((parse_slice_name(path.name), path) for _, path in _matching(partition_dir, _SLICE))
    return sorted((name, path) for name, path in names if name is not None)


def _slices(partition_dir: Path) -> list[SegmentEntry]:
    """Slices of a partition that an upload has brought, of the version that `version.json` describes now."""
    found = slice_files(partition_dir)
    if not found:
        return []
    tag = version_tag(read_version(partition_dir.parent.parent))
    return [
        SegmentEntry(name.attempt, _FIRST_SLICE_SEQUENCE + number, path, sealed=True, usable=True)
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


def version_tag(info: VersionInfo) -> str:
    """Short name of what a version consists of; tells the slices of a version that was recreated apart."""
    return hashlib.sha256(json.dumps(version_document(info), sort_keys=True).encode("ascii")).hexdigest()[:12]


def trace_directories(data_dir: Path) -> list[Path]:
    """Directory of every trace under ``data_dir``, sorted by path."""
    return sorted(path.parent for path in data_dir.glob(f"*/*/{_VERSION_FILE}"))


@functools.cache
def boot_id() -> str:
    """Identity of this boot of the machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def read_version(trace_dir: Path) -> VersionInfo:
    """Read `version.json`.

    Raises:
        NotFoundError: No trace there.
        CorruptDataError: Not readable as one, or of a newer format.
    """
    path = trace_dir / _VERSION_FILE
    document = read_version_document(trace_dir)
    if document is None:
        raise NotFoundError(f"no trace at {trace_dir}", "check data_dir, model name and version name")
    return parse_version(document, path)


def read_version_document(trace_dir: Path) -> dict[str, Any] | None:
    """The content of `version.json` as it stands; None where there is none.

    Raises:
        CorruptDataError: It is no JSON object.
    """
    return read_json(trace_dir / _VERSION_FILE)


def parse_version(document: Any, path: Path) -> VersionInfo:
    """Decode the content of a `version.json`; ``path`` is for messages.

    Raises:
        CorruptDataError: It is none, or of a newer format.
    """
    if not isinstance(document, dict):
        raise CorruptDataError(f"{path} holds no JSON object", "restore the file from a copy")
    check_format_version(document, path)
    try:
        return VersionInfo(
            model_name=document["model_name"],
            version_name=document["version_name"],
            fingerprint=document["fingerprint"],
            aliases=dict(document["aliases"]),
            additional_fields=list(document["additional_fields"]),
            additional_label_fields=list(document["additional_label_fields"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"{path} lacks or garbles {error}", "restore the file from a copy") from error


def write_version(trace_dir: Path, info: VersionInfo, *, replace: bool = False) -> VersionInfo:
    """Record what a trace consists of; returns what stands there afterwards.

    Ranks of one job come at the same moment: without ``replace`` the first one writes, the others get its
    content.
    """
    make_directory(trace_dir)
    path = trace_dir / _VERSION_FILE
    document = version_document(info)
    if replace:
        write_json(path, document)
        return info
    if not _create_json(path, document):
        return read_version(trace_dir)
    return info


def version_document(info: VersionInfo) -> dict[str, Any]:
    """The content of `version.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "model_name": info.model_name,
        "version_name": info.version_name,
        "fingerprint": info.fingerprint,
        "aliases": info.aliases,
        "additional_fields": info.additional_fields,
        "additional_label_fields": info.additional_label_fields,
    }


def attempts(rank_dir: Path) -> list[int]:
    """Numbers of the attempts of a rank, rising."""
    return [int(entry["attempt"]) for entry in attempt_entries(rank_dir)]


def register_attempt(rank_dir: Path, job: Job | None = None) -> int:
    """Give out the next attempt number of a rank and record it durably.

    The ranks of one job get one number for their first attempts, one for their second ones, and so on: by
    it readers tell which rows are newer, whichever rank recorded them.

    REQUIRES: the caller holds the rank's writer lock.

    Args:
        rank_dir: Directory of the rank.
        job: The job of this process; without one (or without its id) the rank counts by itself.

    Raises:
        StorageError: The numbers are used up, or the directory cannot be written.
    """
    entries = attempt_entries(rank_dir)
    found = [int(entry["attempt"]) for entry in entries]
    # Segments count too: a lost attempts.json must not hand a number out twice, row ids would repeat.
    for partition in partitions(rank_dir):
        found += [number for number, _, _ in segment_directories(partition.path)]
        found += [name.attempt for name, _ in slice_files(partition.path)]
    attempt = max(found, default=-1) + 1
    if job is not None and job.job_id is not None:
        attempt = _attempt_of_job(rank_dir, job.job_id, entries, attempt)
    if attempt >= MAX_ATTEMPTS:
        raise StorageError(
            f"{rank_dir} has had {MAX_ATTEMPTS} attempts, the most that fit a row_id",
            "use another version_name",
        )
    entry = {"attempt": attempt, "started_unix_s": round(time.time(), 3), "pid": os.getpid()}
    entries.append(entry if job is None else {**entry, **job.entry()})
    write_attempts(rank_dir, entries)
    return attempt


def _attempt_of_job(rank_dir: Path, job_id: str, own: list[dict[str, Any]], lowest: int) -> int:
    """The number that the other ranks of a job gave to the same attempt, else one above all there are."""
    others = [
        entry
        for _, directory in rank_directories(rank_dir.parent)
        if directory != rank_dir
        for entry in attempt_entries(directory)
    ]
    before = len([entry for entry in own if entry.get("job") == job_id])
    shared: list[int] = sorted({int(entry["attempt"]) for entry in others if entry.get("job") == job_id})
    if before < len(shared) and shared[before] >= lowest:
        return shared[before]
    highest = max((int(entry["attempt"]) for entry in others), default=-1)
    return max(lowest, highest + 1)


def write_attempts(rank_dir: Path, entries: list[dict[str, Any]]) -> None:
    """Replace `attempts.json`, atomic and durable."""
    write_json(rank_dir / _ATTEMPTS_FILE, {"format_version": FORMAT_VERSION, "attempts": entries})


def check_format_version(document: dict[str, Any], path: Path) -> None:
    """Refuse a file of a newer format than this package knows."""
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise CorruptDataError(
            f"{path} has format version {version!r}, expected at most {FORMAT_VERSION}", "upgrade ml-debugger"
        )


def make_directory(path: Path) -> None:
    """Create ``path`` and its missing parents with mode 0700 and make the new names durable."""
    missing = []
    current = path
    while not current.exists():
        missing.append(current)
        current = current.parent
    with storage_errors(f"create the directory {path}"):
        for directory in reversed(missing):
            directory.mkdir(mode=0o700, exist_ok=True)
            sync_directory(directory.parent)
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is not a directory")


def write_json(path: Path, document: dict[str, Any], *, durable: bool = True) -> None:
    """Replace ``path`` (mode 0600), atomic and durable: temporary file, fsync, rename, directory fsync.

    Args:
        path: The file.
        document: Its content.
        durable: False: no fsync, for what may be lost, or found empty, after a power cut.
    """
    with storage_errors(f"write {path}"), _temporary_json(path, document, durable=durable) as temporary:
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)


def _create_json(path: Path, document: dict[str, Any]) -> bool:
    """Write ``path`` atomically if nothing is there; False if something is."""
    with storage_errors(f"write {path}"), _temporary_json(path, document) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a filesystem without hard links
            if path.exists():
                return False
            os.replace(temporary, path)
        sync_directory(path.parent)
        return True


@contextlib.contextmanager
def _temporary_json(path: Path, document: dict[str, Any], *, durable: bool = True) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            json.dump(document, file, indent=1)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def storage_errors(
    action: str, remedy: str = "check that data_dir is writable and has space"
) -> Iterator[None]:
    """Errors of the system inside of it become `StorageError`: "cannot ``action``", and the remedy."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot {action}: {error.strerror or error}", remedy) from error


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _matching(directory: Path, pattern: re.Pattern[str]) -> list[tuple[re.Match[str], Path]]:
    try:
        with os.scandir(directory) as entries:
            found = [(pattern.match(entry.name), Path(entry.path)) for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"cannot list {directory}: {error.strerror}", "check its permissions") from error
    return [(match, path) for match, path in found if match is not None]


def attempt_entries(rank_dir: Path) -> list[dict[str, Any]]:
    """The entries of `attempts.json`; empty where there is none.

    Raises:
        CorruptDataError: Not readable as one.
    """
    path = rank_dir / _ATTEMPTS_FILE
    document = read_json(path)
    if document is None:
        return []
    check_format_version(document, path)
    entries = document.get("attempts")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "attempt" in entry for entry in entries
    ):
        raise CorruptDataError(f"{path} holds no list of attempts", "restore the file from a copy")
    return entries


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no file.

    Raises:
        CorruptDataError: It holds something else.
    """
    try:
        document = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:  # brackets without end
        raise CorruptDataError(f"{path} is not JSON: {error}", "restore the file from a copy") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    if not isinstance(document, dict):
        raise CorruptDataError(f"{path} holds no JSON object", "restore the file from a copy")
    return document
