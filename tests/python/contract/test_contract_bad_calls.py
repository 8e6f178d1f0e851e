"""Contract 3 and 8, bad input: each gets the named error, nothing of the call ever becomes visible, the
next call works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, Speaker, batch, nothing_visible, refused, rows_of
from torch import nn

from ml_debugger import TracerConfig, errors

KINDS = (TypeError, ValueError)


def attempt_then_recover(tracer: Any, kinds: Any, *args: Any, **kwargs: Any) -> str:
    """A bad call between two good ones leaves exactly the good ones."""
    tracer(*batch(3, 1))
    with refused(*(kinds if isinstance(kinds, tuple) else (kinds,))) as caught:
        tracer(*args, **kwargs)
    nothing_visible(tracer, rows=3)
    tracer(*batch(3, 2))
    nothing_visible(tracer, rows=6)
    return str(caught.value)


@pytest.mark.parametrize(
    "ids", [["a"], ["a", "b", "c", "d"], [], np.arange(2), torch.arange(4)], ids=range(5)
)
def test_the_number_of_ids_must_be_the_batch_size(ids: Any, make_tracer: Any) -> None:
    x, y, _ = batch(3)
    attempt_then_recover(make_tracer(), errors.InvalidInputError, x, y, ids)


BAD_IDS = {
    "bare str": "abc",
    "bools": [True, False, True],
    "bool array": np.array([True, False, True]),
    "bool tensor": torch.tensor([True, False, True]),
    "floats": [1.0, 2.0, 3.0],
    "float array": np.array([1.0, 2.0, 3.0]),
    "float tensor": torch.tensor([1.0, 2.0, 3.0]),
    "bytes": [b"a", b"b", b"c"],
    "bare bytes": b"abc",
    "one None": ["a", None, "c"],
    "None": None,
    "lone surrogate": ["a", "\ud800", "c"],
    "NUL": ["a", "b\x00", "c"],
    "nested": [["a"], ["b"], ["c"]],
    "two dimensions": torch.zeros(3, 1, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", sorted(BAD_IDS))
def test_refused_ids(kind: str, make_tracer: Any) -> None:
    x, y, _ = batch(3)
    assert "id" in attempt_then_recover(make_tracer(), KINDS, x, y, BAD_IDS[kind])


@pytest.mark.parametrize("epoch", [True, False, 1.0, np.float64(1), "1", np.bool_(True)])
def test_n_epoch_of_another_type_is_refused(epoch: Any, make_tracer: Any) -> None:
    assert "n_epoch" in attempt_then_recover(make_tracer(), errors.InvalidTypeError, *batch(3), n_epoch=epoch)


@pytest.mark.parametrize("epoch", [-1, -7, np.int64(-1)])
def test_a_negative_n_epoch_is_refused(epoch: Any, make_tracer: Any) -> None:
    assert "n_epoch" in attempt_then_recover(
        make_tracer(), errors.InvalidInputError, *batch(3), n_epoch=epoch
    )


@pytest.mark.parametrize("name", [None, 3, b"train", ["train"]])
def test_a_dataset_type_that_is_not_text_is_refused(name: Any, make_tracer: Any) -> None:
    assert "dataset_type" in attempt_then_recover(
        make_tracer(), errors.InvalidTypeError, *batch(3), dataset_type=name
    )


BAD_TRUTH = {
    "too few": torch.zeros(2, dtype=torch.int64),
    "too many": [0, 1, 2, 0],
    "text": ["cat", "dog", "cow"],
    "text array": np.array(["cat", "dog", "cow"]),
    "a scalar": torch.tensor(1),
    "objects": [object(), object(), object()],
}


@pytest.mark.parametrize("kind", sorted(BAD_TRUTH))
def test_ground_truth_of_wrong_length_or_text_is_refused(kind: str, make_tracer: Any) -> None:
    x, _, ids = batch(3)
    assert "ground_truth" in attempt_then_recover(make_tracer(), KINDS, x, BAD_TRUTH[kind], ids)


@pytest.mark.parametrize("wrong", [{"extra": 1}, {"camera": 3}, {}], ids=["unknown", "wrong type", "missing"])
def test_unknown_wrong_or_missing_fields_leave_nothing(wrong: dict[str, Any], make_tracer: Any) -> None:
    tracer = make_tracer(additional_fields=[{"name": "camera", "type": "str"}])
    with refused(*KINDS):
        tracer(*batch(3), **wrong)
    nothing_visible(tracer)
    tracer(*batch(3), camera="left")
    nothing_visible(tracer, rows=3)


class Sometimes(Net):
    """Skips ``extra`` when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 2)
        self.skip = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.skip:
            self.extra(x)
        return super().forward(x)


def test_an_alias_that_does_not_fire_is_named(make_tracer: Any) -> None:
    model = Sometimes()
    tracer = make_tracer(model, layers={"hidden": "body", "additional": "extra"})
    tracer(*batch(3, 1))
    model.skip = True
    with refused(errors.AliasNotCapturedError) as caught:
        tracer(*batch(3, 2))
    assert "additional" in str(caught.value)
    nothing_visible(tracer, rows=3)
    model.skip = False
    tracer(*batch(3, 3))
    nothing_visible(tracer, rows=6)


def test_a_layer_called_by_its_forward_does_not_fire(make_tracer: Any) -> None:
    class Direct(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body.forward(x))

    tracer = make_tracer(Direct(), layers={"hidden": "body"})
    with refused(errors.AliasNotCapturedError) as caught:
        tracer(*batch(3))
    assert "hidden" in str(caught.value)
    nothing_visible(tracer)


NO_BATCH = {
    "transposed": lambda x: x.t(),
    "scalar": lambda x: x.sum(),
    "no tensor": lambda x: ("text", None),
    "none": lambda x: None,
    "twice the batch": lambda x: torch.cat([x, x]),
}


@pytest.mark.parametrize("form", sorted(NO_BATCH))
def test_a_layer_output_without_the_batch_size_is_an_error_that_names_the_alias(
    form: str, make_tracer: Any
) -> None:
    tracer = make_tracer(Speaker(NO_BATCH[form]), layers={"seen": "layer"})
    with refused(*KINDS, RuntimeError) as caught:
        tracer(*batch(3))
    assert "seen" in str(caught.value)
    nothing_visible(tracer)


@pytest.mark.parametrize(
    "make", [lambda z: z.sum(), lambda z: z[:2], lambda z: "text", lambda z: None], ids=range(4)
)
def test_a_model_output_without_the_batch_size_is_an_error(make: Any, make_tracer: Any) -> None:
    class Odd(Net):
        def forward(self, x: torch.Tensor) -> Any:
            return make(super().forward(x))

    tracer = make_tracer(Odd(), layers={"hidden": "body"})
    with refused(*KINDS) as caught:
        tracer(*batch(3))
    assert "3" in str(caught.value)
    nothing_visible(tracer)


def test_a_pick_that_the_output_does_not_have_is_an_error(make_tracer: Any) -> None:
    tracer = make_tracer(Speaker(lambda x: (x, x)), layers={"seen": "layer[5]"})
    with refused(errors.MlDebuggerError) as caught:
        tracer(*batch(3))
    assert "seen" in str(caught.value)
    nothing_visible(tracer)


def test_an_exception_of_the_forward_comes_through_unchanged_and_stores_nothing(make_tracer: Any) -> None:
    class Boom(Exception):
        pass

    boom = Boom("user")

    class Fails(Net):
        fail = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            if self.fail:
                raise boom
            return output

    model = Fails()
    tracer = make_tracer(model, layers={"hidden": "body"})
    tracer(*batch(3, 1))
    model.fail = True
    with pytest.raises(Boom) as caught:
        tracer(*batch(3, 2))
    assert caught.value is boom and boom.__cause__ is None and boom.__context__ is None
    nothing_visible(tracer, rows=3)
    model.fail = False
    tracer(*batch(3, 3))
    nothing_visible(tracer, rows=6)


def test_after_close_calls_flush_and_drops_raise_tracer_closed(make_tracer: Any, tmp_path: Path) -> None:
    tracer = make_tracer()
    tracer(*batch(3), n_epoch=0)
    tracer.close()
    closed = [
        lambda: tracer(*batch(3)),
        tracer.flush,
        lambda: tracer.drop_epoch_data(0),
        tracer.drop_version_data,
    ]
    for action in closed:
        with refused(errors.TracerClosedError):
            action()
    assert rows_of() == 3
    assert tracer.stats().rows_committed == 3
    assert tracer.export(tmp_path / "late.zip").exists()
    with refused(errors.UploadError) as caught:
        tracer.upload()
    assert "api_endpoint" in str(caught.value) or "MLD_API_ENDPOINT" in str(caught.value)


@pytest.mark.parametrize("where", ["below a file", "in proc"])
def test_an_unwritable_store_is_a_storage_error(where: str, make_tracer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "x" if where == "below a file" else Path("/proc/nowhere")
    model = Net()
    with refused(errors.StorageError) as caught:
        make_tracer(model, layers={"hidden": "body"}, config=TracerConfig(data_dir=folder))
    assert str(folder) in str(caught.value)
    assert not model.body._forward_hooks


@pytest.mark.parametrize("model", [None, "net", torch.zeros(3), lambda x: x], ids=range(4))
def test_a_model_that_is_no_module_is_refused(model: Any, store: Path) -> None:
    from ml_debugger.training import ClassificationTracer

    with refused(errors.InvalidTypeError):
        ClassificationTracer(model, "net", "v1", {"hidden": "body"})
    assert not store.exists()


@pytest.mark.parametrize("layers", [["body"], "body", {"hidden": 3}, {3: "body"}], ids=range(4))
def test_target_layers_of_another_type_are_refused(layers: Any, make_tracer: Any, store: Path) -> None:
    with refused(errors.InvalidTypeError):
        make_tracer(Net(), layers=layers)
    assert not store.exists()
