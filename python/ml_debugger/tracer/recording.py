"""`Recording`: records a forward that the user's own code runs, and not the tracer.

Two hooks at the model itself see where that forward begins and ends; what lies between is a call like any
other. They are attached by the first recording of a tracer and do nothing outside of one.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ml_debugger.errors import AliasNotCapturedError, InvalidInputError
from ml_debugger.tracer import compiled
from ml_debugger.tracer.call import ThreadState, TracedCall, refuse_stream_capture

if TYPE_CHECKING:
    from ml_debugger.tracer.head import HeadSearch
    from ml_debugger.tracer.torch_tracer import TorchTracer

_HINT = "open recording() around one forward: one block for each call of the model"


class Recording:
    """One block of `TorchTracer.recording`; a context manager, to be entered once, in the forward's thread.

    Args:
        tracer: Whose model runs inside.
        arguments: (ground_truth, input_ids, dataset_type, n_epoch, keywords), unchecked.
    """

    def __init__(self, tracer: TorchTracer, arguments: tuple[Any, ...]) -> None:
        self._tracer = tracer
        self._arguments = arguments
        self._state = tracer._state
        self._call: TracedCall | None = None
        self._model_input: Any = None
        self._is_running = False
        self._is_saved = False
        self._search: HeadSearch | None = None
        # While the head is searched for: other first calls wait until the search is over, and each forward
        # that is tried is watched.
        self._block = contextlib.ExitStack()
        self._watch = contextlib.ExitStack()

    @property
    def is_saved(self) -> bool:
        """Whether the forward has run and its rows are handed over."""
        return self._is_saved

    def __enter__(self) -> Recording:
        if self._state.recording is not None:
            raise InvalidInputError("this thread is in a recording() of this tracer already", _HINT)
        if not self._arguments:
            raise InvalidInputError("this recording() was entered before", _HINT)
        arguments, self._arguments = self._arguments, ()
        call = self._tracer._begin("recording()", *arguments)
        if call is not None and call.stored_rows:
            self._call = call
            self._tracer._recorder.watch_model()
            self._prepare_search()
            self._state.recording = self
        return self

    def _prepare_search(self) -> None:
        recorder = self._tracer._recorder
        if recorder.head_search is None:
            return
        try:
            self._block.enter_context(recorder.head_lock)
            if recorder.head_search is not None:
                # Within a compiled forward it is too late to run that as it is written.
                self._block.enter_context(compiled.run_eagerly())
        except BaseException:
            self._block.close()
            raise

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        self._state.recording = None
        try:
            if self._is_running:
                self._abandon()
        finally:
            self._block.close()
        if exception_type is None and not self._is_saved and not self._tracer._recorder.core.inert:
            self._tracer._require_open("the end of a recording()")
            raise AliasNotCapturedError(
                "the model did not run inside of recording(), so no layer was captured",
                "call the tracer's own model in the block and in the same thread, as model(x) and not "
                "model.forward(x), which calls no hooks",
            )

    # By the hooks of the model

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called."""
        call = self._call
        if call is None or _is_recomputing() or self._tracer._recorder.core.inert:
            return
        if self._is_running:  # it raised, and the caller tries again
            self._abandon()
        elif self._state.call is not None:  # the tracer itself was called inside of the block
            return
        if self._is_saved:
            raise InvalidInputError("the model runs a second time inside of one recording()", _HINT)
        refuse_stream_capture()
        self._model_input = _as_model_input(args, kwargs)
        self._is_running = True
        call.description = None
        try:
            recorder = self._tracer._recorder
            recorder.start(call)
            self._search = recorder.head_search
            if self._search is not None:
                self._watch.enter_context(self._search.watching((args, kwargs)))
        except BaseException:
            self._abandon()
            raise

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The model has returned: the call is complete, whatever the rest of the block does."""
        call = self._call
        if call is None or not self._is_running or _is_recomputing():
            return
        tracer = self._tracer
        try:
            if self._search is not None:
                self._search.end_run(tracer.model, (args, kwargs), output)
                self._watch.close()
                tracer._find_head(self._search, output, call)
            is_accepted = tracer._save(call, self._model_input, output)
        except BaseException as error:
            self._abandon()
            tracer._raise_if_closed(error)
            raise
        self._leave()
        self._is_saved = True
        self._block.close()
        if not is_accepted:
            tracer._warn_of_failure()

    def _abandon(self) -> None:
        self._tracer._recorder.abort()
        self._leave()

    def _leave(self) -> None:
        self._is_running = False
        self._model_input = self._search = None
        self._tracer._recorder.leave()
        self._watch.close()


class ModelHook:
    """Tells the calling thread's recording, if there is one, that the model begins or ends.

    A copy or a pickle of it does nothing and needs nothing of ours, as with the hooks of the layers.
    """

    def __init__(self, state: ThreadState, method: str) -> None:
        self.alias = ""
        self._state = state
        self._method = method

    __name__ = property(compiled.refuse_name)

    def __call__(self, module: torch.nn.Module, *given: Any) -> None:
        """Hook with keywords: the model, its arguments, and behind a forward the output."""
        if compiled.is_exporting():
            return
        if compiled.is_loaded():
            compiled.outside_of_graphs(ModelHook._tell, self, given)
        else:
            self._tell(given)

    def _tell(self, given: tuple[Any, ...]) -> None:
        recording = self._state.recording
        if recording is not None:
            getattr(recording, self._method)(*given)

    def __copy__(self) -> Any:
        return contextlib.nullcontext().__exit__

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


def _is_recomputing() -> bool:
    """Whether a backward is running: activation checkpointing runs modules again there."""
    return torch._C._current_graph_task_id() != -1


def _as_model_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args[0] if len(args) == 1 else args
    return (*args, kwargs) if args else kwargs
