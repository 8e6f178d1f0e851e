"""One call of a tracer: what it was given, checked, and what it has captured."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ml_debugger.errors import InvalidInputError, StreamCaptureError
from ml_debugger.tracer.description import CapturedColumn
from ml_debugger.tracer.fields import Field, FieldValue
from ml_debugger.tracer.inputs import Ids, check_dataset_type, check_epoch, id_texts, parse_ids, select_ids
from ml_debugger.tracer.outputs import CallState
from ml_debugger.tracer.sampling import SampleFilter

if TYPE_CHECKING:
    from ml_debugger.tracer.recording import Recording

_PARAMETERS = ("model_input", "ground_truth", "input_ids", "dataset_type", "n_epoch")
# What the call's parameters are called elsewhere, where the spelling does not tell.
_SYNONYMS = {
    **dict.fromkeys(("label", "labels", "target", "targets", "y"), "ground_truth"),
    **dict.fromkeys(("split", "phase", "subset", "stage"), "dataset_type"),
    **dict.fromkeys(("id", "ids", "sample_ids", "indices", "index"), "input_ids"),
    **dict.fromkeys(("x", "input", "inputs"), "model_input"),
}


class ThreadState(CallState):
    """The calling thread's current call and what its last one captured; the block of `recording` it is in."""

    call: TracedCall | None = None
    recording: Recording | None = None
    captured: dict[str, CapturedColumn] | None = None


class TracedCall:
    """A call in progress.

    Attributes:
        ground_truth: As given, as ``input_ids`` and ``keywords``, the values of the additional fields.
        ids: All of them, as they are stored.
        batch_size: How many.
        rows: Positions of the sampled ones; None keeps all.
        dataset_type: As given, checked.
        epoch: The core's epoch, -1 for None.
        values: Additional fields, ready to be copied; None when they were not checked before the forward.
        labels: Ground truth, likewise.
        description: Set when everything is captured; a call without one is forgotten.
        stored_rows: Rows of the call.
        ground_truth_rows: Rows that have a label: 0 or ``stored_rows``.
    """

    __slots__ = (
        "batch_size",
        "dataset_type",
        "description",
        "epoch",
        "ground_truth",
        "ground_truth_rows",
        "ids",
        "input_ids",
        "keywords",
        "labels",
        "rows",
        "stored_rows",
        "values",
    )

    def __init__(
        self,
        ground_truth: Any,
        input_ids: Any,
        dataset_type: Any,
        n_epoch: Any,
        keywords: dict[str, Any],
        sample_filter: SampleFilter | None,
    ) -> None:
        self.ground_truth = ground_truth
        self.input_ids = input_ids
        self.keywords = keywords
        self.ids = parse_ids(input_ids)
        self.rows = None if sample_filter is None else sample_filter.rows(id_texts(self.ids))
        self.dataset_type = check_dataset_type(dataset_type)
        self.epoch = check_epoch(n_epoch)
        self.batch_size = len(self.ids)
        self.stored_rows = self.batch_size if self.rows is None else len(self.rows)
        self.ground_truth_rows = 0
        self.values: list[FieldValue] | None = None
        self.labels: torch.Tensor | None = None
        self.description: bytes | None = None

    def own_values(self) -> None:
        """Copy what may still be the caller's memory: it is stored after the forward, which may change it."""
        if self.values is not None:
            self.values = [
                value if isinstance(value.payload, bytes) else value._replace(payload=value.payload.clone())
                for value in self.values
            ]

    def take_keywords(self, keywords: dict[str, Any]) -> Ids:
        """Take ids, dataset type and epoch out of ``keywords``; a subclass may have changed them."""
        input_ids = keywords.pop("input_ids", self.input_ids)
        ids = self.ids if input_ids is self.input_ids else parse_ids(input_ids)
        if len(ids) != self.batch_size:
            raise InvalidInputError(
                f"there are {len(ids)} input_ids now, {self.batch_size} came with the call",
                "keep one id a sample",
            )
        dataset_type = keywords.pop("dataset_type", self.dataset_type)
        if dataset_type is not self.dataset_type:
            self.dataset_type = check_dataset_type(dataset_type)
        before = None if self.epoch < 0 else self.epoch
        epoch = keywords.pop("n_epoch", before)
        if epoch is not before and check_epoch(epoch) != self.epoch:
            raise InvalidInputError(
                f"n_epoch became {epoch}, the call began with {self.epoch}", "pass it with the call"
            )
        return select_ids(ids, self.rows)


def refuse_stream_capture() -> None:
    """Refuse a call while the current CUDA stream is being captured into a graph.

    Raises:
        StreamCaptureError: It is.
    """
    # Untyped in some versions of torch and not in others.
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    if is_initialized() and torch.cuda.is_current_stream_capturing():
        raise StreamCaptureError(
            "the current CUDA stream is being captured into a graph",
            "call the model itself while capturing, and the tracer outside of it",
        )


def parse_values(fields: list[Field], keywords: dict[str, Any], call: TracedCall) -> list[FieldValue]:
    """Values of additional fields in a call, in the order of the fields.

    Raises:
        InvalidInputError: A field without default is missing; or as `Field.parse`.
        InvalidTypeError: As `Field.parse`.
    """
    values = []
    for field in fields:
        if field.name in keywords:
            values.append(field.parse(keywords[field.name], call.batch_size, call.rows))
        elif field.default is not None:
            values.append(field.default)
        else:
            raise InvalidInputError(
                f"the call lacks the additional field {field.name!r} of type {field.type!r}",
                f'pass {field.name}=... with the call, or give the field a "default"',
            )
    return values


def check_keywords(known: frozenset[str], keywords: dict[str, Any]) -> None:
    """Refuse keywords that no field takes.

    Raises:
        InvalidInputError: Names them, the fields that there are, and what was probably meant.
    """
    unknown = [name for name in keywords if name not in known]
    if unknown:
        raise InvalidInputError(
            f"unknown keyword {', '.join(map(repr, unknown))} in the call; additional fields are "
            f"{', '.join(map(repr, sorted(known))) or 'none'}",
            _meant(unknown[0], known) + "declare it in additional_fields or additional_label_fields",
        )


def _meant(keyword: str, known: frozenset[str]) -> str:
    """The start of a hint: what a misspelt keyword of the call probably stands for."""
    close = difflib.get_close_matches(keyword, [*_PARAMETERS, *sorted(known)], n=1)
    name = close[0] if close else _SYNONYMS.get(keyword.lower())
    return f"did you mean {name!r}? Otherwise " if name else ""
