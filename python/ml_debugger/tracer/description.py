"""Column numbers of a tracer, and the msgpack description of a call (`docs/record_format.md`)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from ml_debugger.errors import AliasNotCapturedError
from ml_debugger.tracer.fields import Field, FieldValue

FEATURE_TABLE = "extracted_feature"
GROUND_TRUTH_TABLE = "ground_truth"

_CACHED_DESCRIPTIONS = 256
_MISSED_HINT = (
    "trace only modules that every forward runs through their __call__ in the calling thread (not skipped by "
    "a branch, not run as .forward(), in a fused path, in another thread, inside of TorchScript, in code "
    "compiled ahead of time, or in a backward)"
)

Capture = tuple[int, str, tuple[int, ...], int]


class CapturedColumn(NamedTuple):
    """Where the last call's values of a column are: capture number, dtype name, shape, CUDA device or -1."""

    capture: int
    dtype: str
    shape: tuple[int, ...]
    device: int


class CallDescription(NamedTuple):
    """The packed description of a call, and what it captured by alias."""

    packed: bytes
    captured: dict[str, CapturedColumn]


class Columns:
    """Which number each column has as a capture, and how calls are described.

    Args:
        aliases: Names of the traced layers, in column order.
        fields: Additional columns of ``extracted_feature``.
        label_fields: Additional columns of ``ground_truth``.
        keep_all_runs: A layer that runs several times fills ``alias``, ``alias.1``, ...; else its last run
            counts.
        obstacles: What is known to keep a layer from running, by alias.
    """

    def __init__(
        self,
        aliases: Sequence[str],
        fields: list[Field],
        label_fields: list[Field],
        *,
        keep_all_runs: bool,
        obstacles: Mapping[str, str] | None = None,
    ) -> None:
        self._aliases = list(aliases)
        self._fields = fields
        self._label_fields = label_fields
        self._keep_all_runs = keep_all_runs
        self._obstacles = obstacles or {}
        self.logits = len(self._aliases)
        self.label = self.logits + 1
        self.input_id = self.logits + 2
        self.first_field = self.logits + 3
        self._runs: dict[str, int] = {}
        self._cache: dict[Hashable, CallDescription] = {}

    def describe(
        self,
        dataset_type: str,
        captures: list[Capture],
        values: list[FieldValue],
        *,
        has_labels: bool,
    ) -> CallDescription:
        """Describe a call.

        Args:
            dataset_type: As given.
            captures: What the core holds: hooks, logits, labels, and ids that are integers. Ids that are text
                follow.
            values: Additional fields (and label fields, if there are labels), whose captures follow behind
                the ids.
            has_labels: Whether the call has ground truth.

        Raises:
            AliasNotCapturedError: A layer did not run, or another number of times than in the calls before.
        """
        signature = (
            tuple([(v.dtype, v.shape, v.broadcast, v.shapes is None) for v in values]) if values else ()
        )
        key = (dataset_type, tuple(captures), signature, has_labels)
        known = self._cache.get(key)
        if known is None:
            known = self._build(dataset_type, captures, values, has_labels=has_labels)
            if len(self._cache) >= _CACHED_DESCRIPTIONS:
                self._cache.clear()
            self._cache[key] = known
        return known

    def captured(self, captures: list[Capture]) -> dict[str, CapturedColumn]:
        """What the hooks have captured so far, by column name."""
        found = {}
        for position, alias in enumerate(self._aliases):
            runs = [number for number, capture in enumerate(captures) if capture[0] == position]
            if not self._keep_all_runs:
                runs = runs[-1:]
            for run, number in enumerate(runs):
                found[alias if run == 0 else f"{alias}.{run}"] = CapturedColumn(number, *captures[number][1:])
        return found

    def _build(
        self,
        dataset_type: str,
        captures: list[Capture],
        values: list[FieldValue],
        *,
        has_labels: bool,
    ) -> CallDescription:
        self._check_runs(captures)
        captured = self.captured(captures)
        following = len(captures)
        columns: list[dict[str, Any]] = []
        if all(column != self.input_id for column, _, _, _ in captures):
            columns.append(_column(FEATURE_TABLE, "input_id", "str", following))
            following += 1
        for name, (number, dtype, shape, _) in captured.items():
            columns.append(_tensor(FEATURE_TABLE, name, number, dtype, shape))
        for number, (column, dtype, shape, _) in enumerate(captures):
            if column == self.logits:
                columns.append(_tensor(FEATURE_TABLE, "logits", number, dtype, shape))
            elif column == self.label:
                columns.append(_tensor(GROUND_TRUTH_TABLE, "label", number, dtype, shape))
            elif column == self.input_id:
                columns.append({**_tensor(FEATURE_TABLE, "input_id", number, dtype, shape), "type": "str"})
        owners = [(FEATURE_TABLE, field) for field in self._fields]
        if has_labels:
            owners += [(GROUND_TRUTH_TABLE, field) for field in self._label_fields]
        for (table, field), value in zip(owners, values, strict=True):
            columns.append(_field(table, field, value, following))
            following += 1 if value.shapes is None else 2
        return CallDescription(msgpack.packb({"dataset_type": dataset_type, "columns": columns}), captured)

    def _check_runs(self, captures: list[Capture]) -> None:
        for position, alias in enumerate(self._aliases):
            runs = sum(1 for capture in captures if capture[0] == position)
            if runs == 0:
                raise AliasNotCapturedError(
                    f"the layer {alias!r} did not run in this call",
                    self._obstacles.get(alias) or _MISSED_HINT,
                )
            if self._keep_all_runs and runs != self._runs.setdefault(alias, runs):
                raise AliasNotCapturedError(
                    f"the layer {alias!r} ran {runs} times in this call and {self._runs[alias]} before; "
                    'repeat="all" expects as many runs in every call',
                    'use TracerConfig(repeat="last")',
                )


def _column(table: str, name: str, kind: str, capture: int) -> dict[str, Any]:
    return {"table": table, "name": name, "type": kind, "capture": capture}


def _tensor(table: str, name: str, capture: int, dtype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {**_column(table, name, "tensor", capture), "dtype": dtype, "shape": list(shape)}


def _field(table: str, field: Field, value: FieldValue, capture: int) -> dict[str, Any]:
    column = _column(table, field.name, field.type, capture)
    if value.dtype is not None:
        column["dtype"] = value.dtype
        column["shape"] = None if value.shape is None else list(value.shape)
    if value.shapes is not None:
        column["shapes"] = capture + 1
    if value.broadcast:
        column["broadcast"] = True
    return column
