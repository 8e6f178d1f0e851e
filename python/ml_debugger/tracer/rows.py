"""Hands the rows of one call over to the core, and turns what the core gives back into tensors again."""

from __future__ import annotations

import msgpack
import torch

from ml_debugger import _core
from ml_debugger.tracer.call import TracedCall
from ml_debugger.tracer.description import CallDescription, CapturedColumn, Columns
from ml_debugger.tracer.fields import FieldValue
from ml_debugger.tracer.inputs import Ids
from ml_debugger.tracer.outputs import select_rows

_pack = msgpack.packb


class RowWriter:
    """Copies everything of a call but what the hooks have captured already.

    Args:
        recorder: Takes the bytes.
        columns: Numbers and describes them.
    """

    def __init__(self, recorder: _core.Recorder, columns: Columns) -> None:
        self._recorder = recorder
        self._columns = columns

    def save(
        self,
        call: TracedCall,
        ids: Ids,
        logits: torch.Tensor | None,
        values: list[FieldValue],
        labels: torch.Tensor | None,
    ) -> CallDescription:
        """Copy the rest of a call and describe all of it.

        Args:
            call: The call.
            ids: Of the rows to store.
            logits: Of all samples, along dimension 0; None stores no such column.
            values: Additional fields, and label fields if there are labels.
            labels: Of all samples; None for none.

        Raises:
            AliasNotCapturedError: A traced layer did not run.
        """
        recorder, columns = self._recorder, self._columns
        if logits is not None:
            recorder.capture(columns.logits, select_rows(logits, call.rows))
        if labels is not None:
            recorder.capture(columns.label, select_rows(labels, call.rows))
        if isinstance(ids, torch.Tensor):
            recorder.capture(columns.input_id, ids)
        # The core lists buffers as bytes; only we know what they are, so they follow what it describes.
        description = columns.describe(
            call.dataset_type, recorder.captures(), values, has_labels=labels is not None
        )
        if not isinstance(ids, torch.Tensor):
            recorder.capture_buffer(columns.input_id, _pack(ids))
        for column, value in enumerate(values, columns.first_field):
            self._save_value(column, value)
        return description

    def _save_value(self, column: int, value: FieldValue) -> None:
        if isinstance(value.payload, bytes):
            self._recorder.capture_buffer(column, value.payload)
        else:
            self._recorder.capture(column, value.payload)
        if value.shapes is not None:
            self._recorder.capture_buffer(column, value.shapes.data)


def tensor_from_bytes(data: bytearray, column: CapturedColumn) -> torch.Tensor:
    """A tensor of what the core gives back of a column, on the device where the layer's output lay."""
    dtype: torch.dtype = getattr(torch, column.dtype)
    device = torch.device("cpu") if column.device < 0 else torch.device("cuda", column.device)
    if not data:
        return torch.empty(column.shape, dtype=dtype, device=device)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(column.shape).to(device)
