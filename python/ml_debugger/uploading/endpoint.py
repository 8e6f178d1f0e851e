"""Endpoints: what an address means, and where a key may go."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from ml_debugger.errors import UploadError

__all__ = ["Endpoint", "anchored", "parse_endpoint", "shown_endpoint"]

Kind = Literal["folder", "collector", "tus", "objects"]

_OBJECT_SCHEMES = ("s3", "gs", "az")
_BROKEN_URL = re.compile(r"(?:(?:tus\+)?https?|file|s3|gs|az):", re.IGNORECASE)
_KNOWN = "a folder, file://, http://, https://, tus+https://, tus+http://, s3://, gs:// or az://"


@dataclass(frozen=True)
class Endpoint:
    """Where uploads go.

    Attributes:
        kind: Which transport it takes.
        address: The folder, or the URL without ``tus+``, ending in ``/`` if it is one of HTTP; holds no
            secret.
    """

    kind: Kind
    address: str

    @property
    def identity(self) -> str:
        """Name of the ledger: 12 hex digits."""
        return hashlib.sha256(f"{self.kind} {self.address}".encode("utf-8", "surrogatepass")).hexdigest()[:12]


def parse_endpoint(text: str | None, *, has_key: bool) -> Endpoint:
    """Judge an endpoint before anything is sent to it.

    Args:
        text: As given by the user.
        has_key: Whether a key would travel.

    Raises:
        UploadError: There is none, nothing handles it, it holds credentials, or the key would travel in
            clear.
    """
    if not text or text.isspace():
        raise UploadError(
            "there is no endpoint to upload to", "set MLD_API_ENDPOINT, or name it: api_endpoint, --endpoint"
        )
    if "\0" in text:
        raise UploadError("the endpoint holds a NUL character", f"name {_KNOWN}")
    if "://" not in text:
        if found := _BROKEN_URL.match(text):  # a folder of that name would swallow what is for a server
            raise UploadError(
                f"the endpoint begins with {found[0]!r}, and '://' is missing",
                "write https://host/, s3://bucket/path or file:///path; a folder of that name as ./...",
            )
        return Endpoint("folder", anchored(text))
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError as error:
        raise UploadError(f"the endpoint {shown_endpoint(text)!r} is not a URL", f"name {_KNOWN}") from error
    if url.scheme == "file":
        return _folder(url, text)
    if url.scheme in _OBJECT_SCHEMES:
        if "@" in url.netloc or url.query or url.fragment or not url.netloc:
            raise UploadError(
                f"the endpoint {shown_endpoint(text)!r} must be a bucket and a path",
                "credentials come from the environment, as the cloud's own tools read them",
            )
        return Endpoint("objects", text.rstrip("/"))
    if url.scheme in ("http", "https", "tus+http", "tus+https"):
        return _web(url, text, has_key)
    raise UploadError(f"no uploader handles the endpoint {shown_endpoint(text)!r}", f"name {_KNOWN}")


def anchored(text: str) -> str:
    """``text`` with the folder that it names made absolute; whatever else it is, as it is."""
    is_folder = "://" not in text and not _BROKEN_URL.match(text)
    return os.path.abspath(os.path.expanduser(text)) if is_folder else text


def shown_endpoint(text: str) -> str:
    """An endpoint as messages may show it: without user, password, query and fragment."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return text
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path.partition('?')[0].partition('#')[0]}"


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _folder(url: SplitResult, text: str) -> Endpoint:
    if url.netloc not in ("", "localhost") or not url.path:
        raise UploadError(
            f"the endpoint {shown_endpoint(text)!r} names another machine", "write file:///absolute/path"
        )
    # urlsplit takes '?' and '#' off, which are characters like any other in a path.
    return Endpoint("folder", os.path.abspath(unquote(text[len("file://") + len(url.netloc) :])))


def _web(url: SplitResult, text: str, has_key: bool) -> Endpoint:
    shown = shown_endpoint(text)
    if "@" in url.netloc:
        raise UploadError(
            f"the endpoint {shown!r} holds a user or a password", "give the key as MLD_API_KEY or api_key"
        )
    if url.query or url.fragment or not url.hostname or any(c.isspace() or ord(c) < 32 for c in text):
        raise UploadError(
            f"the endpoint {shown!r} must be scheme, host and path", "write https://host[:port]/path/"
        )
    is_tus = url.scheme.startswith("tus+")
    scheme = url.scheme.removeprefix("tus+")
    if scheme == "http" and not is_loopback(url.hostname) and (has_key or is_tus):
        raise UploadError(
            f"the endpoint {shown!r} is not encrypted, and a key travels over plain http to loopback only",
            "use https://",
        )
    address = f"{scheme}://{url.netloc}{url.path.rstrip('/')}/"
    return Endpoint("tus" if is_tus else "collector", address)


def folder_of(endpoint: Endpoint) -> Path:
    """The directory of a folder endpoint."""
    return Path(endpoint.address)
