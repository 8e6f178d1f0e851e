"""`ModelRecorder`: the hooks at a model and the calls they capture. Knows nothing of what outputs mean."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from types import CodeType

import torch

from ml_debugger.tracer.call import ThreadState, TracedCall
from ml_debugger.tracer.definition import TraceDefinition
from ml_debugger.tracer.description import CapturedColumn
from ml_debugger.tracer.head import HEAD_ALIAS, Head, HeadSearch
from ml_debugger.tracer.hooks import HookSet
from ml_debugger.tracer.retention import Retention
from ml_debugger.tracer.rows import RowWriter, tensor_from_bytes
from ml_debugger.tracer.session import TraceSession


class ModelRecorder:
    """The hooks at a model, the search for its head, and the call that each thread is in.

    Args:
        model: The model.
        definition: What of it is recorded.
        session: Takes the rows.
        state: Of the calling thread; shared with hooks and blocks of `recording`.
        search: What finds the head in the first call; None if the layers are known.

    Attributes:
        core: The recorder of the core.
        rows: Copies what the hooks do not.
        head_search: The search, until it has found.
        head_lock: Held by the call that searches; the first calls of other threads wait for it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        definition: TraceDefinition,
        session: TraceSession,
        state: ThreadState,
        search: HeadSearch | None,
    ) -> None:
        config = session.config
        self._model = model
        self._session = session
        self._state = state
        self._keeps_all_runs = config.repeat == "all"
        self._columns = definition.columns(keep_all_runs=self._keeps_all_runs)
        self.core = session.recorder
        self.rows = RowWriter(self.core, self._columns)
        self.head_search = search
        self.head_lock = threading.RLock()  # a call may come inside of a recording() of its thread
        keep = config.keep_epochs
        self._retention = None if keep is None else Retention(session, keep)
        self._hooks = HookSet(config, state)
        # A tracer that is dropped without close() loses nothing, and leaves no hooks behind.
        self._finalizer = weakref.finalize(self, _release, session, self._hooks)
        self._finalizer.atexit = False
        self._hooks.attach(self.core, definition.layers)
        self._warned = False

    # One call

    def start(self, call: TracedCall) -> None:
        """Make ``call`` what this thread's hooks record."""
        state, core = self._state, self.core
        if self._retention is not None:
            self._retention.keep(call.epoch)
        if state.call is not None:
            core.abort_call()  # its end was cut short by a signal, or it is the outer one of two
        # First the mark, then the call, and the reverse at the end: a signal in between is seen by the next
        # call.
        state.call, state.batch_size, state.rows = call, call.batch_size, call.rows
        core.begin_call(call.epoch, call.batch_size)
        self._hooks.tell_compiler()

    def abort(self) -> None:
        """Forget what the current call has captured."""
        self.core.abort_call()
        self._state.captured = None

    def leave(self) -> None:
        """No call is the current one any more."""
        state = self._state
        state.call, state.batch_size, state.rows = None, 0, None

    def adopt_head(self, head: Head) -> None:
        """Capture what the head was given in the current call, and hook it for the later ones."""
        picker = self._hooks.picker(HEAD_ALIAS)
        for given in head.inputs if self._keeps_all_runs else head.inputs[-1:]:
            self.core.capture(0, picker(given))
        head.inputs.clear()
        self._hooks.attach_head(self.core, 0, HEAD_ALIAS, head)
        self.head_search = None

    def watch_model(self) -> None:
        """Tell this thread's block of `recording` where the model begins and ends."""
        with self.head_lock:
            self._hooks.attach_model(self._model, self._state)
        self._hooks.tell_compiler()

    def captured(self) -> dict[str, CapturedColumn]:
        """What this thread's last call, or the current one so far, has captured, by alias."""
        if self._state.captured is not None:
            return self._state.captured
        return {} if self._state.call is None else self._columns.captured(self.core.captures())

    def read_back(self, column: CapturedColumn) -> torch.Tensor:
        """A new tensor with the bytes of a captured column."""
        return tensor_from_bytes(self.core.read_back(column.capture), column)

    def warn_of_failure(self, entry: CodeType) -> None:
        """Warn once, if the storage has failed, at the line that called the function ``entry``."""
        if not self.core.failed or self._warned:
            return
        self._warned = True
        frame, depth = sys._getframe(), 1
        while frame.f_back is not None and frame.f_code is not entry:
            frame, depth = frame.f_back, depth + 1
        info = self._session.info
        warnings.warn(
            f"the storage of trace {info.model_name!r} / {info.version_name!r} has failed: recording "
            "stops, training goes on, stats() counts what is lost",
            RuntimeWarning,
            stacklevel=depth + 1,
        )

    # Epochs, and the end

    def drop_epoch(self, epoch: int, attempt: int | None) -> dict[str, int]:
        """See `TraceSession.drop_epoch`; the epoch may begin again."""
        if self._retention is not None:
            self._retention.forget(epoch)
        return self._session.drop_epoch(epoch, attempt)

    def drop_all(self) -> None:
        """See `TraceSession.drop_all`; every epoch may begin again."""
        if self._retention is not None:
            self._retention.forget(None)
        self._session.drop_all()

    def close(self) -> None:
        """Take the hooks away and close the session, which may raise."""
        self._let_go()
        self._session.close()

    def close_quietly(self) -> None:
        """Likewise; log instead of raising."""
        self._let_go()
        self._session.close_quietly()

    def _let_go(self) -> None:
        self._hooks.remove()
        self._finalizer.detach()


def _release(session: TraceSession, hooks: HookSet) -> None:
    """What happens to a tracer that is dropped without ``close()``."""
    hooks.remove()
    session.close_quietly()
