"""`keep_epochs`: older epochs go as new ones begin."""

from __future__ import annotations

from ml_debugger.errors import StorageError
from ml_debugger.store.layout import NO_EPOCH
from ml_debugger.tracer.session import TraceSession, logger


class Retention:
    """Keeps the newest epochs of a trace; rows without an epoch stay.

    Args:
        session: Whose epochs.
        keep_epochs: How many, the one that is being recorded included.
    """

    def __init__(self, session: TraceSession, keep_epochs: int) -> None:
        self._session = session
        self._keep_epochs = keep_epochs
        self._begun: set[int] = set()

    def keep(self, epoch: int) -> None:
        """Before a call of ``epoch``: its first one drops what is too old, and waits for that.

        Raises:
            StorageError: An old epoch cannot be deleted, and ``on_error="raise"``.
        """
        if epoch in self._begun or epoch == NO_EPOCH:
            return
        self._begun.add(epoch)
        present = ({epoch, *self._session.epochs()} | self._begun) - {NO_EPOCH}
        older = sorted(other for other in present if other < epoch)
        surplus = older[: max(0, len(present) - self._keep_epochs)]
        try:
            if surplus:
                self._session.flush(None)  # rows on their way would bring an epoch back
            for other in surplus:
                self._session.drop_epoch(other, None)
                self._begun.discard(other)
        except StorageError as error:
            if self._session.config.on_error == "raise":
                raise
            logger.warning("keep_epochs: older epochs stay: %s", error)

    def forget(self, epoch: int | None) -> None:
        """An epoch (None: every one) was dropped by the user; it may begin again."""
        if epoch is None:
            self._begun.clear()
        else:
            self._begun.discard(epoch)
