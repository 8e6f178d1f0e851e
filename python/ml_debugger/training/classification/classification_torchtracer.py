"""`ClassificationTracer`: records what a classifier computes during training."""

from __future__ import annotations

from ml_debugger.tracer.classification.classification_torchtracer import ClassificationTorchTracer
from ml_debugger.training.training_tracer import TrainingTracer

__all__ = ["ClassificationTracer", "ClassificationTrainingTorchTracer"]


class ClassificationTrainingTorchTracer(TrainingTracer, ClassificationTorchTracer):
    """Records layer outputs, logits and labels of every sample while a classifier is trained.

    Wrap the model, call the tracer in place of it, and close it at the end::

        with ClassificationTracer(model, "resnet18", "v1", {"features": "avgpool"}) as tracer:
            for images, labels, ids in loader:
                logits = tracer(images, labels, ids, dataset_type="train", n_epoch=epoch)

    Args:
        model: Any ``torch.nn.Module``, plain or wrapped. It is watched by hooks and otherwise left alone.
        model_name: Names the trace, with ``version_name``: any non-empty text.
        version_name: See ``model_name``. The same pair with another architecture is refused.
        target_layers: ``{alias: path}``, paths as ``model.named_modules()`` spells them, ``""`` for the
            model itself. A path may end in ``[0]``, ``[-1]`` or ``["key"]``, also several, to pick from
            an output that is no tensor: ``"lstm[1][0]"``. None finds the classification head at the first
            call and records its input as ``features``.
        additional_fields: Extra columns of ``extracted_feature``: ``[{"name": "camera", "type":
            "str"}]``. Types: ``int`` (64 bit), ``float``, ``bool``, ``str``, ``bytes``, ``tensor`` (which
            may fix ``"dtype"`` and ``"shape"``); a ``"default"`` makes one optional. Values come as
            keywords of the call.
        additional_label_fields: The same for ``ground_truth``; ignored in calls without labels.
        auto_sync: Upload in the background; needs an endpoint. Default False.
        force_table_recreate: Start from empty tables; takes a new architecture and new fields too.
            Default False.
        api_endpoint: Where `upload` goes: a URL, or a folder. Default ``MLD_API_ENDPOINT``.
        api_key: The key it shows. Default ``MLD_API_KEY``. Never printed, logged or stored.
        config: How to record. Default ``TracerConfig()``.

    Raises:
        InvalidInputError: A bad name or field, or the trace has other ones.
        InvalidTypeError: An argument of the wrong type.
        LayerNotFoundError: A path names no module; the message has the closest ones.
        ArchitectureMismatchError: The trace belongs to another architecture.
        TraceInUseError: Another process writes to the trace.
        StorageError: The trace's directory cannot be written.
    """


ClassificationTracer = ClassificationTrainingTorchTracer
