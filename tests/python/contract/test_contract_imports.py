"""Contract 1 and 8: import paths, bases, root names, signatures, the family of errors."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest
import torch
from contract_models import Net, batch, refused, rows_of

import ml_debugger
from ml_debugger import errors
from ml_debugger.training import ClassificationTorchTracer, ClassificationTracer, TrainingTracer

FAMILY = {
    "InvalidInputError": (ValueError,),
    "InvalidTypeError": (TypeError,),
    "LayerNotFoundError": (KeyError,),
    "AliasNotCapturedError": (RuntimeError,),
    "ArchitectureMismatchError": (ValueError,),
    "NotFoundError": (KeyError,),
    "TracerClosedError": (RuntimeError,),
    "TraceInUseError": (RuntimeError,),
    "StorageError": (OSError,),
    "DiskBudgetError": (OSError, "StorageError"),
    "CorruptDataError": (OSError, "StorageError"),
    "RingOverflowError": (RuntimeError,),
    "StreamCaptureError": (RuntimeError,),
    "TraceStallError": (TimeoutError,),
    "UploadError": (OSError,),
    "AuthenticationError": (OSError, "UploadError"),
}


def test_short_import_and_full_path_are_the_same_class() -> None:
    module = importlib.import_module("ml_debugger.training.classification.classification_torchtracer")
    assert module.ClassificationTrainingTorchTracer is ClassificationTracer


def test_bases_stand_in_the_documented_order() -> None:
    assert ClassificationTracer.__bases__ == (TrainingTracer, ClassificationTorchTracer)


def test_classification_torch_tracer_has_a_module_of_its_own() -> None:
    module = importlib.import_module("ml_debugger.tracer.classification.classification_torchtracer")
    assert module.ClassificationTorchTracer is ClassificationTorchTracer


def test_training_tracer_has_a_module_of_its_own() -> None:
    module = importlib.import_module(TrainingTracer.__module__)
    assert module.TrainingTracer is TrainingTracer
    assert TrainingTracer.__module__ not in (
        ClassificationTracer.__module__,
        ClassificationTorchTracer.__module__,
    )


def test_both_bases_are_open_for_subclassing(make_tracer: Any) -> None:
    class Mine(TrainingTracer, ClassificationTorchTracer):
        pass

    tracer = make_tracer(cls=Mine)
    x, y, ids = batch(2)
    tracer(x, y, ids)
    tracer.flush()
    assert rows_of() == 2


@pytest.mark.parametrize(
    "name",
    ["TracerConfig", "TracerStats", "UploadReport", "open_trace", "load_export", "errors", "__version__"],
)
def test_package_root_exports(name: str) -> None:
    assert hasattr(ml_debugger, name)
    if not name.startswith("__"):
        assert name in ml_debugger.__all__


def test_version_is_a_version() -> None:
    assert re.match(r"\d+\.\d+", ml_debugger.__version__)


def test_constructor_signature_is_the_documented_one() -> None:
    parameters = list(inspect.signature(ClassificationTracer).parameters.values())
    names = [p.name for p in parameters]
    assert names == [
        "model",
        "model_name",
        "version_name",
        "target_layers",
        "additional_fields",
        "additional_label_fields",
        "auto_sync",
        "force_table_recreate",
        "api_endpoint",
        "api_key",
        "config",
    ]
    assert [p.default for p in parameters[3:]] == [None, None, None, False, False, None, None, None]
    assert parameters[-1].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters[:-1])


def test_call_signature_is_the_documented_one() -> None:
    parameters = list(inspect.signature(ClassificationTracer.__call__).parameters.values())[1:]
    assert [p.name for p in parameters[:5]] == [
        "model_input",
        "ground_truth",
        "input_ids",
        "dataset_type",
        "n_epoch",
    ]
    assert [p.default for p in parameters[3:5]] == ["train", None]
    assert parameters[5].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize(
    ("method", "names", "defaults"),
    [
        ("flush", ["timeout"], [None]),
        ("export", ["output_path", "n_epoch"], [None, None]),
        ("upload", ["n_epoch"], [None]),
        ("wait_for_save", ["n_epoch", "interval"], [None, 3]),
    ],
)
def test_method_signatures_are_the_documented_ones(
    method: str, names: list[str], defaults: list[Any]
) -> None:
    signature = inspect.signature(getattr(ClassificationTracer, method))
    parameters = list(signature.parameters.values())[1:]
    assert [p.name for p in parameters[: len(names)]] == names
    assert [p.default for p in parameters[: len(names)]] == defaults


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("export", {"format": "npy", "dedupe": True}),
        ("upload", {"force": False}),
        ("wait_for_save", {"force": False}),
        ("drop_epoch_data", {"attempt": None}),
    ],
)
def test_extras_are_keyword_only(method: str, keywords: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(ClassificationTracer, method)).parameters
    for name, default in keywords.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_every_error_has_its_builtin_as_second_base(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.MlDebuggerError)
    builtin, *parents = FAMILY[name]
    if parents:
        assert kind.__bases__ == (getattr(errors, parents[0]),) and issubclass(kind, builtin)
    else:
        assert kind.__bases__ == (errors.MlDebuggerError, builtin)


def test_errors_carry_a_hint_and_readable_text() -> None:
    with refused(errors.NotFoundError) as caught:
        ml_debugger.open_trace("never", "recorded")
    assert isinstance(caught.value.hint, str) and caught.value.hint
    assert "never" in str(caught.value)
    assert not str(caught.value).startswith(("'", '"')), "KeyError's repr must not swallow the message"


def test_messages_say_expected_actual_and_remedy(make_tracer: Any) -> None:
    tracer = make_tracer()
    x, y, ids = batch(4)
    with refused(errors.InvalidInputError) as caught:
        tracer(x, y, ids[:3])
    text = str(caught.value)
    assert "4" in text and "3" in text and "input_ids" in text


def test_tracing_leaves_no_gradient_or_dtype_default_behind(make_tracer: Any) -> None:
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    tracer = make_tracer(Net(), layers={"hidden": "body"})
    tracer(*batch(2))
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()) == before
