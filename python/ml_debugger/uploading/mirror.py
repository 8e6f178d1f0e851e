"""Reading what lies at an endpoint: a trace there becomes files here, and is read like any other trace."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from ml_debugger.errors import CorruptDataError, NotFoundError
from ml_debugger.store import layout
from ml_debugger.uploading.endpoint import parse_endpoint, shown_endpoint
from ml_debugger.uploading.retry import RetryPolicy
from ml_debugger.uploading.transports import Transport, open_transport


def mirror_endpoint(address: str, model_name: str, version_name: str) -> Path:
    """Bring a trace of an endpoint onto this machine; returns the directory of traces that then holds it.

    What is here already is not fetched again. Files go to ``$XDG_CACHE_HOME/ml_debugger`` (``~/.cache``).
    The key is that of ``MLD_API_KEY``.

    Args:
        address: An endpoint, such as ``s3://bucket/traces`` or ``https://collector.example``.
        model_name: Name of the model.
        version_name: Name of the version.

    Raises:
        NotFoundError: It holds no such trace.
        UploadError: It cannot be reached, or keeps nothing that can be read back.
        CorruptDataError: What came is not what was sent.
    """
    key = os.environ.get("MLD_API_KEY") or None
    endpoint = parse_endpoint(address, has_key=key is not None)
    if endpoint.kind == "folder":
        return Path(endpoint.address)
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ml_debugger" / endpoint.identity
    )
    trace = f"{layout.slug(model_name)}/{layout.slug(version_name)}"
    transport = open_transport(endpoint, key, RetryPolicy())
    try:
        if not mirror_trace(transport, trace, cache):
            raise NotFoundError(
                f"no trace {model_name!r} / {version_name!r} at {shown_endpoint(address)}", "check the names"
            )
    finally:
        transport.close()
    return cache


def mirror_trace(transport: Transport, trace: str, directory: Path) -> bool:
    """Make ``directory`` hold what the endpoint has of a trace; False if it has none.

    Raises:
        UploadError: The endpoint failed.
        CorruptDataError: A slice is not what its name says.
    """
    there = transport.held(trace, {})
    if f"{trace}/version.json" not in there:
        return False
    for path in sorted(there, key=lambda path: path.endswith(".json")):
        parts = path.split("/")
        name = layout.parse_slice_name(parts[-1])
        target = directory / path
        if not path.startswith(f"{trace}/") or ".." in parts:
            continue  # an endpoint does not choose where files go on this machine
        if name is None and parts[-1] not in ("version.json", "attempts.json"):
            continue
        if name is not None and target.exists() and target.stat().st_size == there[path]:
            continue
        data = transport.read(path)
        if data is None:
            continue
        if name is not None and hashlib.sha256(data).hexdigest() != name.sha256:
            raise CorruptDataError(
                f"{path} at the endpoint has another SHA-256 than its name", "send it again"
            )
        _replace(target, data)
    for held_here in (directory / trace).rglob("*.zip"):
        if held_here.relative_to(directory).as_posix() not in there:
            held_here.unlink(missing_ok=True)
    return True


def _replace(target: Path, data: bytes) -> None:
    layout.make_directory(target.parent)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
