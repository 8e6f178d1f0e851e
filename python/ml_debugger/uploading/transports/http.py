"""HTTP requests as uploads need them: no redirects, one origin, a key that shows nowhere, bounded answers."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from ml_debugger.errors import AuthenticationError, UploadError
from ml_debugger.uploading.endpoint import shown_endpoint
from ml_debugger.uploading.retry import RetryPolicy, TransientError, retry_after_s
from ml_debugger.uploading.transports.patience import AnswerWatch

_CONNECT_TIMEOUT_S = 15.0
_IDLE_TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 64 << 20
_MAX_SHOWN_CHARACTERS = 200
_TRANSIENT = (408, 409, 423, 425, 429, 460)


@dataclass(frozen=True)
class Answer:
    """A whole answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class HttpClient:
    """Talks to one origin.

    Args:
        base: URL of the endpoint, ending in ``/``.
        key: Shown to that origin, as ``Authorization: Bearer``; to no other.
        policy: Bounds every wait for the network.

    Raises:
        UploadError: The key cannot stand in a header.
    """

    def __init__(self, base: str, key: str | None, policy: RetryPolicy) -> None:
        self.base = base
        self._key = key
        self._origin = _origin(base)
        headers = {"User-Agent": "ml-debugger"}
        if key is not None:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise UploadError(
                    "the key holds characters that no HTTP header can carry",
                    "check MLD_API_KEY or api_key for blanks and line breaks",
                )
            headers["Authorization"] = f"Bearer {key}"
        self._stall_timeout_s = policy.stall_timeout_s
        self._watch = AnswerWatch(policy.stall_timeout_s)
        idle = min(_IDLE_TIMEOUT_S, policy.stall_timeout_s)
        self._client = httpx.Client(
            headers=headers,
            verify=_trust() if base.startswith("https:") else False,
            follow_redirects=False,
            # A proxy of the environment would see a request over plain http, its key included.
            trust_env=base.startswith("https:"),
            timeout=httpx.Timeout(idle, connect=min(_CONNECT_TIMEOUT_S, idle)),
        )

    def __repr__(self) -> str:
        return f"HttpClient({shown_endpoint(self.base)!r})"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
        accept: tuple[int, ...] = (200, 201, 204),
        max_bytes: int | None = MAX_ANSWER_BYTES,
    ) -> Answer:
        """Send one request, once.

        Args:
            method: Of the request.
            url: Absolute, or relative to the base; of the endpoint's own origin.
            headers: Besides the usual ones.
            content: The body.
            accept: Statuses that are an answer; every other one is an error.
            max_bytes: Longest answer that is believed, and then it has to be here within ``stall_timeout_s``;
                None: any, as long as more of it comes.

        Raises:
            TransientError: It may work another time.
            AuthenticationError: 401 or 403.
            UploadError: It will not work.
        """
        target = self.resolve(url)
        self._watch.has_cut = False
        try:
            answer = self._exchange(method, target, headers, content, max_bytes)
        except httpx.HTTPError as error:
            if not self._watch.has_cut:
                raise self._network_error(error, target) from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UploadError(f"{self._shown(target)} is not a URL: {error}", "check the endpoint") from None
        finally:
            self._watch.end()
        if self._watch.has_cut:
            raise TransientError(
                f"{self._shown(target)} did not end its answer within {self._stall_timeout_s:g} s",
                "check the endpoint",
            )
        if answer.status in accept:
            return answer
        raise self._status_error(answer, method, target)

    def _exchange(
        self,
        method: str,
        target: str,
        headers: dict[str, str] | None,
        content: bytes | Iterable[bytes] | None,
        max_bytes: int | None,
    ) -> Answer:
        told = {"trace": self._watch.on_event}
        with self._client.stream(
            method, target, headers=headers, content=content, extensions=told
        ) as response:
            body = bytearray()
            for part in response.iter_raw():
                body += part
                if max_bytes is None:
                    self._watch.begin()
                elif len(body) > max_bytes:
                    raise UploadError(f"the answer of {self._shown(target)} has no end", "check the endpoint")
            return Answer(response.status_code, dict(response.headers), bytes(body))

    def resolve(self, url: str) -> str:
        """An absolute URL of the endpoint's origin.

        Raises:
            UploadError: It is of another one.
        """
        try:
            target = urljoin(self.base, url)
        except ValueError as error:
            raise UploadError(f"{self._shown(url)!r} is not a URL", "check the endpoint") from error
        if _origin(target) != self._origin:
            raise UploadError(
                f"{self._shown(self.base)} points to another origin, {self._shown(target)}",
                "name that one as the endpoint if it is meant; a key is never taken there by itself",
            )
        return target

    def _shown(self, url: str) -> str:
        return self._clean(shown_endpoint(url))

    def _clean(self, text: str) -> str:
        if self._key:
            text = text.replace(self._key, "<hidden key>")
        return "".join(c if c.isprintable() else " " for c in text)[:_MAX_SHOWN_CHARACTERS]

    def _network_error(self, error: httpx.HTTPError, url: str) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return UploadError(
                    f"the certificate of {self._shown(url)} is not accepted: "
                    f"{self._clean(cause.verify_message)}",
                    "correct the server's certificate, or name its authority in SSL_CERT_FILE",
                )
            cause = cause.__cause__ or cause.__context__
        what = self._clean(str(error)) or type(error).__name__
        if isinstance(error, httpx.UnsupportedProtocol):
            return UploadError(f"cannot talk to {self._shown(url)}: {what}", "check the endpoint")
        return TransientError(
            f"cannot talk to {self._shown(url)}: {what}", "check that the endpoint runs and can be reached"
        )

    def _status_error(self, answer: Answer, method: str, url: str) -> Exception:
        status = answer.status
        said = self._clean(_text_of(answer))
        message = f"{self._shown(url)} answered {status} to {method}" + (f": {said}" if said else "")
        if status in (401, 403):
            return AuthenticationError(
                message,
                "check the key in MLD_API_KEY or api_key" if self._key else "set MLD_API_KEY or pass api_key",
            )
        if 300 <= status < 400:
            return UploadError(
                f"{message} (a redirect, which is not followed)",
                "name the address where it leads as the endpoint",
            )
        if status in _TRANSIENT or status >= 500:
            wait = retry_after_s(answer.headers.get("retry-after"), answer.headers.get("date"))
            hint = "free space at the endpoint" if status == 507 else ""
            return TransientError(message, hint, wait)
        hints = {
            404: "check the path of the endpoint",
            413: "raise the quota or the size limit of the endpoint",
        }
        return UploadError(message, hints.get(status, "check the endpoint"))


def _origin(url: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UploadError(f"{shown_endpoint(url)!r} is not a URL", "check the endpoint") from error
    if port is None:
        port = {"http": 80, "https": 443}.get(parts.scheme, 0)
    return parts.scheme, (parts.hostname or "").lower(), port


def _trust() -> ssl.SSLContext:
    """Authorities of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``; else the system's and Mozilla's (certifi)."""
    context = ssl.create_default_context()
    if not (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _text_of(answer: Answer) -> str:
    text = answer.body[:4096].decode("utf-8", "replace").strip()
    if answer.headers.get("content-type", "").startswith("application/json"):
        try:
            document: Any = json.loads(text)
            text = str(document.get("detail", text)) if isinstance(document, dict) else text
        except (ValueError, RecursionError):
            pass
    return "" if text.startswith("<") else text
