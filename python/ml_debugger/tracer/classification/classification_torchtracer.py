"""`ClassificationTorchTracer`: what the output of a classifier means."""

from __future__ import annotations

from typing import Any

import torch

from ml_debugger.errors import InvalidInputError
from ml_debugger.tracer.outputs import find_logits, is_plain_batch, iterate_tensors, plain_tensor
from ml_debugger.tracer.torch_tracer import TorchTracer

__all__ = ["ClassificationTorchTracer"]

_PLAIN_HINT = (
    "make it dense in the model, or hand a changed model_output on from _parse_and_save_io_data: t -> {call}"
)


class ClassificationTorchTracer(TorchTracer):
    """Records ``logits`` too: the model's output itself, or its ``logits``. Arguments as `TorchTracer`."""

    def _parse_output(self, model_output: Any, batch_size: int) -> torch.Tensor:
        if self._logits_dim == 0 and is_plain_batch(model_output, batch_size):
            output: torch.Tensor = model_output
            return output  # nothing to look for: by far the most outputs
        logits = find_logits(model_output, batch_size, self._logits_dim)
        if logits is None:
            tensors = [tensor for tensor in iterate_tensors(model_output) if not tensor.is_nested]
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            found = shapes or f"no tensor ({type(model_output).__name__})"
            raise InvalidInputError(
                f"the model returned {found}, expected {batch_size} samples (one for each input id) along "
                f"dimension {self._logits_dim}",
                "give one id a sample, or hand a changed model_output on from _parse_and_save_io_data",
            )
        logits = plain_tensor(logits, "the model's output", _PLAIN_HINT)
        return logits.movedim(self._logits_dim, 0).contiguous() if self._logits_dim else logits
