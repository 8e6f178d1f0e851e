"""The collector's HTTP face: the tus verbs for slices; beside them lists, documents, a page, downloads.

The tus verbs are written here, by the specification (https://tus.io/protocols/resumable-upload): a slice
counts only after its SHA-256 was verified, which is more than the protocol asks for.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ml_debugger.collector.door import Door, asks_for_key
from ml_debugger.collector.keys import KeyEntry, KeyRing
from ml_debugger.collector.overview import ClosingError, Overview
from ml_debugger.collector.page import POLICY
from ml_debugger.collector.receiving import CHECKSUMS, Checksum, in_thread, receive
from ml_debugger.collector.storage import (
    ChecksumError,
    Storage,
    Upload,
    is_document_path,
    is_trace_path,
    slice_of,
)
from ml_debugger.errors import MlDebuggerError, NotFoundError

logger = logging.getLogger("ml_debugger.collector")

TUS_VERSION = "1.0.0"
_CHECKSUM_MISMATCH = 460
_MAX_DOCUMENT_BYTES = 8 << 20
_MAX_METADATA_BYTES = 16 << 10
_SWEEP_INTERVAL_S = 3600.0
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Handler = Callable[[Request], Awaitable[Response]]
KeyedHandler = Callable[[Request, KeyEntry], Awaitable[Response]]


class Collector:
    """Handlers of all routes.

    Args:
        storage: Where files go.
        keys: Who may come in; empty: everybody who reaches the server under a name of this machine.
    """

    def __init__(self, storage: Storage, keys: KeyRing) -> None:
        self._storage = storage
        self._door = Door(keys)
        self._overview = Overview(storage)
        # The task that works on an upload: a client that lost its connection comes again before we notice.
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._documents = asyncio.Lock()
        self._finishing = asyncio.Lock()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/", self._answered(self._front), methods=["GET"]),
            Route("/sign-in", self._answered(self._door.sign_in), methods=["POST"]),
            Route("/sign-out", self._answered(self._door.sign_out), methods=["POST"]),
            Route("/export/{trace:path}.zip", self._guarded(self._export, is_page=True), methods=["GET"]),
            Route("/list/{trace:path}", self._guarded(self._list), methods=["GET"]),
            Route("/data/{path:path}", self._guarded(self._read), methods=["GET"]),
            Route("/data/{path:path}", self._guarded(self._write), methods=["PUT"]),
            Route("/files/", self._options, methods=["OPTIONS"]),
            Route("/files/", self._guarded(self._create), methods=["POST"]),
            Route("/files/{number}", self._guarded(self._head), methods=["HEAD"]),
            Route("/files/{number}", self._guarded(self._patch), methods=["PATCH"]),
            Route("/files/{number}", self._guarded(self._delete), methods=["DELETE"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={HTTPException: _refusal})

    def close(self) -> None:
        """What would take long ends soon: the collector ends."""
        self._overview.close()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(self._sweep())
        yield
        sweeper.cancel()
        with contextlib.suppress(OSError):
            await run_in_threadpool(self._storage.close)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            with contextlib.suppress(OSError):
                await run_in_threadpool(self._storage.sweep)

    # Who may come in

    def _guarded(self, handler: KeyedHandler, *, is_page: bool = False) -> Handler:
        """A handler that only who has a key gets to; ``is_page``: or who has signed in."""

        async def guarded(request: Request) -> Response:
            return await handler(request, self._door.key_of(request, takes_cookie=is_page))

        return self._answered(guarded)

    def _answered(self, handler: Handler) -> Handler:
        """A handler whose errors have a status, and whose answers have the headers that all have."""

        async def answered(request: Request) -> Response:
            try:
                response = await handler(request)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody is there to read it
            except MlDebuggerError as error:
                logger.error("%s %s: %s", request.method, request.url.path, error)
                raise _status_of(error) from None
            except OSError as error:
                raise _status_of(error) from None
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            response.headers.setdefault("Tus-Resumable", TUS_VERSION)
            return response

        return answered

    # Everything but uploads

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _front(self, request: Request) -> Response:
        """The page; who shows no key in a browser is asked for one."""
        try:
            self._door.key_of(request, takes_cookie=True)
        except HTTPException as error:
            if error.status_code == 401 and "text/html" in request.headers.get("accept", ""):
                return asks_for_key()
            raise
        can_sign_out = self._door.has_session(request)
        return HTMLResponse(await run_in_threadpool(self._overview.page, can_sign_out=can_sign_out))

    async def _export(self, request: Request, key: KeyEntry) -> Response:
        trace = request.path_params["trace"]
        if not is_trace_path(trace):
            raise HTTPException(404, "no such trace")
        try:
            return await run_in_threadpool(self._overview.export, trace)
        except NotFoundError:
            raise HTTPException(404, "no such trace") from None
        except ClosingError:
            raise HTTPException(503, "the collector ends", {"Retry-After": "10"}) from None

    async def _list(self, request: Request, key: KeyEntry) -> Response:
        trace = request.path_params["trace"]
        if not is_trace_path(trace):
            raise HTTPException(404, "no such trace")
        return JSONResponse({"files": await run_in_threadpool(self._storage.transport.held, trace, {})})

    async def _read(self, request: Request, key: KeyEntry) -> Response:
        path = request.path_params["path"]
        if not is_document_path(path) and slice_of(path) is None:
            raise HTTPException(404, "no such file")
        data = await run_in_threadpool(self._storage.transport.read, path)
        if data is None:
            raise HTTPException(404, "no such file")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return Response(data, media_type="application/octet-stream", headers={"ETag": etag})

    async def _write(self, request: Request, key: KeyEntry) -> Response:
        path = request.path_params["path"]
        if not is_document_path(path):
            raise HTTPException(404, "only version.json and attempts.json are put here")
        new = b""
        async for part in request.stream():
            new += part
            if len(new) > _MAX_DOCUMENT_BYTES:
                raise HTTPException(413, f"a document has at most {_MAX_DOCUMENT_BYTES} bytes")
        transport = self._storage.transport
        async with self._documents:
            old = await run_in_threadpool(transport.read, path)
            if not _condition_holds(request, old):
                raise HTTPException(412, "the document has changed")
            if not await run_in_threadpool(transport.swap, path, old, new):
                raise HTTPException(412, "the document has changed")
        return Response(status_code=204)

    # tus

    async def _options(self, request: Request) -> Response:
        return Response(
            status_code=204,
            headers={
                "Tus-Resumable": TUS_VERSION,
                "Tus-Version": TUS_VERSION,
                "Tus-Extension": "creation,checksum,termination",
                "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
            },
        )

    async def _create(self, request: Request, key: KeyEntry) -> Response:
        _check_version(request)
        length = _natural(request.headers.get("upload-length"), "Upload-Length")
        metadata = _metadata(request)
        path, sha256 = metadata.get("path", ""), metadata.get("sha256", "")
        name = slice_of(path)
        if name is None or name.sha256 != sha256 or length == 0:
            raise HTTPException(400, "path and sha256 of Upload-Metadata must be those of a slice")
        quota = key.quota_bytes
        is_over = quota is not None and self._storage.used_bytes(key.name, path) + length > quota
        if is_over and not await run_in_threadpool(self._storage.transport.has, path):
            raise HTTPException(413, f"the quota of this key, {quota} bytes, is used up")
        if self._storage.free_bytes() < length:
            raise HTTPException(507, "the disk of the collector is full")
        upload = await run_in_threadpool(
            self._storage.begin, path, length, sha256, key.name, tuple(self._tasks)
        )
        # Relative, so that it holds behind any proxy.
        headers = {"Location": upload.number, "Upload-Offset": str(self._storage.offset(upload))}
        return Response(status_code=201, headers=headers)

    async def _head(self, request: Request, key: KeyEntry) -> Response:
        _check_version(request)
        upload = await self._settled(request, key)
        headers = {
            "Upload-Offset": str(self._storage.offset(upload)),
            "Upload-Length": str(upload.length_bytes),
        }
        return Response(status_code=200, headers=headers)

    async def _delete(self, request: Request, key: KeyEntry) -> Response:
        _check_version(request)
        upload = await self._settled(request, key)
        await run_in_threadpool(self._storage.forget, upload)
        return Response(status_code=204)

    async def _patch(self, request: Request, key: KeyEntry) -> Response:
        _check_version(request)
        if request.headers.get("content-type") != "application/offset+octet-stream":
            raise HTTPException(415, "Content-Type must be application/offset+octet-stream")
        begin = _natural(request.headers.get("upload-offset"), "Upload-Offset")
        checksum = Checksum.of(request)
        upload = await self._settled(request, key)
        if begin != self._storage.offset(upload):
            raise HTTPException(409, f"the offset is {self._storage.offset(upload)}")
        task = asyncio.current_task()
        assert task is not None
        self._tasks[upload.number] = task
        try:
            offset = upload.length_bytes
            if not upload.is_done:
                with self._storage.open_part(upload) as part:
                    offset = begin + await receive(request, part, upload.length_bytes - begin, checksum)
            await self._complete(upload)
        except ChecksumError as error:
            raise HTTPException(_CHECKSUM_MISMATCH, str(error)) from None
        except (ClientDisconnect, asyncio.CancelledError):
            # Either nobody is there any more, or the same client has come again, on another connection.
            return Response(status_code=409)
        finally:
            if self._tasks.get(upload.number) is task:
                del self._tasks[upload.number]
        return Response(status_code=204, headers={"Upload-Offset": str(offset)})

    async def _settled(self, request: Request, key: KeyEntry) -> Upload:
        """The upload that a request is about, with nobody else working on it."""
        number = request.path_params["number"]
        while True:
            while (task := self._tasks.get(number)) is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await asyncio.wait({task})
            upload = self._storage.find(number, key.name)
            if upload is not None:
                # All its bytes may be here, and who brought the last ones was cut off before they were
                # verified.
                with contextlib.suppress(ChecksumError):
                    await self._complete(upload)
                upload = self._storage.find(number, key.name)
            if upload is None:
                raise _no_upload()
            if number not in self._tasks:  # another request may have come in while this one waited
                return upload

    async def _complete(self, upload: Upload) -> None:
        """Verify an upload and give it its place, if it has all its bytes: before that, none of it counts."""
        async with self._finishing:
            found = self._storage.find(upload.number, upload.key_name)
            if found is None:
                raise _no_upload()
            if not found.is_done and self._storage.offset(found) == found.length_bytes:
                await in_thread(self._storage.finish, found)


def _no_upload() -> HTTPException:
    return HTTPException(404, "no such upload")


def _check_version(request: Request) -> None:
    if request.headers.get("tus-resumable") != TUS_VERSION:
        raise HTTPException(412, f"Tus-Resumable must be {TUS_VERSION}", {"Tus-Version": TUS_VERSION})


def _natural(value: str | None, name: str) -> int:
    if value is None or not value.isascii() or not value.isdigit() or len(value) > 18:
        raise HTTPException(400, f"{name} must be a natural number")
    return int(value)


def _metadata(request: Request) -> dict[str, str]:
    header = request.headers.get("upload-metadata", "")
    if len(header) > _MAX_METADATA_BYTES:
        raise HTTPException(400, "Upload-Metadata is too long")
    found = {}
    try:
        for pair in filter(None, (part.strip() for part in header.split(","))):
            name, _, value = pair.partition(" ")
            found[name] = base64.b64decode(value, validate=True).decode()
    except (binascii.Error, ValueError):
        raise HTTPException(400, "Upload-Metadata is malformed") from None
    return found


def _condition_holds(request: Request, old: bytes | None) -> bool:
    if request.headers.get("if-none-match") == "*":
        return old is None
    expected = request.headers.get("if-match")
    return expected is None or (old is not None and expected == f'"{hashlib.sha256(old).hexdigest()}"')


def _status_of(error: OSError | MlDebuggerError) -> HTTPException:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return HTTPException(507, "the disk of the collector is full")
        cause = cause.__cause__
    if isinstance(error, OSError):
        logger.error("%s", os.strerror(error.errno) if error.errno else error)
    return HTTPException(500, "the collector's storage has failed; its log tells how")


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = {**_HEADERS, "Tus-Resumable": TUS_VERSION, **(error.headers or {})}
    return JSONResponse({"detail": error.detail}, error.status_code, headers)
