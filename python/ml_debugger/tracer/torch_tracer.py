"""`TorchTracer`: watches a model and records what its layers compute for every sample."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from ml_debugger.config import TracerConfig
from ml_debugger.errors import (
    AliasNotCapturedError,
    InvalidInputError,
    InvalidTypeError,
    NotFoundError,
    TracerClosedError,
)
from ml_debugger.stats import TracerStats
from ml_debugger.store.layout import check_name
from ml_debugger.tracer import compiled
from ml_debugger.tracer.call import ThreadState, TracedCall, check_keywords, refuse_stream_capture
from ml_debugger.tracer.definition import TraceDefinition
from ml_debugger.tracer.head import HEAD_ALIAS, HeadSearch
from ml_debugger.tracer.hooks import warn_about_fused_layers
from ml_debugger.tracer.inputs import check_flag, check_seconds, parse_labels
from ml_debugger.tracer.model_recorder import ModelRecorder
from ml_debugger.tracer.outputs import find_logits, iterate_tensors
from ml_debugger.tracer.recording import Recording
from ml_debugger.tracer.sampling import SampleFilter
from ml_debugger.tracer.session import TraceSession


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
        self._definition = TraceDefinition(
            model, target_layers, additional_fields, additional_label_fields, self._config
        )
        self._state = ThreadState()
        self._closed = False
        self._session: TraceSession | None = None
        self._prepare_calls()
        if self._config.mode == "enabled" and self._config.rank >= 0:
            self._open(force_table_recreate)

    def _prepare_calls(self) -> None:
        config = self._config
        self._every_n_calls = config.every_n_calls
        self._call_numbers = itertools.count()
        self._sample_filter = SampleFilter(config.sample_fraction) if config.sample_fraction < 1 else None
        self._logits_dim = (config.batch_dim or {}).get("logits", 0)
        # A subclass that takes parsing over may read, change or add keywords: then they are checked where
        # they end up.
        self._checks_early = type(self)._parse_and_save_io_data is TorchTracer._parse_and_save_io_data

    def _open(self, recreate: bool) -> None:
        config, definition = self._config, self._definition
        search = None
        if definition.searches_head:
            search = HeadSearch(self._model, self._state, (config.batch_dim or {}).get(HEAD_ALIAS, 0))
        info = definition.version_info(self._model_name, self._version_name)
        warn_about_fused_layers(self._model, definition.layers)
        session = self._session = TraceSession(config, config.rank, info, recreate=recreate)
        self._recorder = ModelRecorder(self._model, definition, session, self._state, search)

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
        dataset_type: Any,
        n_epoch: Any,
        keywords: dict[str, Any],
    ) -> Any:
        call = self._begin("a call", ground_truth, input_ids, dataset_type, n_epoch, keywords)
        if call is None:
            return self._forward(model_input)
        if not call.stored_rows:
            return self._check_output(call, self._forward(model_input))
        if self._recorder.head_search is not None:
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
        self,
        what: str,
        ground_truth: Any,
        input_ids: Any,
        dataset_type: Any,
        n_epoch: Any,
        keywords: dict[str, Any],
    ) -> TracedCall | None:
        """Check what can be checked before the forward; None if the call is left out, unchecked."""
        if self._closed:
            raise self._closed_error(what)
        if self._session is None or self._recorder.core.inert or not self._is_recorded():
            self._state.captured = None
            return None
        refuse_stream_capture()
        self._state.captured = None
        call = TracedCall(ground_truth, input_ids, dataset_type, n_epoch, keywords, self._sample_filter)
        if self._checks_early:
            definition, has_labels = self._definition, ground_truth is not None
            if keywords or definition.names:
                check_keywords(definition.names, keywords)
                call.values = definition.parse_values(keywords, call, has_labels=has_labels)
            if has_labels:
                call.labels = self._parse_labels(ground_truth, call.batch_size)
            call.own_values()
        return call

    def _check_output(self, call: TracedCall, output: Any) -> Any:
        """Judge the output of a call without rows to store, of which nothing else is looked at."""
        if self._checks_early:
            self._parse_output(output, call.batch_size)
        return output

    def _record_first(self, call: TracedCall, model_input: Any) -> Any:
        """Record the call that shows which module is the head; other threads wait for it."""
        recorder = self._recorder
        with recorder.head_lock:
            if recorder.head_search is not None:
                return self._record(call, model_input, recorder.head_search)
        return self._record(call, model_input, None)

    def _record(self, call: TracedCall, model_input: Any, search: HeadSearch | None) -> Any:
        recorder = self._recorder
        try:
            recorder.start(call)
            if search is None:
                output = self._forward(model_input)
            else:
                with search.watching():
                    output = self._forward(model_input)
                self._find_head(search, output, call)
            is_accepted = self._save(call, model_input, output)
        except BaseException as error:
            recorder.abort()
            self._raise_if_closed(error)
            raise
        finally:
            recorder.leave()
        if not is_accepted:
            self._warn_of_failure()
        return output

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
            self._recorder.abort()
            return True
        return self._recorder.core.end_call(call.description, call.stored_rows, call.ground_truth_rows)

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
        self._recorder.adopt_head(search.find(logits))

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
        ids = call.take_keywords(kwargs)
        has_labels = ground_truth is not None
        values, labels = call.values or [], call.labels
        if not self._checks_early:
            check_keywords(self._definition.names, kwargs)
            values = self._definition.parse_values(kwargs, call, has_labels=has_labels)
            labels = self._parse_labels(ground_truth, call.batch_size) if has_labels else None
        logits = self._parse_output(model_output, call.batch_size)
        call.description, self._state.captured = self._recorder.rows.save(call, ids, logits, values, labels)
        call.ground_truth_rows = 0 if labels is None else call.stored_rows

    def _parse_labels(self, ground_truth: Any, batch_size: int) -> torch.Tensor:
        """Check and convert the ground truth of a call; the result shares no memory with it."""
        return parse_labels(ground_truth, batch_size)

    def _parse_output(self, model_output: Any, batch_size: int) -> torch.Tensor | None:
        """The tensor to store as ``logits``, its samples along dimension 0; None records no such column."""
        return None

    # After the call

    def _warn_of_failure(self) -> None:
        self._recorder.warn_of_failure(TorchTracer.__call__.__code__)

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
        captured = {} if self._session is None else self._recorder.captured()
        if not isinstance(layer_name, str) or layer_name not in captured:
            listed = ", ".join(map(repr, captured)) or "nothing"
            raise NotFoundError(
                f"the last call captured nothing for {layer_name!r}; it has {listed}",
                "name an alias of target_layers, after a call that was recorded",
            )
        return self._recorder.read_back(captured[layer_name])

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
        """Return when all rows handed over before are committed, or counted as failed (``on_error="warn"``).

        Args:
            timeout: Seconds; None waits as long as there is progress, at most ``stall_timeout_s`` without.

        Raises:
            TracerClosedError: After ``close()``.
            TraceStallError: The time is over.
            StorageError: The storage has failed for good.
        """
        if timeout is not None:
            timeout = check_seconds(timeout, "timeout")
        self._require_open("flush")
        if self._session is not None:
            self._session.flush(timeout)

    def close(self) -> None:
        """Flush, stop recording and take the hooks away; waits at most ``close_timeout_s``. Idempotent.

        Raises:
            StorageError: Rows could not be written.
            TraceStallError: The writer did not finish in time.
        """
        self._closed = True
        if self._session is not None and not self._session.closed:
            self._recorder.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *details: object) -> None:
        if exception_type is None:
            self.close()
            return
        # The user's exception is the news; a failure to close comes as a log line.
        self._closed = True
        if self._session is not None:
            self._recorder.close_quietly()

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
