"""One call of a tracer: what it was given, checked, and what it has captured."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

import torch

from ml_debugger.errors import InvalidInputError
from ml_debugger.tracer.description import CapturedColumn
from ml_debugger.tracer.fields import Field, FieldValue
from ml_debugger.tracer.inputs import Ids
from ml_debugger.tracer.outputs import CallState

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
        input_ids: As given.
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
        self, input_ids: Any, ids: Ids, rows: list[int] | None, dataset_type: str, epoch: int
    ) -> None:
        self.input_ids = input_ids
        self.ids = ids
        self.rows = rows
        self.batch_size = len(ids)
        self.dataset_type = dataset_type
        self.epoch = epoch
        self.values: list[FieldValue] | None = None
        self.labels: torch.Tensor | None = None
        self.ground_truth: Any = None
        self.keywords: dict[str, Any] = {}
        self.description: bytes | None = None
        self.stored_rows = len(ids) if rows is None else len(rows)
        self.ground_truth_rows = 0

    def own_values(self) -> None:
        """Copy what may still be the caller's memory: it is stored after the forward, which may change it."""
        if self.values is not None:
            self.values = [
                value if isinstance(value.payload, bytes) else value._replace(payload=value.payload.clone())
                for value in self.values
            ]


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
