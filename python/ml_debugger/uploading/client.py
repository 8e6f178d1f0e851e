"""What a tracer keeps for its uploads: the endpoint, the key, and the process that does them.

Light to import: a tracer without an endpoint never needs the rest.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ml_debugger.errors import InvalidInputError, InvalidTypeError
from ml_debugger.uploading.report import UploadReport

if TYPE_CHECKING:
    from ml_debugger.tracer.session import TraceSession
    from ml_debugger.uploading.process import UploaderProcess


class Secret:
    """A text that never shows in a repr, a log or an error."""

    __slots__ = ("_text",)

    def __init__(self, text: str | None) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "<no key>" if self._text is None else "<hidden key>"

    def __reduce__(self) -> Any:
        raise InvalidTypeError(
            "a tracer cannot be copied or pickled", "copy the model, and make a tracer of its own"
        )

    def reveal(self) -> str | None:
        """The text itself, for the request that needs it."""
        return self._text


class UploadClient:
    """The uploads of one tracer.

    Args:
        api_endpoint: Where to, as text, or the path of a folder; None: ``MLD_API_ENDPOINT``.
        api_key: The key to show; None: ``MLD_API_KEY``.
    """

    def __init__(self, api_endpoint: object, api_key: object) -> None:
        place = os.fspath(api_endpoint) if isinstance(api_endpoint, os.PathLike) else api_endpoint
        self._endpoint = _anchored(_text_or_environment(place, "api_endpoint"))
        self._key = Secret(_text_or_environment(api_key, "api_key"))
        self._auto: UploaderProcess | None = None

    @property
    def has_endpoint(self) -> bool:
        """Whether there is anywhere to send to."""
        return self._endpoint is not None

    def require_endpoint(self) -> str:
        """The endpoint.

        Raises:
            UploadError: There is none, or none that is handled.
        """
        from ml_debugger.uploading.endpoint import parse_endpoint

        parse_endpoint(self._endpoint, has_key=self._key.reveal() is not None)
        assert self._endpoint is not None
        return self._endpoint

    def check_auto_sync(self) -> None:
        """Judge the endpoint before anything is opened.

        Raises:
            InvalidInputError: There is none.
            UploadError: None that is handled.
        """
        if self._endpoint is None:
            raise InvalidInputError(
                "auto_sync=True needs an endpoint, and there is none",
                "pass api_endpoint or set MLD_API_ENDPOINT",
            )
        self.require_endpoint()

    def begin_auto_sync(self, session: TraceSession) -> None:
        """Start the process that uploads in the background; it ends with the session."""
        self._auto = auto = self._start(session, is_auto=True)
        timeout_s = session.config.close_timeout_s
        session.on_closed = lambda: auto.finish(timeout_s)

    def upload(self, session: TraceSession, n_epoch: int | None, *, force: bool) -> UploadReport:
        """Send what is missing, and wait for it; in a process that ends with this call.

        The one of ``auto_sync``, if there is one, stands back meanwhile: a rank's ledger has one user at a
        time.

        Raises:
            UploadError: It failed.
        """
        from ml_debugger.uploading.progress import UploadProgress

        if self._auto is not None and not session.closed and not self._auto.is_inherited:
            self._auto.report()
        process = self._start(session, is_auto=False)
        try:
            with UploadProgress(None) as shown:
                return process.upload(n_epoch, force=force, on_bytes=shown.advance)
        finally:
            process.kill()

    def _start(self, session: TraceSession, *, is_auto: bool) -> UploaderProcess:
        from ml_debugger.uploading.process import UploaderProcess

        config = session.config
        return UploaderProcess(
            session.directory,
            self.require_endpoint(),
            self._key.reveal(),
            session.rank,
            is_auto=is_auto,
            stall_timeout_s=config.stall_timeout_s,
            close_timeout_s=config.close_timeout_s,
        )


def _anchored(endpoint: str | None) -> str | None:
    """The endpoint, if there is one; a relative folder as seen from here, also after a ``chdir``."""
    if endpoint is None or endpoint.isspace():
        return None
    from ml_debugger.uploading.endpoint import anchored

    return anchored(endpoint)


def _text_or_environment(value: object, name: str) -> str | None:
    """An argument, else ``MLD_<NAME>``, else None; the value itself is never part of an error."""
    if value is None:
        return os.environ.get(f"MLD_{name.upper()}") or None
    if not isinstance(value, str):
        raise InvalidTypeError(f"{name} must be a str or None, got {type(value).__name__}", "pass text")
    return value or None
