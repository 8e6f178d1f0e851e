"""How often, and after what pause, something is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

from ml_debugger.errors import UploadError

MAX_TRIES = 5
MAX_RETRY_AFTER_S = 60.0


class TransientError(Exception):
    """A failure that may pass; ``retry_after_s`` is what the server asked for."""

    def __init__(self, message: str, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class RetryPolicy:
    """Bounds of all retries.

    Attributes:
        stall_timeout_s: Longest time without progress.
        base_s: The n-th pause is random, below ``base_s * 2**n`` (full jitter: clients that failed together
            do not come back together).
        cap_s: No pause is longer, unless the server asks for one.
    """

    stall_timeout_s: float = 300.0
    base_s: float = 0.5
    cap_s: float = 20.0


class Retries:
    """Counts tries without progress; one object for each thing that is to be sent."""

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._sleep = sleep
        self._clock = clock
        self._tries = 0
        self._since = clock()

    def progress(self) -> None:
        """Something arrived: the count begins anew."""
        self._tries = 0
        self.moved()

    def moved(self) -> None:
        """Bytes are on their way, and may arrive or not: the time begins anew, the count does not."""
        self._since = self._clock()

    def failed(self, error: TransientError) -> None:
        """Count a failed try, and pause before the next one.

        Raises:
            UploadError: It was the last one, or the time is over.
        """
        self._tries += 1
        hint = error.hint or "try again later: what has arrived is not sent again"
        if self._tries >= MAX_TRIES:
            raise UploadError(f"{error}; gave up after {self._tries} tries without progress", hint) from error
        pause = random.uniform(0, min(self._policy.cap_s, self._policy.base_s * 2**self._tries))
        if error.retry_after_s is not None:
            pause = max(pause, min(error.retry_after_s, MAX_RETRY_AFTER_S))
        left = self._since + self._policy.stall_timeout_s - self._clock()
        if pause > left:
            raise UploadError(
                f"{error}; no progress within stall_timeout_s={self._policy.stall_timeout_s:g} s", hint
            ) from error
        self._sleep(pause)


def retry_after_s(value: str | None, date: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for; a time counts from the server's own ``Date``."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value.strip()[:9]), MAX_RETRY_AFTER_S)
    try:
        if date is None:
            return None  # the two clocks may be years apart; our own backoff must do
        wait = _moment(value) - _moment(date)
        return min(max(0.0, wait.total_seconds()), MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, OverflowError):
        return None


def _moment(text: str) -> datetime:
    found = parsedate_to_datetime(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)
