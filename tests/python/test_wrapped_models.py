"""Models that are wrapped, scripted, exported or symbolically traced: recorded right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger.errors import AliasNotCapturedError, LayerNotFoundError
from ml_debugger.tracer.fingerprint import fingerprint
from ml_debugger.training import ClassificationTracer
from plain_net import BATCH, IDS, Net, rows, stored

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, 4)


# Wrappers


@pytest.mark.parametrize("path", ["body", "module.body", "module.body.1", "body.1", "_orig_mod.module.body"])
def test_data_parallel_on_a_cpu_passes_through(path: str, trace: Any, x: torch.Tensor) -> None:
    model = Net().eval()
    tracer = trace(nn.DataParallel(model), {"hidden": path})
    output = tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["hidden"], model.body(x))
    assert torch.equal(output, model(x))


def test_the_head_of_a_data_parallel_model_is_found(trace: Any, x: torch.Tensor) -> None:
    model = Net().eval()
    tracer = trace(nn.DataParallel(model), None)
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["features"], model.body(x).relu())


def test_one_trace_takes_a_model_under_one_wrapper_after_another(trace: Any, x: torch.Tensor) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for wrap in (lambda model: model, nn.DataParallel, checkpoint_wrapper):
        tracer = trace(wrap(Net()), {"hidden": "module.body"})
        tracer(x, None, IDS)
        tracer.close()
    tracer = trace(Net(), {"hidden": "_checkpoint_wrapped_module.body"})
    assert rows(tracer) == 3 * BATCH


# Scripted, exported and symbolically traced models


@pytest.fixture(params=["script", "trace"])
def compiled(request: pytest.FixtureRequest, x: torch.Tensor) -> torch.jit.ScriptModule:
    return torch.jit.script(Net()) if request.param == "script" else torch.jit.trace(Net().eval(), x)


IGNORED = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")


@IGNORED
@pytest.mark.parametrize("path", ["body", "body.0", "act", ""])
def test_a_layer_of_a_script_module_is_refused_with_the_cause(path: str, compiled: nn.Module) -> None:
    with pytest.raises(LayerNotFoundError, match=r"'hidden'.*ScriptModule") as caught:
        ClassificationTracer(compiled, "net", "v1", {"hidden": path})
    assert "before torch.jit.script" in caught.value.hint


@IGNORED
def test_the_logits_of_a_script_module_are_recorded(compiled: nn.Module, trace: Any, x: torch.Tensor) -> None:
    tracer = trace(compiled.eval(), {})
    output = tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["logits"], output)


@IGNORED
def test_a_scripted_model_has_the_fingerprint_of_the_plain_one(compiled: nn.Module) -> None:
    assert fingerprint(compiled) == fingerprint(Net())


@IGNORED
@pytest.mark.parametrize("layers", [{"features": "act"}, None], ids=["act", "head"])
def test_a_script_module_inside_of_a_model_leaves_the_others_to_be_traced(
    layers: Any, trace: Any, x: torch.Tensor
) -> None:
    model = Net().eval()
    expected = model.act(model.body(x))
    model.body = torch.jit.script(model.body)
    tracer = trace(model, layers)
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["features"], expected)


@IGNORED
def test_scripting_a_traced_model_says_what_to_do_and_works_after_close(trace: Any, x: torch.Tensor) -> None:
    model = Net().eval()
    tracer = trace(model, {"hidden": "body"})
    with pytest.raises(AttributeError, match=r"close\(\)"):
        torch.jit.script(model)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    tracer.close()
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("path", ["body", "act", "body.0"])
def test_a_layer_of_an_exported_module_is_refused_with_the_cause(
    path: str, trace: Any, x: torch.Tensor
) -> None:
    exported = torch.export.export(Net().eval(), (x,))
    with pytest.raises(
        (AliasNotCapturedError, LayerNotFoundError), match=r"'hidden'.*torch\.export"
    ) as caught:
        trace(exported.module(), {"hidden": path})(x, None, IDS)
    assert "unflatten" in caught.value.hint


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_an_unflattened_exported_model_and_the_logits_of_a_flat_one_are_recorded(
    trace: Any, x: torch.Tensor
) -> None:
    model = Net().eval()
    exported = torch.export.export(model, (x,))
    tracer = trace(torch.export.unflatten(exported), {"hidden": "body", "deep": "body.0"})
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["hidden"], model.body(x))
    assert torch.equal(stored(tracer)["deep"], model.body[0](x))
    flat = trace(exported.module(), {"all": ""}, "flat")
    flat(x, None, IDS)
    assert torch.equal(stored(flat, "flat")["all"], model(x))


def test_a_symbolically_traced_model_is_a_model(trace: Any, x: torch.Tensor) -> None:
    model = Net().eval()
    tracer = trace(torch.fx.symbolic_trace(model), {"hidden": "body.1"})
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["hidden"], model.body(x))
