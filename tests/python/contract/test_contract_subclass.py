"""Contract 3: _parse_and_save_io_data is the override point; get_hooked_features gives what the last call
captured."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from contract_models import (
    Carrier,
    Net,
    batch,
    by_id,
    carrier_tracer,
    carry,
    nothing_visible,
    random_bits,
    raw_bytes,
    refused,
    rows_of,
)

from ml_debugger import TracerConfig, errors, open_trace
from ml_debugger.training import ClassificationTracer


class Spy(ClassificationTracer):
    """Keeps what the override point was given."""

    def _parse_and_save_io_data(
        self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
    ) -> Any:
        self.seen = (model_input, model_output, ground_truth, kwargs)
        self.inside = self.get_hooked_features("hidden")
        return super()._parse_and_save_io_data(model_input, model_output, ground_truth, **kwargs)


def test_the_override_point_gets_the_calls_values(make_tracer: Any) -> None:
    tracer = make_tracer(cls=Spy, additional_fields=[{"name": "camera", "type": "str"}])
    x, y, ids = batch(3)
    output = tracer(x, y, ids, "val", 5, camera="left")
    model_input, model_output, ground_truth, kwargs = tracer.seen
    assert model_input is x and model_output is output and ground_truth is y
    assert kwargs["input_ids"] is ids
    assert {k: kwargs[k] for k in ("dataset_type", "n_epoch", "camera")} == {
        "dataset_type": "val",
        "n_epoch": 5,
        "camera": "left",
    }


def test_a_subclass_may_take_keywords_out(make_tracer: Any) -> None:
    class Takes(ClassificationTracer):
        def _parse_and_save_io_data(
            self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
        ) -> Any:
            self.extra = kwargs.pop("extra")
            return super()._parse_and_save_io_data(model_input, model_output, ground_truth, **kwargs)

    tracer = make_tracer(cls=Takes)
    tracer(*batch(3), extra="mine")
    assert tracer.extra == "mine"
    nothing_visible(tracer, rows=3)


def test_only_the_base_class_refuses_unknown_keywords(make_tracer: Any) -> None:
    tracer = make_tracer(cls=Spy)
    with refused(TypeError, ValueError):
        tracer(*batch(3), extra="mine")
    assert tracer.seen[3]["extra"] == "mine"
    nothing_visible(tracer)


def test_a_subclass_may_hand_a_changed_output_on_and_the_user_gets_the_raw_one(make_tracer: Any) -> None:
    class Changes(ClassificationTracer):
        def _parse_and_save_io_data(
            self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
        ) -> Any:
            changed = model_output["raw"] * 2
            return super()._parse_and_save_io_data(model_input, changed, ground_truth, **kwargs)

    class Odd(Net):
        def forward(self, x: torch.Tensor) -> Any:
            self.last = {"raw": super().forward(x)}
            return self.last

    model = Odd()
    tracer = make_tracer(model, cls=Changes, layers={"hidden": "body"})
    x, y, ids = batch(3)
    output = tracer(x, y, ids)
    assert output is model.last
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "logits")
    assert torch.equal(torch.stack([stored[i] for i in ids]), output["raw"].detach() * 2)


def test_exceptions_from_parsing_reach_the_caller_and_nothing_is_stored(make_tracer: Any) -> None:
    error = RuntimeError("mine")

    class Fails(ClassificationTracer):
        fail = True

        def _parse_and_save_io_data(
            self, model_input: Any, model_output: Any, ground_truth: Any, **kwargs: Any
        ) -> Any:
            if self.fail:
                raise error
            return super()._parse_and_save_io_data(model_input, model_output, ground_truth, **kwargs)

    tracer = make_tracer(cls=Fails)
    with pytest.raises(RuntimeError) as caught:
        tracer(*batch(3))
    assert caught.value is error
    nothing_visible(tracer)
    tracer.fail = False
    tracer(*batch(3))
    nothing_visible(tracer, rows=3)


def test_hooked_features_equal_what_is_stored_also_after_in_place_ops(make_tracer: Any) -> None:
    model = Net(16)
    tracer = make_tracer(model, layers={"before": "body", "after": "act"})
    x, y, ids = batch(8)
    tracer(x, y, ids)
    seen = {name: tracer.get_hooked_features(name) for name in ("before", "after")}
    tracer.flush()
    data = open_trace("net", "v1").tensors("extracted_feature")
    for name, value in seen.items():
        stored = by_id(data, name)
        assert raw_bytes(value) == b"".join(raw_bytes(stored[i]) for i in ids)
    assert (seen["before"] < 0).any() and not (seen["after"] < 0).any()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e5m2, torch.bool, torch.int16, torch.complex64]
)
def test_hooked_features_have_dtype_shape_and_device_of_the_capture(
    dtype: torch.dtype, make_tracer: Any
) -> None:
    tracer = carrier_tracer(make_tracer)
    payload = random_bits(dtype, 4, 6)
    carry(tracer, payload, list("abcd"))
    value = tracer.get_hooked_features("tap")
    assert (value.dtype, value.shape, value.device) == (dtype, payload.shape, payload.device)
    assert raw_bytes(value) == raw_bytes(payload)


def test_hooked_features_work_inside_the_override_point(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, cls=Spy, layers={"hidden": "body"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    assert torch.equal(tracer.inside, model.body(x).detach())


def test_hooked_features_are_those_of_the_last_call(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer)
    for i in range(4):
        carry(tracer, torch.full((2, 3), float(i)), ["a", "b"])
        assert float(tracer.get_hooked_features("tap")[0, 0]) == i
    tracer.flush()
    assert float(tracer.get_hooked_features("tap")[0, 0]) == 3


def test_hooked_features_are_a_copy(make_tracer: Any) -> None:
    tracer = carrier_tracer(make_tracer)
    carry(tracer, torch.ones(2, 3), ["a", "b"])
    tracer.get_hooked_features("tap").zero_()
    assert float(tracer.get_hooked_features("tap").sum()) == 6
    tracer.flush()
    assert float(open_trace("net", "v1").arrays("extracted_feature")["tap"].sum()) == 6


def test_no_tensor_of_the_user_is_kept_alive_after_the_call(make_tracer: Any) -> None:
    model = Carrier()
    kept: list[weakref.ref[torch.Tensor]] = []
    model.taps["of_tap"].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    model.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    tracer = make_tracer(model, layers={"tap": "taps.of_tap"})
    inputs = {"x": torch.zeros(2, 2), "tap": torch.ones(2, 3)}
    truth = torch.zeros(2, dtype=torch.int64)
    kept.append(weakref.ref(truth))
    output = tracer(inputs, truth, ["a", "b"])
    assert [r() is not None for r in kept].count(True) >= 1
    del output, inputs, truth
    gc.collect()
    assert len(kept) == 3 and all(r() is None for r in kept)
    assert float(tracer.get_hooked_features("tap").sum()) == 6


def test_key_error_if_nothing_was_captured(make_tracer: Any) -> None:
    tracer = make_tracer()
    with refused(KeyError):
        tracer.get_hooked_features("hidden")
    tracer(*batch(2))
    with refused(KeyError) as caught:
        tracer.get_hooked_features("hiden")
    assert "hiden" in str(caught.value)


def test_key_error_if_sampling_left_the_call_out(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(every_n_calls=2))
    tracer(*batch(2))
    assert tracer.get_hooked_features("hidden").shape == (2, 6)
    tracer(*batch(2))
    with refused(KeyError):
        tracer.get_hooked_features("hidden")


def test_key_error_if_sample_fraction_left_every_sample_of_the_call_out(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(sample_fraction=0.2))
    kept = 0
    for i in range(60):
        tracer(torch.zeros(1, 4), None, [i])
        tracer.flush()
        if rows_of() > kept:
            kept += 1
            assert tracer.get_hooked_features("hidden").shape == (1, 6)
        else:
            with refused(KeyError):
                tracer.get_hooked_features("hidden")
    assert 0 < kept < 60


def test_key_error_after_a_call_whose_forward_failed(make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(2))
    with pytest.raises(RuntimeError):
        tracer(torch.zeros(2, 5), None, ["a", "b"])
    with refused(KeyError):
        tracer.get_hooked_features("hidden")
    nothing_visible(tracer, rows=2)


def test_with_sample_fraction_hooked_features_are_the_kept_samples(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"}, config=TracerConfig(sample_fraction=0.5))
    x, y, ids = batch(64)
    tracer(x, y, ids)
    seen = tracer.get_hooked_features("hidden")
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "hidden")
    assert raw_bytes(seen) == b"".join(raw_bytes(stored[i]) for i in ids if i in stored)
    assert len(seen) == rows_of() > 0


def test_reduced_and_cast_features_are_returned_as_stored(make_tracer: Any) -> None:
    config = TracerConfig(reduce={"tap": "mean"}, capture_dtype="float16")
    tracer = carrier_tracer(make_tracer, config=config)
    carry(tracer, torch.randn(2, 3, 4, 4), ["a", "b"])
    value = tracer.get_hooked_features("tap")
    tracer.flush()
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "tap")
    assert value.shape == (2, 3) and value.dtype is torch.float16
    assert raw_bytes(value) == raw_bytes(stored["a"]) + raw_bytes(stored["b"])


def test_every_error_is_one_of_the_family(make_tracer: Any) -> None:
    tracer = make_tracer()
    tracer.close()
    with refused(errors.MlDebuggerError):
        tracer(*batch(1))
