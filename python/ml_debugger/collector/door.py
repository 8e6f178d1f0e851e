"""Who may come in: with a key in the header as programs do, or signed in as people with a browser do.

A key never stands in a URL, where logs and histories would keep it. A browser's page asks for it once; a
cookie that holds nothing of it stands for it then, and opens the pages only, not what programs use.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ml_debugger.collector.keys import KeyEntry, KeyRing
from ml_debugger.collector.page import sign_in_page
from ml_debugger.uploading.endpoint import is_loopback

COOKIE = "ml-debugger-session"
SESSION_S = 12 * 3600.0
_MOST_SESSIONS = 1000
_MOST_FORM_BYTES = 8 << 10
_NOBODY = KeyEntry(b"")


class Door:
    """Judges requests by their key.

    Args:
        keys: Who may come in; empty: everybody who reaches the server under a name of this machine.
    """

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self._sessions = Sessions()

    def key_of(self, request: Request, *, takes_cookie: bool = False) -> KeyEntry:
        """Whose request it is.

        Raises:
            HTTPException: 401, nobody's; 421, without keys, when it names another machine.
        """
        if not self._keys:
            # A page of another site can reach this machine's ports, but not under a name of this machine.
            if not is_loopback(request.url.hostname or ""):
                raise HTTPException(421, "without keys, this collector answers to names of this machine only")
            return _NOBODY
        entry = self._keys.find(_shown_key(request))
        if entry is None and takes_cookie:
            entry = self._session_key(request)
        if entry is None:
            raise HTTPException(
                401,
                "the key is missing or wrong",
                {"WWW-Authenticate": 'Basic realm="ml-debugger", charset="UTF-8"'},
            )
        return entry

    def has_session(self, request: Request) -> bool:
        """Whether who asks has come in by the sign-in page."""
        return self._session_key(request) is not None

    def _session_key(self, request: Request) -> KeyEntry | None:
        """Whose session it is; a key that was taken out of the file ends it."""
        entry = self._sessions.find(request.cookies.get(COOKIE, ""))
        return entry if entry in self._keys.entries else None

    async def sign_in(self, request: Request) -> Response:
        """Take the key of the sign-in page."""
        _check_site(request)
        form = b""
        async for part in request.stream():
            form += part
            if len(form) > _MOST_FORM_BYTES:
                raise HTTPException(413, "the form is too long")
        fields = parse_qs(form.decode("utf-8", "surrogateescape"), errors="surrogateescape")
        entry = self._keys.find(fields.get("key", [""])[0].strip())
        if entry is None and self._keys:
            return asks_for_key(was_wrong=True)
        response = RedirectResponse(".", 303)
        if entry is not None:
            # A proxy in front tells whether it speaks TLS; believing a liar makes the cookie safer, not less.
            is_https = "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
            response.set_cookie(
                COOKIE,
                self._sessions.begin(entry),
                max_age=int(SESSION_S),
                path=None,  # the folder of this page, wherever a proxy has put it
                httponly=True,
                samesite="strict",
                secure=is_https,
            )
        return response

    async def sign_out(self, request: Request) -> Response:
        """End a session."""
        _check_site(request)
        self._sessions.end(request.cookies.get(COOKIE, ""))
        response = RedirectResponse(".", 303)
        response.set_cookie(COOKIE, "", max_age=0, path=None, httponly=True, samesite="strict")
        return response


class Sessions:
    """Sessions of browsers, in memory: they end with the collector.

    Args:
        clock: Seconds that only rise.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, tuple[KeyEntry, float]] = {}  # oldest first

    def begin(self, key: KeyEntry) -> str:
        """A new session's token: random, and nothing of the key."""
        token = secrets.token_urlsafe(32)
        now = self._clock()
        for name in [name for name, (_, end) in self._entries.items() if end <= now]:
            del self._entries[name]
        while len(self._entries) >= _MOST_SESSIONS:
            del self._entries[next(iter(self._entries))]
        self._entries[token] = key, now + SESSION_S
        return token

    def find(self, token: str) -> KeyEntry | None:
        """Whose session it is; None if it is over, or never was. 256 random bits cannot be tried out."""
        found = self._entries.get(token)
        return found[0] if found is not None and found[1] > self._clock() else None

    def end(self, token: str) -> None:
        """Sign out."""
        self._entries.pop(token, None)


def asks_for_key(*, was_wrong: bool = False) -> Response:
    """The sign-in page. It names a scheme that browsers have no window of their own for."""
    return HTMLResponse(sign_in_page(was_wrong=was_wrong), 401, {"WWW-Authenticate": "Bearer"})


def _shown_key(request: Request) -> str:
    """The key in the header: as a token, or as the password of any user; empty if there is none."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    key = credentials.strip()
    if scheme.lower() == "bearer":
        return key
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(key, validate=True).decode("utf-8", "surrogateescape").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _check_site(request: Request) -> None:
    """Another site's page may not sign a browser in or out."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "this form was sent from another site")
