"""Models that are wrapped, scripted, exported, copied, watched by others: recorded right, or refused."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import AliasNotCapturedError, InvalidInputError, LayerNotFoundError
from ml_debugger.tracer.fingerprint import fingerprint
from ml_debugger.training import ClassificationTracer

BATCH = 4
IDS = list(range(BATCH))

pytestmark = pytest.mark.usefixtures("data_dir")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body(x)))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(BATCH, 4)


@pytest.fixture
def trace() -> Iterator[Callable[..., ClassificationTracer]]:
    """Makes tracers and closes them."""
    made = []

    def factory(
        model: nn.Module, layers: Mapping[str, str] | None, version: str = "v1", **options: Any
    ) -> ClassificationTracer:
        config = TracerConfig(durability="process", **options)
        made.append(ClassificationTracer(model, "net", version, layers, config=config))
        return made[-1]

    yield factory
    for tracer in made:
        tracer.close()


def stored(tracer: ClassificationTracer, version: str = "v1") -> dict[str, Any]:
    tracer.flush()
    return open_trace("net", version).tensors("extracted_feature")


def rows(tracer: ClassificationTracer, version: str = "v1") -> int:
    tracer.flush()
    return open_trace("net", version).num_rows("extracted_feature")


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


# What keeps a layer from running


class Direct(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.body.forward(x)))


class Branch(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x) if x[0, 0] > 0 else torch.zeros(len(x), 6)
        return self.head(self.act(hidden))


class InThread(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(self.body(x)))
        thread.start()
        thread.join()
        return self.head(self.act(results[0]))


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleDict({"main": nn.Linear(4, 3), "aux": nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        self.aux = self.heads["aux"](x)
        return self.heads["main"](x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.attend(x[:, None], x[:, None], x[:, None])[0]
        return self.head(self.seen[:, 0])


@pytest.mark.parametrize(
    ("model", "path", "named"),
    [
        (Direct(), "body", ".forward()"),
        (InThread(), "body", "thread"),
        (Lists(), "blocks", "'blocks.0'"),
        (Lists(), "blocks[2]", "'blocks.2'"),
        (Lists(), 'heads["aux"]', "'heads.aux'"),
        (Attention(), "attend.out_proj", "'attend' itself"),
    ],
    ids=["forward", "thread", "list", "list[2]", "dict", "attention"],
)
def test_a_layer_that_does_not_run_is_refused_by_alias_with_the_likely_cause(
    model: nn.Module, path: str, named: str, trace: Any, x: torch.Tensor
) -> None:
    tracer = trace(model, {"hidden": path})
    with pytest.raises(AliasNotCapturedError, match="'hidden'") as caught:
        tracer(x, torch.zeros(BATCH), IDS)
    assert named in caught.value.hint
    assert rows(tracer) == 0
    assert tracer.stats().rows_submitted == 0


def test_a_layer_that_some_calls_skip_is_an_error_in_those_calls_alone(trace: Any) -> None:
    tracer = trace(Branch(), {"hidden": "body"})
    run, skip = torch.ones(BATCH, 4), -torch.ones(BATCH, 4)
    tracer(run, None, IDS)
    with pytest.raises(AliasNotCapturedError, match="'hidden'"):
        tracer(skip, None, IDS)
    tracer(run, None, IDS)
    assert rows(tracer) == 2 * BATCH


def test_layers_inside_of_lists_and_dicts_and_attention_itself_are_recorded(
    trace: Any, x: torch.Tensor
) -> None:
    model = Lists()
    tracer = trace(model, {"second": "blocks.1", "aux": "heads.aux"})
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["second"], model.blocks[1](model.blocks[0](x)))
    assert torch.equal(stored(tracer)["aux"], model.aux)
    attention = Attention()
    tracer = trace(attention, {"attend": "attend"}, "attention")
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer, "attention")["attend"], attention.seen)


@pytest.mark.parametrize(
    ("keyword", "meant"),
    [
        ("epoch", "n_epoch"),
        ("n_epochs", "n_epoch"),
        ("dataset", "dataset_type"),
        ("split", "dataset_type"),
        ("labels", "ground_truth"),
        ("ids", "input_ids"),
        ("camra", "camera"),
    ],
)
def test_a_misspelt_keyword_of_the_call_names_what_was_meant(
    keyword: str, meant: str, x: torch.Tensor
) -> None:
    fields = [{"name": "camera", "type": "str", "default": "none"}]
    with ClassificationTracer(Net(), "net", "v1", {}, fields) as tracer:
        with pytest.raises(InvalidInputError, match=f"'{keyword}'") as caught:
            tracer(x, None, IDS, **{keyword: 3})
        assert f"did you mean {meant!r}" in caught.value.hint
        with pytest.raises(InvalidInputError, match="'zzz'") as caught:
            tracer(x, None, IDS, zzz=3)
        assert "did you mean" not in caught.value.hint


# Copies


@pytest.mark.parametrize("layers", [{"hidden": "body"}, None], ids=["layers", "head"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "averaged"])
def test_a_copy_computes_the_same_and_records_nothing_even_within_a_call(
    how: str, layers: Any, trace: Any, x: torch.Tensor
) -> None:
    class Student(Net):
        teacher: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.teacher:
                self.teacher[0](2 * x)
            return super().forward(x)

    model = Student().eval()
    tracer = trace(model, layers)
    tracer(x, None, IDS)  # hooks of the head are there from now on
    if how == "pickle":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "Student", Student, raising=False)
            Student.__qualname__ = "Student"
            twin = pickle.loads(pickle.dumps(model))
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else AveragedModel(model)
    model.teacher = [twin]
    assert torch.equal(tracer(x, None, IDS), twin(x))
    found = stored(tracer)
    column = found["hidden" if layers else "features"]
    expected = model.body(x)
    assert torch.equal(column, torch.cat([expected, expected] if layers else [expected.relu()] * 2))


def test_a_saved_model_loads_and_runs_where_the_package_is_not_installed(
    trace: Any, x: torch.Tensor, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.ReLU()), nn.Linear(6, 3))
    tracer = trace(model, None)
    hooked = trace(model, {"hidden": "1", "all": ""}, "layers")
    tracer(x, None, IDS)
    hooked(x, None, IDS)
    torch.save({"model": model, "x": x, "expected": model(x)}, tmp_path / "model.pt")
    script = f"""
        import sys
        sys.modules["ml_debugger"] = None  # any import of it fails
        import torch
        saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        assert torch.equal(saved["model"](saved["x"]), saved["expected"])
        assert "ml_debugger._core" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_state_dicts_of_a_traced_model_load_as_weights_only(trace: Any, x: torch.Tensor) -> None:
    model = Net()
    keys = list(model.state_dict())
    tracer = trace(model, {"hidden": "body"})
    tracer(x, None, IDS)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert list(loaded) == keys
    Net().load_state_dict(loaded)


# Other watchers


def test_two_tracers_on_one_model_record_their_own_and_close_alone(trace: Any, x: torch.Tensor) -> None:
    model = Net().eval()
    first, second = trace(model, {"hidden": "body"}, "first"), trace(model, {"hidden": "act"}, "second")
    first(x, None, IDS)
    second(x, None, [10 + number for number in IDS])
    assert torch.equal(stored(first, "first")["hidden"], model.body(x))
    assert torch.equal(stored(second, "second")["hidden"], model.body(x).relu())
    second.close()
    first(x, None, IDS)
    assert rows(first, "first") == 2 * BATCH
    assert open_trace("net", "second").num_rows("extracted_feature") == BATCH
    first.close()
    assert not any(module._forward_hooks for module in model.modules())


def watch(model: nn.Module, log: list[Any]) -> None:
    """Hooks of every kind that torch has, in a certain order, each leaving a line in ``log``."""

    def note(name: str) -> Callable[..., None]:
        return lambda *arguments: log.append((name, len(arguments)))

    for path, module in (("body", model.body), ("act", model.act), ("head", model.head), ("net", model)):
        module.register_forward_pre_hook(note(f"{path} pre"))
        module.register_forward_pre_hook(note(f"{path} pre kwargs"), with_kwargs=True)
        module.register_forward_pre_hook(note(f"{path} pre first"), prepend=True)
        module.register_forward_hook(note(f"{path} post"))
        module.register_forward_hook(note(f"{path} post kwargs"), with_kwargs=True)
        module.register_forward_hook(note(f"{path} post always"), always_call=True)
        module.register_forward_hook(note(f"{path} post first"), prepend=True)
        if path != "act":  # backward hooks and in-place operations do not go together
            module.register_full_backward_pre_hook(note(f"{path} backward pre"))
            module.register_full_backward_hook(note(f"{path} backward"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "layers", [{"a": "body", "b": "act", "c": "head", "d": ""}, None], ids=["layers", "head"]
)
def test_hooks_of_others_fire_in_their_order_and_number(
    layers: Any, when: str, trace: Any, x: torch.Tensor
) -> None:
    def run(traced: bool) -> tuple[list[Any], list[torch.Tensor]]:
        torch.manual_seed(1)
        model, log = Net(), []
        model.act = nn.ReLU()
        given = x.clone().requires_grad_()
        if when == "before":
            watch(model, log)
        tracer = trace(model, layers, when) if traced else None
        if when == "after":
            watch(model, log)
        for _ in range(2):
            output = model(given) if tracer is None else tracer(given, None, IDS)
            output.sum().backward()
        if tracer is not None:
            tracer.close()
        model(given)  # others stay when ours are gone
        return log, [given.grad, *(parameter.grad for parameter in model.parameters())]

    (log, gradients), (plain_log, plain_gradients) = run(True), run(False)
    assert log == plain_log
    assert all(map(torch.equal, gradients, plain_gradients))
    assert len(log) == 3 * 4 * 7 + 2 * 3 * 2


def test_always_called_hooks_run_when_the_forward_raises_and_ours_stores_nothing(
    trace: Any, x: torch.Tensor
) -> None:
    class Failing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            super().forward(x)
            raise LookupError("the user's own")

    model, log = Failing(), []
    model.register_forward_hook(lambda module, args, output: log.append(output), always_call=True)
    tracer = trace(model, {"hidden": "body", "all": ""})
    with pytest.raises(LookupError, match="the user's own"):
        tracer(x, None, IDS)
    assert log == [None]
    assert rows(tracer) == 0


def test_a_layer_called_with_keywords_is_recorded(trace: Any, x: torch.Tensor) -> None:
    class Scale(nn.Module):
        def forward(self, *, values: torch.Tensor, factor: float) -> torch.Tensor:
            return values * factor

    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.scale(values=x, factor=0.5))

    tracer = trace(Model(), {"scaled": "scale"})
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["scaled"], x * 0.5)


def test_a_hook_that_replaces_the_output_before_ours_is_part_of_what_the_layer_returned(
    trace: Any, x: torch.Tensor
) -> None:
    model = Net().eval()
    plain = model.body(x).detach()
    model.body.register_forward_hook(lambda module, args, output: output + 1)
    tracer = trace(model, {"hidden": "body", "next": "act"})
    model.body.register_forward_hook(lambda module, args, output: output * 2)
    tracer(x, None, IDS)
    assert torch.equal(stored(tracer)["hidden"], plain + 1)
    assert torch.equal(stored(tracer)["next"], ((plain + 1) * 2).relu())
