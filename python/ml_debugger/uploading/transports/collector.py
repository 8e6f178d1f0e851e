"""Our own collector: tus for slices, a list of what it holds, and documents that change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from urllib.parse import quote

from ml_debugger.errors import UploadError
from ml_debugger.uploading.retry import RetryPolicy
from ml_debugger.uploading.transports.http import MAX_ANSWER_BYTES
from ml_debugger.uploading.transports.tus import TusTransport


class CollectorTransport(TusTransport):
    """Uploads to `ml-debugger serve`; see `Transport`.

    Args:
        address: Address of the collector, ending in ``/``.
        key: Sent as ``Authorization: Bearer``, if there is one.
        policy: How often to try.
    """

    keeps_documents = True
    part_bytes = 256 << 20  # it keeps what has arrived before a cut

    def __init__(self, address: str, key: str | None, policy: RetryPolicy) -> None:
        super().__init__(f"{address}files/", key, policy)
        # It verifies every slice as a whole, so that parts need no checksum of their own, and a cut loses
        # nothing.
        self._extensions = frozenset({"creation", "termination"})

    def held(self, trace: str, urls: Mapping[str, str]) -> dict[str, int]:
        """Length by path of every file of a trace."""
        answer = self.retried(lambda: self.http.request("GET", f"../list/{quote(trace)}"))
        try:
            listed = json.loads(answer.body)["files"]
            return {str(path): int(length) for path, length in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UploadError(
                "the endpoint's list of files cannot be read", "check that it is `ml-debugger serve`"
            ) from error

    def read(self, path: str) -> bytes | None:
        """A file's bytes."""
        limit = MAX_ANSWER_BYTES if path.endswith(".json") else None
        answer = self.retried(
            lambda: self.http.request("GET", f"../data/{quote(path)}", accept=(200, 404), max_bytes=limit)
        )
        return answer.body if answer.status == 200 else None

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """Replace a document if it still is ``old``."""
        condition = {"If-None-Match": "*"} if old is None else {"If-Match": f'"{_sha256(old)}"'}

        def put() -> bool:
            answer = self.http.request(
                "PUT", f"../data/{quote(path)}", headers=condition, content=new, accept=(200, 201, 204, 412)
            )
            return answer.status != 412

        # An answer may be lost after the work was done: then it is ours that stands there.
        return bool(self.retried(put)) or self.read(path) == new


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
