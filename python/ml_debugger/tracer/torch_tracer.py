"""`TorchTracer`: watches a model and records what its layers compute for every sample."""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ml_debugger.config import TracerConfig
from ml_debugger.errors import (
    AliasNotCapturedError,
    InvalidInputError,
    InvalidTypeError,
    NotFoundError,
    StreamCaptureError,
    TracerClosedError,
)
from ml_debugger.stats import TracerStats
from ml_debugger.store.layout import VersionInfo, check_name
from ml_debugger.tracer import compiled
from ml_debugger.tracer.call import ThreadState, TracedCall, check_keywords, parse_values
from ml_debugger.tracer.description import CapturedColumn, Columns
from ml_debugger.tracer.fields import FieldValue, parse_fields
from ml_debugger.tracer.fingerprint import fingerprint
from ml_debugger.tracer.head import Head, HeadSearch
from ml_debugger.tracer.hooks import HookSet, warn_about_fused_layers
from ml_debugger.tracer.inputs import (
    Ids,
    check_dataset_type,
    check_epoch,
    check_flag,
    check_seconds,
    id_texts,
    parse_ids,
    parse_labels,
    select_ids,
)
from ml_debugger.tracer.layers import Layer, resolve_layers
from ml_debugger.tracer.names import check_column_name, check_column_names
from ml_debugger.tracer.outputs import find_logits, iterate_tensors
from ml_debugger.tracer.recording import Recording
from ml_debugger.tracer.retention import Retention
from ml_debugger.tracer.rows import RowWriter, tensor_from_bytes
from ml_debugger.tracer.sampling import SampleFilter
from ml_debugger.tracer.session import TraceSession

HEAD_ALIAS = "features"


class TorchTracer:
    """Records layer outputs and additional fields of a model, one row a sample; base of all tracers.

    Subclasses say what the model's output means (`_parse_output`, `_parse_labels`) or take the whole step
    over (`_parse_and_save_io_data`).

    Args:
        model: Any module; it is watched by hooks and otherwise left alone.
        model_name: Names the trace, with ``version_name``. Any non-empty text.
        version_name: See ``model_name``.
        target_layers: ``{alias: dotted module path}``; None finds the classification head and records its
            input as ``features``.
        additional_fields: Extra columns of ``extracted_feature``: ``[{"name": "camera", "type": "str"}]``.
        additional_label_fields: Extra columns of ``ground_truth``.
        force_table_recreate: Start from empty tables; takes a new architecture and new fields too.
        config: How to record. Default ``TracerConfig()``.

    Raises:
        InvalidInputError: A bad name or field, or the trace has other ones.
        InvalidTypeError: An argument has the wrong type.
        LayerNotFoundError: A path names no module, or there is no head.
        ArchitectureMismatchError: The trace belongs to another architecture.
        TraceInUseError: Another process writes to the trace.
        StorageError: The trace's directory cannot be written.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_name: str,
        version_name: str,
        target_layers: Mapping[str, str] | None = None,
        additional_fields: list[dict[str, Any]] | None = None,
        additional_label_fields: list[dict[str, Any]] | None = None,
        force_table_recreate: bool = False,
        *,
        config: TracerConfig | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise InvalidTypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}", "pass the model"
            )
        check_flag(force_table_recreate, "force_table_recreate")
        self._config = TracerConfig() if config is None else config
        if not isinstance(self._config, TracerConfig):
            raise InvalidTypeError(
                f"config must be a TracerConfig, got {type(config).__name__}", "pass TracerConfig(...)"
            )
        self._model = model
        self._model_name = check_name(model_name, "model_name")
        self._version_name = check_name(version_name, "version_name")
        self._fields = parse_fields(additional_fields, "additional_fields")
        self._label_fields = parse_fields(additional_label_fields, "additional_label_fields")
        self._state = ThreadState()
        self._closed = False
        self._session: TraceSession | None = None
        self._retention: Retention | None = None
        self._prepare_columns(target_layers)
        self._prepare_calls()
        if self._config.mode == "enabled" and self._config.rank >= 0:
            self._open(force_table_recreate)

    # Construction

    def _prepare_columns(self, target_layers: Mapping[str, str] | None) -> None:
        if target_layers is None:
            self._layers: list[Layer] = []
            aliases = [HEAD_ALIAS]
        else:
            self._layers = resolve_layers(self._model, target_layers)
            aliases = [check_column_name(layer.alias, "an alias of target_layers") for layer in self._layers]
        names = [field.name for field in (*self._fields, *self._label_fields)]
        check_column_names([*aliases, *names])
        for option in ("reduce", "batch_dim"):
            known = [*aliases, "logits"] if option == "batch_dim" else aliases
            for alias in getattr(self._config, option) or ():
                if alias not in known:
                    raise InvalidInputError(
                        f"TracerConfig.{option} names {alias!r}, expected an alias of {known}",
                        "use the aliases traced",
                    )
        self._aliases = aliases
        self._names = frozenset(names)
        self._columns = Columns(
            aliases,
            self._fields,
            self._label_fields,
            keep_all_runs=self._config.repeat == "all",
            obstacles={layer.alias: layer.obstacle for layer in self._layers},
        )

    def _prepare_calls(self) -> None:
        config = self._config
        self._every_n_calls = config.every_n_calls
        self._call_numbers = itertools.count()
        self._sample_filter = SampleFilter(config.sample_fraction) if config.sample_fraction < 1 else None
        self._logits_dim = (config.batch_dim or {}).get("logits", 0)
        # A subclass that takes parsing over may read, change or add keywords: then they are checked where
        # they end up.
        self._checks_early = type(self)._parse_and_save_io_data is TorchTracer._parse_and_save_io_data
        self._warned = False

    def _open(self, recreate: bool) -> None:
        search = None if self._layers or self._aliases != [HEAD_ALIAS] else self._new_head_search()
        info = VersionInfo(
            self._model_name,
            self._version_name,
            fingerprint(self._model),
            {HEAD_ALIAS: None} if search is not None else {layer.alias: layer.path for layer in self._layers},
            [field.specification for field in self._fields],
            [field.specification for field in self._label_fields],
        )
        warn_about_fused_layers(self._model, self._layers)
        session = TraceSession(self._config, self._config.rank, info, recreate=recreate)
        self._session = session
        self._recorder = session.recorder
        self._rows = RowWriter(session.recorder, self._columns)
        keep = self._config.keep_epochs
        self._retention = None if keep is None else Retention(session, keep)
        self._hooks = HookSet(self._config, self._state)
        self._head_search = search
        self._head_lock = threading.RLock()  # a call may come inside of a recording() of its thread
        # A tracer that is dropped without close() loses nothing, and leaves no hooks behind.
        self._finalizer = weakref.finalize(self, _release, session, self._hooks)
        self._finalizer.atexit = False
        self._hooks.attach(self._recorder, self._layers)

    def _new_head_search(self) -> HeadSearch:
        return HeadSearch(self._model, self._state, (self._config.batch_dim or {}).get(HEAD_ALIAS, 0))

    # The call

    def __call__(
        self,
        model_input: Any,
        ground_truth: Any,
        input_ids: Any,
        dataset_type: str = "train",
        n_epoch: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the forward, record what it computed, and return the model's output, the same object.

        Blocks only as ``TracerConfig.overflow`` says; writes in the background. Waits for a device only where
        values are needed on the host: ``sample_fraction`` with ids in a tensor, a uint64 tensor for an
        ``int`` field, lists of tensors that differ in dtype or device.

        Args:
            model_input: A tensor goes as the one argument, a tuple or list as positional arguments, a mapping
                as keywords.
            ground_truth: Labels (B,) or (B, C): tensor, array or list; None for none.
            input_ids: One id a sample: sequence of str or int, array, or integer tensor. Read as text.
            dataset_type: Text such as ``"train"``.
            n_epoch: int >= 0, or None.
            **kwargs: Values of the additional fields: one for the batch, or one a sample.

        Raises:
            TracerClosedError: After ``close()``.
            InvalidInputError: Bad input, or an output without the batch size. Nothing of the call is stored.
            InvalidTypeError: Likewise.
            AliasNotCapturedError: A traced layer did not run. Nothing of the call is stored.
            RingOverflowError: The ring is full and ``overflow="raise"``.
            StreamCaptureError: The current CUDA stream is being captured into a graph. The forward did not
                run.
            TraceStallError: It stayed full for ``stall_timeout_s``.
            DiskBudgetError: The trace has reached ``max_bytes``.
            StorageError: The storage has failed for good and ``on_error="raise"``.
        """
        arguments = (self, model_input, ground_truth, input_ids, dataset_type, n_epoch, kwargs)
        if compiled.is_loaded():
            return compiled.outside_of_graphs(TorchTracer._call, *arguments)
        return TorchTracer._call(*arguments)

    def _call(
        self,
        model_input: Any,
        ground_truth: Any,
        input_ids: Any,
        dataset_type: str,
        n_epoch: int | None,
        kwargs: dict[str, Any],
    ) -> Any:
        if self._closed:
            raise self._closed_error("a call")
        if self._session is None or self._recorder.inert or not self._is_recorded():
            self._state.captured = None
            return self._forward(model_input)
        call = self._begin(ground_truth, input_ids, dataset_type, n_epoch, kwargs)
        if call.stored_rows == 0:
            return self._forward(model_input)
        if self._head_search is not None:
            return self._record_first(call, model_input)
        return self._record(call, model_input, None)

    def _is_recorded(self) -> bool:
        return self._every_n_calls == 1 or next(self._call_numbers) % self._every_n_calls == 0

    def _forward(self, model_input: Any) -> Any:
        if isinstance(model_input, torch.Tensor):
            return self._model(model_input)
        if isinstance(model_input, (tuple, list)):
            return self._model(*model_input)
        if isinstance(model_input, Mapping):
            return self._model(**model_input)
        return self._model(model_input)

    def _begin(
        self, ground_truth: Any, input_ids: Any, dataset_type: Any, n_epoch: Any, keywords: dict[str, Any]
    ) -> TracedCall:
        """Check everything that can be checked before the forward."""
        self._refuse_stream_capture()
        self._state.captured = None
        ids = parse_ids(input_ids)
        rows = None if self._sample_filter is None else self._sample_filter.rows(id_texts(ids))
        call = TracedCall(input_ids, ids, rows, check_dataset_type(dataset_type), check_epoch(n_epoch))
        call.ground_truth = ground_truth
        call.keywords = keywords
        if self._checks_early:
            if keywords or self._names:
                check_keywords(self._names, keywords)
                call.values = self._parse_values(keywords, ground_truth is not None, call)
            if ground_truth is not None:
                call.labels = self._parse_labels(ground_truth, call.batch_size)
            call.own_values()
        return call

    def _refuse_stream_capture(self) -> None:
        # Untyped in some versions of torch and not in others.
        is_initialized: Callable[[], bool] = torch.cuda.is_initialized
        if is_initialized() and torch.cuda.is_current_stream_capturing():
            raise StreamCaptureError(
                "the current CUDA stream is being captured into a graph",
                "call the model itself while capturing, and the tracer outside of it",
            )

    def _record_first(self, call: TracedCall, model_input: Any) -> Any:
        """Record the call that shows which module is the head; other threads wait for it."""
        with self._head_lock:
            search = self._head_search
            if search is not None:
                output = self._record(call, model_input, search)
                self._head_search = None
                return output
        return self._record(call, model_input, None)

    def _record(self, call: TracedCall, model_input: Any, search: HeadSearch | None) -> Any:
        try:
            self._start(call)
            if search is None:
                output = self._forward(model_input)
            else:
                with search.watching():
                    output = self._forward(model_input)
                self._find_head(search, output, call)
            is_accepted = self._save(call, model_input, output)
        except BaseException as error:
            self._abort()
            self._raise_if_closed(error)
            raise
        finally:
            self._leave()
        if not is_accepted:
            self._warn_of_failure()
        return output

    def _start(self, call: TracedCall) -> None:
        """Make ``call`` what this thread's hooks record."""
        state, recorder = self._state, self._recorder
        if self._retention is not None:
            self._retention.keep(call.epoch)
        if state.call is not None:
            recorder.abort_call()  # its end was cut short by a signal, or it is the outer one of two
        # First the mark, then the call, and the reverse at the end: a signal in between is seen by the next
        # call.
        state.call, state.batch_size, state.rows = call, call.batch_size, call.rows
        recorder.begin_call(call.epoch, call.batch_size)
        self._hooks.tell_compiler()

    def _save(self, call: TracedCall, model_input: Any, output: Any) -> bool:
        """Parse and save what the forward gave, and hand the call over; False if the storage has failed."""
        self._parse_and_save_io_data(
            model_input,
            output,
            call.ground_truth,
            input_ids=call.input_ids,
            dataset_type=call.dataset_type,
            n_epoch=None if call.epoch < 0 else call.epoch,
            **call.keywords,
        )
        if call.description is None:  # a subclass chose not to save
            self._abort()
            return True
        return self._recorder.end_call(call.description, call.stored_rows, call.ground_truth_rows)

    def _abort(self) -> None:
        self._recorder.abort_call()
        self._state.captured = None

    def _leave(self) -> None:
        state = self._state
        state.call, state.batch_size, state.rows = None, 0, None

    def _raise_if_closed(self, error: BaseException) -> None:
        """Raise what a missing layer means when another thread took the hooks away."""
        if self._closed and isinstance(error, AliasNotCapturedError):
            raise self._closed_error("the end of a call") from None

    def _find_head(self, search: HeadSearch, output: Any, call: TracedCall) -> None:
        """Capture the input of the head in the forward that ``search`` watched, and hook it."""
        logits = find_logits(output, call.batch_size, self._logits_dim)
        if logits is None:
            logits = next(iterate_tensors(output), None)
            if self._checks_early:
                self._parse_output(output, call.batch_size)
        head = search.find(logits)
        picker = self._hooks.picker(HEAD_ALIAS)
        inputs = head.inputs if self._config.repeat == "all" else head.inputs[-1:]
        for given in inputs:
            self._recorder.capture(0, picker(given))
        self._adopt_head(head)

    def _adopt_head(self, head: Head) -> None:
        head.inputs.clear()
        self._hooks.attach_head(self._recorder, 0, HEAD_ALIAS, head)
        self._head_search = None

    # The forward of somebody else

    def recording(
        self,
        ground_truth: Any,
        input_ids: Any,
        dataset_type: str = "train",
        n_epoch: int | None = None,
        **kwargs: Any,
    ) -> Recording:
        """Record the forward that the caller's own code runs inside of a ``with`` block.

        For code that calls the model itself, such as the training step of a framework::

            with tracer.recording(labels, ids, "train", epoch):
                loss = step(batch)  # somewhere in there: model(images)

        The model must run once in the block, by ``model(...)`` and in this thread. The call is complete when
        the model has returned, as with `__call__`: what the block does afterwards, such as the backward, may
        fail and changes nothing. When the forward or an earlier part of the block raises, nothing is stored.
        A forward that raised may be tried again in the block.

        Blocks, waits and checks as `__call__`. The input is checked when the block is entered; what is found
        wrong at the end of the forward is raised by the model's call.

        Args:
            ground_truth: See `__call__`, like all arguments.
            input_ids: One id for each sample that the forward is given.
            dataset_type: See `__call__`.
            n_epoch: See `__call__`.
            **kwargs: Values of the additional fields.

        Returns:
            A context manager for one use. A subclass's `_parse_and_save_io_data` gets as ``model_input`` what
            the model was called with: one argument as it is, several as a tuple, keywords as a dict, and both
            as a tuple with that dict at its end.

        Raises:
            AliasNotCapturedError: At the end of the block: the model did not run in it. Or as `__call__`.
            InvalidInputError: The model runs a second time in the block, or the block is inside of another
                one. Or as `__call__`.
            MlDebuggerError: What else `__call__` raises.
        """
        return Recording(self, (ground_truth, input_ids, dataset_type, n_epoch, kwargs))

    def _begin_recording(
        self,
        ground_truth: Any,
        input_ids: Any,
        dataset_type: str,
        n_epoch: int | None,
        kwargs: dict[str, Any],
    ) -> TracedCall | None:
        """The checked call of a block; None if the block records nothing."""
        if self._closed:
            raise self._closed_error("recording()")
        if self._session is None or self._recorder.inert or not self._is_recorded():
            self._state.captured = None
            return None
        call = self._begin(ground_truth, input_ids, dataset_type, n_epoch, kwargs)
        if call.stored_rows == 0:
            return None
        with self._head_lock:
            self._hooks.attach_model(self._model, self._state)
        self._hooks.tell_compiler()
        return call

    # Parsing and saving

    def _parse_and_save_io_data(
        self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
    ) -> None:
        """Parse what the model was given and returned, and save it. The override point of subclasses.

        Runs after the forward, in the calling thread. Whatever it raises reaches the caller, and nothing of
        the call is stored. A subclass may take its own keywords out, change ``model_output`` or
        ``ground_truth``, read `get_hooked_features`, and then calls this; without that nothing is stored.

        Args:
            model_input: As given to the call.
            model_output: What the forward returned.
            ground_truth: As given to the call.
            **kwargs: ``input_ids``, ``dataset_type``, ``n_epoch``, and the call's own keywords.

        Raises:
            InvalidInputError: Unknown keywords, missing fields, wrong lengths or shapes, an output without
                the batch size.
            InvalidTypeError: A value of the wrong type.
        """
        call = self._state.call
        if call is None or call.description is not None:
            raise InvalidInputError(
                "there is no call to save: it was saved before, or this thread began another inside",
                "call a tracer once for each forward, and not from within the model",
            )
        ids = self._take_call_keywords(call, kwargs)
        has_labels = ground_truth is not None
        values, labels = call.values or [], call.labels
        if not self._checks_early:
            check_keywords(self._names, kwargs)
            values = self._parse_values(kwargs, has_labels, call)
            labels = self._parse_labels(ground_truth, call.batch_size) if has_labels else None
        logits = self._parse_output(model_output, call.batch_size)
        call.description, self._state.captured = self._rows.save(call, ids, logits, values, labels)
        call.ground_truth_rows = 0 if labels is None else call.stored_rows

    def _take_call_keywords(self, call: TracedCall, keywords: dict[str, Any]) -> Ids:
        """Take ids, dataset type and epoch out of ``keywords``; a subclass may have changed them."""
        input_ids = keywords.pop("input_ids", call.input_ids)
        ids = call.ids if input_ids is call.input_ids else parse_ids(input_ids)
        if len(ids) != call.batch_size:
            raise InvalidInputError(
                f"there are {len(ids)} input_ids now, {call.batch_size} came with the call",
                "keep one id a sample",
            )
        dataset_type = keywords.pop("dataset_type", call.dataset_type)
        if dataset_type is not call.dataset_type:
            call.dataset_type = check_dataset_type(dataset_type)
        before = None if call.epoch < 0 else call.epoch
        epoch = keywords.pop("n_epoch", before)
        if epoch is not before and check_epoch(epoch) != call.epoch:
            raise InvalidInputError(
                f"n_epoch became {epoch}, the call began with {call.epoch}", "pass it with the call"
            )
        return select_ids(ids, call.rows)

    def _parse_values(self, keywords: dict[str, Any], has_labels: bool, call: TracedCall) -> list[FieldValue]:
        values = parse_values(self._fields, keywords, call)
        return values + parse_values(self._label_fields, keywords, call) if has_labels else values

    def _parse_labels(self, ground_truth: Any, batch_size: int) -> torch.Tensor:
        """Check and convert the ground truth of a call; the result shares no memory with it."""
        return parse_labels(ground_truth, batch_size)

    def _parse_output(self, model_output: Any, batch_size: int) -> torch.Tensor | None:
        """The tensor to store as ``logits``, its samples along dimension 0; None records no such column."""
        return None

    # After the call

    def _warn_of_failure(self) -> None:
        if self._recorder.failed and not self._warned:
            self._warned = True
            frame, depth = sys._getframe(), 1
            while frame.f_back is not None and frame.f_code is not TorchTracer.__call__.__code__:
                frame, depth = frame.f_back, depth + 1
            warnings.warn(
                f"the storage of trace {self._model_name!r} / {self._version_name!r} has failed: recording "
                "stops, training goes on, stats() counts what is lost",
                RuntimeWarning,
                stacklevel=depth + 1,
            )

    def get_hooked_features(self, layer_name: str) -> torch.Tensor:
        """Return what this thread's last call (or the current one) captured for an alias.

        Reads the recorded bytes back, so it equals what is stored even after in-place operations; with
        ``sample_fraction`` it holds the kept samples only.

        Args:
            layer_name: An alias (with ``repeat="all"`` also ``alias.1``, ...).

        Returns:
            A new tensor with the recorded dtype and shape, on the CUDA device where the layer's output lay,
            else on the CPU.

        Raises:
            NotFoundError: Nothing was captured under that name, or the call was left out or lost.
        """
        captured = self._captured_now()
        if layer_name not in captured:
            listed = ", ".join(map(repr, captured)) or "nothing"
            raise NotFoundError(
                f"the last call captured nothing for {layer_name!r}; it has {listed}",
                "name an alias of target_layers, after a call that was recorded",
            )
        column = captured[layer_name]
        return tensor_from_bytes(self._recorder.read_back(column.capture), column)

    def _captured_now(self) -> dict[str, CapturedColumn]:
        if self._state.captured is not None:
            return self._state.captured
        if self._state.call is not None and self._session is not None:
            return self._columns.captured(self._recorder.captures())
        return {}

    # The tracer's life

    @property
    def model(self) -> torch.nn.Module:
        """The model that is traced."""
        return self._model

    @property
    def config(self) -> TracerConfig:
        """How this tracer records."""
        return self._config

    def flush(self, timeout: float | None = None) -> None:
        """Return when all rows handed over before are committed.

        Args:
            timeout: Seconds; None waits as long as there is progress, at most ``stall_timeout_s`` without.

        Raises:
            TracerClosedError: After ``close()``.
            TraceStallError: The time is over.
            StorageError: The storage has failed for good.
        """
        if timeout is not None:
            timeout = check_seconds(timeout, "timeout")
        if self._closed:
            raise self._closed_error("flush")
        if self._session is not None:
            self._session.flush(timeout)

    def close(self) -> None:
        """Flush, stop recording and take the hooks away; waits at most ``close_timeout_s``. Idempotent.

        Raises:
            StorageError: Rows could not be written.
            TraceStallError: The writer did not finish in time.
        """
        self._closed = True
        if self._session is None or self._session.closed:
            return
        self._hooks.remove()
        self._finalizer.detach()
        self._session.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *details: object) -> None:
        if exception_type is None:
            self.close()
            return
        # The user's exception is the news; a failure to close comes as a log line.
        self._closed = True
        if self._session is not None:
            self._hooks.remove()
            self._finalizer.detach()
            self._session.close_quietly()

    def stats(self) -> TracerStats:
        """Counters of this tracer; also after ``close()``."""
        return TracerStats() if self._session is None else TracerStats.from_counters(self._session.counters())

    def _require_open(self, what: str) -> None:
        if self._closed:
            raise self._closed_error(what)

    def _closed_error(self, what: str) -> TracerClosedError:
        return TracerClosedError(f"{what} came after close() of this tracer", "make a new tracer")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "disabled" if self._session is None else "open"
        return f"<{type(self).__name__} {self._model_name!r} / {self._version_name!r}, {state}>"


def _release(session: TraceSession, hooks: HookSet) -> None:
    """What happens to a tracer that is dropped without ``close()``."""
    hooks.remove()
    session.close_quietly()
