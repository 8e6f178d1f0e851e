"""Object stores (S3, Google Cloud Storage, Azure Blob Storage) through obstore."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from ml_debugger.errors import AuthenticationError, UploadError
from ml_debugger.uploading.endpoint import Endpoint
from ml_debugger.uploading.retry import MAX_TRIES, RetryPolicy
from ml_debugger.uploading.transports import Item

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_PART_BYTES = 8 << 20
_CONCURRENCY = 4


class ObjectTransport:
    """Puts objects; credentials come from the environment, as for the cloud's own tools; see `Transport`."""

    keeps_documents = True

    def __init__(self, endpoint: Endpoint, policy: RetryPolicy) -> None:
        self._shown = endpoint.address
        try:
            import obstore
        except ImportError as error:
            raise UploadError(
                f"the endpoint {self._shown!r} needs the package obstore, which is not installed",
                'pip install "ml-debugger[cloud]"',
            ) from error
        self._obstore = obstore
        with self._errors("open"):
            self._store = _open_store(endpoint.address, policy)

    def held(self, trace: str, urls: Mapping[str, str]) -> dict[str, int]:
        """Length by path of every object of a trace."""
        return {path: length for path, length, _ in self.listing(trace)}

    def listing(self, prefix: str = "") -> list[tuple[str, int, datetime]]:
        """(path, length, time of the last change) of every object below ``prefix``."""
        with self._errors("list"):
            listed = self._obstore.list(self._store, prefix=prefix or None)
            return [
                (entry["path"], int(entry["size"]), entry["last_modified"])
                for batch in listed
                for entry in batch
            ]

    def has(self, path: str) -> bool:
        """Whether an object is there."""
        try:
            with self._errors("read"):
                self._obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str) -> bytes | None:
        """An object's bytes."""
        try:
            with self._errors("read"):
                return bytes(self._obstore.get(self._store, path).bytes())
        except FileNotFoundError:
            return None

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """Replace an object if it still is ``old``; in a store without conditions the last one wins."""
        errors = self._obstore.exceptions
        mode: Any = "create"
        if old is not None:
            try:
                with self._errors("read"):
                    found = self._obstore.get(self._store, path)
                    if bytes(found.bytes()) != old:
                        return False
            except FileNotFoundError:
                return False
            mode = {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}
        with self._errors("write"):
            try:
                self._obstore.put(self._store, path, new, mode=mode, use_multipart=False)
            except (errors.AlreadyExistsError, errors.PreconditionError):
                return False
            except (errors.NotSupportedError, NotImplementedError):
                self._obstore.put(self._store, path, new, use_multipart=False)
        return True

    def send(self, item: Item) -> None:
        """Put an object: it is there whole, or not at all."""
        with self._errors("write"):
            item.file.seek(0)
            self._obstore.put(
                self._store, item.path, item.file, chunk_size=_PART_BYTES, max_concurrency=_CONCURRENCY
            )
            item.on_bytes(item.length_bytes)
            size = int(self._obstore.head(self._store, item.path)["size"])
        if size != item.length_bytes:
            raise UploadError(
                f"{self._shown}/{item.path} has {size} bytes, {item.length_bytes} were sent", "upload again"
            )

    def discard(self, url: str) -> None:
        """Parts of a put that was cut are the bucket's to clean up, by a lifecycle rule."""

    def close(self) -> None:
        """Nothing is open."""

    @contextlib.contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        errors = self._obstore.exceptions
        try:
            yield
        except (UploadError, FileNotFoundError):
            raise
        except errors.NotFoundError as error:
            raise FileNotFoundError(str(error)) from error
        except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
            raise AuthenticationError(
                f"{self._shown} refused to {action}: {_first_line(error)}",
                "check the credentials in the environment",
            ) from error
        except (errors.BaseError, OSError, ValueError) as error:
            raise UploadError(
                f"cannot {action} {self._shown}: {_first_line(error)}",
                "check the address, the credentials and the network",
            ) from error


def _open_store(address: str, policy: RetryPolicy) -> ObjectStore:
    from obstore.store import from_url

    retry: Any = {
        "max_retries": MAX_TRIES - 1,
        "retry_timeout": timedelta(seconds=policy.stall_timeout_s),
        "backoff": {
            "init_backoff": timedelta(seconds=policy.base_s),
            "max_backoff": timedelta(seconds=policy.cap_s),
            "base": 2,
        },
    }
    options: Any = {"timeout": timedelta(seconds=policy.stall_timeout_s)}
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"):
        options["allow_http"] = True
    return from_url(address, client_options=options, retry_config=retry)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
