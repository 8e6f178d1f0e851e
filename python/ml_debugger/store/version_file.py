"""`version.json`: the true names of a trace, and what its tables consist of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_debugger.errors import CorruptDataError, NotFoundError
from ml_debugger.store.files import (
    FORMAT_VERSION,
    check_format_version,
    create_json,
    make_directory,
    read_json,
    write_json,
)
from ml_debugger.store.paths import VERSION_FILE


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


def read_version(trace_dir: Path) -> VersionInfo:
    """Read `version.json`.

    Raises:
        NotFoundError: No trace there.
        CorruptDataError: Not readable as one, or of a newer format.
    """
    path = trace_dir / VERSION_FILE
    document = read_version_document(trace_dir)
    if document is None:
        raise NotFoundError(f"no trace at {trace_dir}", "check data_dir, model name and version name")
    return parse_version(document, path)


def read_version_document(trace_dir: Path) -> dict[str, Any] | None:
    """The content of `version.json` as it stands; None where there is none.

    Raises:
        CorruptDataError: It is no JSON object.
    """
    return read_json(trace_dir / VERSION_FILE)


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
    path = trace_dir / VERSION_FILE
    document = version_document(info)
    if replace:
        write_json(path, document)
        return info
    if not create_json(path, document):
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


def version_tag(info: VersionInfo) -> str:
    """Short name of what a version consists of; tells the slices of a version that was recreated apart."""
    return hashlib.sha256(json.dumps(version_document(info), sort_keys=True).encode("ascii")).hexdigest()[:12]
