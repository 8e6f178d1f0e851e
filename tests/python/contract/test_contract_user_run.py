"""Contract 3: the tracer changes nothing in the user's run: outputs, gradients, RNG, state_dict keys,
train/eval mode, other hooks, deepcopy and pickle, DataLoader; close() takes its hooks away."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, batch, nothing_visible, raw_bytes, rows_of
from torch import nn

from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer


class Rich(nn.Module):
    """Convolution, batch norm, dropout, in-place ops: everything with state or randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.act(self.norm(self.conv(x))).mean((2, 3))))


LAYERS = {"conv": "conv", "norm": "norm", "drop": "drop"}


def train(model: nn.Module, call: Any, steps: int = 6) -> dict[str, bytes]:
    """A short run; everything that it computed, as bytes."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = {}
    for step in range(steps):
        x, y = torch.randn(4, 1, 6, 6), torch.randint(0, 3, (4,))
        output = call(x, y, [f"{step}-{i}" for i in range(4)], n_epoch=step % 2)
        loss = nn.functional.cross_entropy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen[f"output {step}"] = raw_bytes(output)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            seen[f"gradient {step} {name}"] = raw_bytes(parameter.grad)
    seen.update({f"state {name}": raw_bytes(value) for name, value in model.state_dict().items()})
    seen["torch rng"] = raw_bytes(torch.get_rng_state())
    seen["numpy rng"] = np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    seen["python rng"] = repr(random.getstate()).encode()
    return seen


def fresh() -> Rich:
    torch.manual_seed(5)
    return Rich()


@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_state_and_rng_are_bit_identical(training: bool, make_tracer: Any) -> None:
    plain, traced = fresh().train(training), fresh().train(training)
    expected = train(plain, lambda x, y, ids, n_epoch: plain(x))
    tracer = make_tracer(traced, layers=LAYERS, config=TracerConfig(sample_fraction=0.7))
    seen = train(traced, tracer)
    assert list(seen) == list(expected)
    assert [name for name in seen if seen[name] != expected[name]] == []
    assert traced.training is training


def hook_counts(model: nn.Module) -> dict[str, list[int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}


def test_state_dict_keys_modules_and_mode_are_unchanged(make_tracer: Any) -> None:
    model = fresh()
    model.drop.eval()
    keys = list(model.state_dict())
    modes = {name: m.training for name, m in model.named_modules()}
    requires = [p.requires_grad for p in model.parameters()]
    tracer = make_tracer(model, layers=LAYERS)
    for _ in range(2):
        assert list(model.state_dict()) == keys
        assert {name: m.training for name, m in model.named_modules()} == modes
        assert [p.requires_grad for p in model.parameters()] == requires
        tracer(torch.randn(2, 1, 6, 6), None, ["a", "b"])


def test_close_takes_its_hooks_away_and_only_its_own(make_tracer: Any) -> None:
    model = fresh()
    model.conv.register_forward_hook(lambda module, args, output: None)
    before = hook_counts(model)
    tracer = make_tracer(model, layers=LAYERS)
    tracer(torch.randn(2, 1, 6, 6), None, ["a", "b"])
    tracer.close()
    assert hook_counts(model) == before
    tracer.close()
    assert model(torch.randn(2, 1, 6, 6)).shape == (2, 3)


def test_a_failed_construction_leaves_no_hook(make_tracer: Any) -> None:
    model = fresh()
    before = hook_counts(model)
    with pytest.raises(KeyError):
        make_tracer(model, layers={"conv": "conv", "wrong": "nowhere"})
    assert hook_counts(model) == before


def test_hooks_of_others_run_as_before_and_see_the_same_tensors(make_tracer: Any) -> None:
    model = Net()
    order: list[str] = []

    def replace(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        order.append("first")
        return output + 1

    model.body.register_forward_pre_hook(lambda module, args: order.append("pre"))
    model.body.register_forward_hook(replace)
    tracer = make_tracer(model, layers={"hidden": "body"})
    model.body.register_forward_hook(lambda module, args, output: order.append("last"))
    x, y, ids = batch(3)
    expected = model.head(torch.relu(nn.functional.linear(x, model.body.weight, model.body.bias) + 1))
    assert torch.equal(tracer(x, y, ids), expected)
    assert order == ["pre", "first", "last"]
    assert torch.equal(tracer.get_hooked_features("hidden"), (model.body.forward(x) + 1).detach())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_model_work_and_record_nothing(how: str, make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert torch.equal(twin(x), model(x))
    tracer(x, y, [f"{i}'" for i in ids])
    nothing_visible(tracer, rows=6)
    tracer.close()
    assert torch.equal(twin(x), model(x))


def test_a_copy_run_inside_the_traced_forward_is_not_mixed_in(make_tracer: Any) -> None:
    class Teacher(Net):
        twin: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = super().forward(x)
            if self.twin is not None:
                self.twin[0](x * 100)
            return output

    model = Teacher()
    tracer = make_tracer(model, layers={"hidden": "body"})
    model.twin = (copy.deepcopy(model).body,)
    x, y, ids = batch(3)
    tracer(x, y, ids)
    assert torch.equal(tracer.get_hooked_features("hidden"), model.body(x).detach())


def test_leaving_the_fused_transformer_path_is_warned_about(make_tracer: Any, caplog: Any) -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(OrderedDict(encoder=encoder, head=nn.Linear(8, 3))).eval()
    x = torch.randn(3, 5, 8)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        tracer = make_tracer(model, layers={"inner": "encoder.linear1"})
        tracer(x, None, ["a", "b", "c"])
    said = " ".join([*(str(w.message) for w in caught), *(r.getMessage() for r in caplog.records)])
    assert "TransformerEncoder" in said or "fused" in said
    nothing_visible(tracer, rows=3)


def test_averaged_models_and_ema_copies_work(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})
    averaged = torch.optim.swa_utils.AveragedModel(model)
    x, y, ids = batch(3)
    tracer(x, y, ids)
    averaged.update_parameters(model)
    assert averaged(x).shape == (3, 3)
    nothing_visible(tracer, rows=3)


def test_the_graph_is_the_users_own(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "body"})
    x, y, ids = batch(3)
    x.requires_grad_()
    output = tracer(x, y, ids)
    (first,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert first.shape == x.shape
    assert output.grad_fn is not None and type(output.grad_fn).__name__ == "AddmmBackward0"


def test_a_data_loader_with_workers_over_the_traced_run_is_unharmed(run_child: Any, store: Any) -> None:
    run_child(
        """
        from contract_models import Net
        from ml_debugger.training import ClassificationTracer

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 64
            def __getitem__(self, i):
                return torch.full((4,), float(i)), i % 3, i

        tracer = ClassificationTracer(Net(), "net", "v1", {"hidden": "body"})
        for epoch in range(2):
            loader = torch.utils.data.DataLoader(Data(), batch_size=8, num_workers=2, shuffle=True)
            for x, y, ids in loader:
                tracer(x, y, ids, n_epoch=epoch)
        tracer.close()
        assert tracer.stats().rows_committed == 128
        """
    )
    assert rows_of() == 128


def test_an_uncollected_tracer_does_not_keep_the_model_alive_after_close() -> None:
    import gc
    import weakref

    model = Net()
    reference = weakref.ref(model)
    tracer = ClassificationTracer(model, "net", "v1", {"hidden": "body"})
    tracer(*batch(2))
    tracer.close()
    del model, tracer
    gc.collect()
    assert reference() is None
