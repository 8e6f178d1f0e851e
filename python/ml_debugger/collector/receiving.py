"""The body of an upload on its way to the disk: written and hashed on a thread while more of it arrives."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from ml_debugger.collector.storage import ChecksumError, Part

CHECKSUMS = ("sha256", "sha1")
_BLOCK_BYTES = 1 << 20  # worth a trip to a thread, which costs as much as hashing some 100 KiB
_MOST_FREE = 8

_free: list[tuple[bytearray, bytearray]] = []


class Checksum:
    """The checksum that a part of an upload came with."""

    def __init__(self, algorithm: str, expected: bytes) -> None:
        self._digest = hashlib.new(algorithm, usedforsecurity=False)
        self._expected = expected

    @classmethod
    def of(cls, request: Request) -> Checksum | None:
        """That of a request; None if it has none.

        Raises:
            HTTPException: It is malformed.
        """
        header = request.headers.get("upload-checksum")
        if header is None:
            return None
        algorithm, _, encoded = header.partition(" ")
        if algorithm not in CHECKSUMS:
            raise HTTPException(400, f"Upload-Checksum must be one of {', '.join(CHECKSUMS)}")
        try:
            return cls(algorithm, base64.b64decode(encoded, validate=True))
        except (binascii.Error, ValueError):
            raise HTTPException(400, "Upload-Checksum is not base64") from None

    def update(self, data: memoryview) -> None:
        """Take in what follows."""
        self._digest.update(data)

    def holds(self) -> bool:
        """Whether what was taken in has it."""
        return hmac.compare_digest(self._digest.digest(), self._expected)


async def receive(request: Request, part: Part, room_bytes: int, checksum: Checksum | None) -> int:
    """Append a request's body to a part; returns how many bytes it was.

    What has come before a cut stays, unless it came with a checksum of its own.

    Raises:
        HTTPException: It is longer than ``room_bytes``.
        ChecksumError: It has another checksum.
        ClientDisconnect: The client is gone.
        OSError: The disk does not take it.
    """
    length = 0
    is_sound = checksum is None
    loop = asyncio.get_running_loop()
    writing: asyncio.Future[None] | None = None
    pair = _free.pop() if _free else (bytearray(_BLOCK_BYTES), bytearray(_BLOCK_BYTES))

    def append(block: memoryview) -> None:
        part.append(block)
        if checksum is not None:
            checksum.update(block)

    try:
        async for block in _blocks(request, pair):
            if length + len(block) > room_bytes:
                raise HTTPException(413, f"more than the {room_bytes} bytes that were announced")
            if writing is not None:
                await to_its_end(writing)
            writing = loop.run_in_executor(None, append, block)  # anyio's way costs twice as much
            length += len(block)
        if writing is not None:
            await to_its_end(writing)
        is_sound = is_sound or (checksum is not None and checksum.holds())
    finally:
        if writing is not None:
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await to_its_end(writing)
        if not is_sound:
            part.undo()
        if len(_free) < _MOST_FREE:  # no thread works with them any more
            _free.append(pair)
    if not is_sound:
        raise ChecksumError("this part arrived with another checksum")
    return length


async def to_its_end(work: Awaitable[Any]) -> None:
    """Wait for work in a thread; a task that is cancelled meanwhile ends when the work has ended."""
    future = asyncio.ensure_future(work)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        future.exception()  # looked at; who comes next finds out by himself
        raise


async def in_thread(work: Callable[..., object], *arguments: Any) -> None:
    """Do something in a thread, to its end."""
    await to_its_end(run_in_threadpool(work, *arguments))


async def _blocks(request: Request, pair: tuple[bytearray, bytearray]) -> AsyncIterator[memoryview]:
    """The body in blocks that are worth a write; a block holds until the one after the next is asked for.

    At a cut, what has come before it is handed out first. The pair takes turns: memory of its own for each
    block would be new memory each time, for which the system makes zeroes.
    """
    filled, other = memoryview(pair[0]), memoryview(pair[1])
    size = 0
    try:
        async for data in request.stream():
            taken = 0
            while taken < len(data):
                step = min(len(data) - taken, _BLOCK_BYTES - size)
                filled[size : size + step] = memoryview(data)[taken : taken + step]
                size += step
                taken += step
                if size == _BLOCK_BYTES:
                    yield filled
                    filled, other = other, filled
                    size = 0
    except (ClientDisconnect, asyncio.CancelledError):
        if size:
            yield filled[:size]
        raise
    if size:
        yield filled[:size]
