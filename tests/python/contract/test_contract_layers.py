"""Contract 2, target_layers: wrapper prefixes, "", output picks, unknown paths, the head found without
configuration; compiled, DataParallel and checkpointed models."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from typing import Any

import numpy as np
import pytest
import torch
from contract_models import Net, Speaker, batch, by_id, refused, rows_of, same_array
from torch import nn
from torch.utils.checkpoint import checkpoint

from ml_debugger import errors, open_trace


def column(name: str) -> dict[str, Any]:
    return by_id(open_trace("net", "v1").arrays("extracted_feature"), name)


def expect_column(name: str, ids: list[str], values: torch.Tensor) -> None:
    stored = column(name)
    assert same_array(np.stack([stored[i] for i in ids]), values.detach().numpy())


class Wrapped(nn.Module):
    """A wrapper that keeps the user's model under a name that wrappers of torch use."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)
        self._name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self._name)(x)


@pytest.mark.parametrize(
    "prefix", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
@pytest.mark.parametrize("given", [True, False])
def test_wrapper_prefixes_may_be_given_or_left_out(prefix: str, given: bool, make_tracer: Any) -> None:
    inner = Net()
    path = f"{prefix}.body" if given else "body"
    tracer = make_tracer(Wrapped(prefix, inner), layers={"hidden": path})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    expect_column("hidden", ids, inner.body(x))


def test_a_prefix_may_be_given_for_a_plain_model(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"hidden": "module.body"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    expect_column("hidden", ids, model.body(x))


def test_a_wrapped_and_a_plain_model_have_one_fingerprint(make_tracer: Any) -> None:
    make_tracer(Net(), layers={"hidden": "body"}).close()
    make_tracer(nn.DataParallel(Net()), layers={"hidden": "body"})(*batch(2))


def test_empty_path_is_the_model_itself(make_tracer: Any) -> None:
    model = Net()
    tracer = make_tracer(model, layers={"out": ""})
    x, y, ids = batch(3)
    output = tracer(x, y, ids)
    tracer.flush()
    expect_column("out", ids, output)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    other: torch.Tensor


PICKS = {
    "[0]": lambda x: (x * 2, x * 3),
    "[-1]": lambda x: [x * 3, x * 2],
    '["key"]': lambda x: {"other": x * 3, "key": x * 2},
    '["a"][1]': lambda x: {"a": (x * 3, x * 2)},
    '[1]["b"][-1]': lambda x: (x, {"b": [x, x * 2]}),
    '["hidden"]': lambda x: Output(hidden=x * 2, other=x * 3),
}


@pytest.mark.parametrize("pick", sorted(PICKS))
def test_a_path_may_pick_from_the_output(pick: str, make_tracer: Any) -> None:
    tracer = make_tracer(Speaker(PICKS[pick]), layers={"seen": "layer" + pick})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    expect_column("seen", ids, x * 2)


def test_two_aliases_may_pick_from_one_layer(make_tracer: Any) -> None:
    tracer = make_tracer(Speaker(lambda x: (x * 2, x * 3)), layers={"a": "layer[0]", "b": "layer[1]"})
    x, y, ids = batch(3)
    tracer(x, y, ids)
    tracer.flush()
    expect_column("a", ids, x * 2)
    expect_column("b", ids, x * 3)


@pytest.mark.parametrize(("path", "closest"), [("bdy", "body"), ("heed", "head"), ("body.weight.x", "body")])
def test_an_unknown_path_names_the_closest_ones(
    path: str, closest: str, make_tracer: Any, store: Any
) -> None:
    model = Net()
    with refused(errors.LayerNotFoundError) as caught:
        make_tracer(model, layers={"hidden": path})
    assert path in str(caught.value) and closest in str(caught.value)
    assert not store.exists()
    assert not model.body._forward_hooks


class FakeResNet(nn.Module):
    """Convolutions, pooling, flatten in forward, ``fc``: the shape of torchvision's family."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(5, 3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.avgpool(self.layer1(self.bn1(self.conv1(x)))), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))


class FakeViT(nn.Module):
    """A transformer encoder whose class token goes to ``heads.head``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(8, 3)))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(x))[:, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(self.features(x))


class RobertaHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.0)
        self.out_proj = nn.Linear(8, 3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(x[:, 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(self.features(x)))


class FakeRoberta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.classifier = RobertaHead()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(self.embed(x))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return UserLogits(logits=self.classifier(self.embed(x)))


class UserLogits(UserDict):  # type: ignore[type-arg]
    """A mapping output as model libraries return it."""

    @property
    def logits(self) -> torch.Tensor:
        return self["logits"]


class ConvHead(nn.Module):
    """A 1x1 convolution as the head, pooled afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 5, 3)
        self.classifier = nn.Conv2d(5, 3, 1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)).mean((2, 3))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class BareHead(nn.Module):
    """A head that is a module with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.scale = Scale()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.features(x))


class TokenHead(nn.Module):
    """A head over tokens: features are (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Seq(nn.Sequential):
    """``Sequential(..., Linear)``."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x))


HEADS = {
    "sequential": (Seq, (4,)),
    "resnet": (FakeResNet, (1, 8, 8)),
    "vit": (FakeViT, (5, 4)),
    "roberta": (FakeRoberta, (5, 4)),
    "conv1x1": (ConvHead, (1, 8, 8)),
    "bare parameter": (BareHead, (4,)),
    "tokens": (TokenHead, (5, 4)),
}


@pytest.mark.parametrize("family", sorted(HEADS))
def test_without_target_layers_the_input_of_the_head_is_features(family: str, make_tracer: Any) -> None:
    make, shape = HEADS[family]
    torch.manual_seed(3)
    model = make().eval()
    x = torch.randn(3, *shape)
    with torch.no_grad():
        expected = model.features(x)
        tracer = make_tracer(model)
        tracer(x, None, ["a", "b", "c"])
    tracer.flush()
    stored = column("features")
    seen = np.stack([stored[i] for i in "abc"])
    assert seen.shape == tuple(expected.shape)
    np.testing.assert_allclose(seen, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_features_of_the_head_are_what_came_in_also_when_training(make_tracer: Any) -> None:
    model = Seq()
    tracer = make_tracer(model)
    x, y, ids = batch(3)
    tracer(x, y, ids).sum().backward()
    tracer.flush()
    expect_column("features", ids, model.features(x))


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(nn.ReLU())])
def test_no_head_found_names_target_layers(model: nn.Module, make_tracer: Any) -> None:
    with refused(errors.LayerNotFoundError) as caught:
        tracer = make_tracer(model)
        tracer(*batch(2))
    assert "target_layers" in str(caught.value)
    assert rows_of() == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_model_compiled_in_whole_is_recorded(make_tracer: Any) -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    tracer = make_tracer(compiled, layers={"hidden": "body"})
    for i in range(3):
        x, y, ids = batch(4, i)
        output = tracer(x, y, ids, n_epoch=i)
        np.testing.assert_allclose(output.detach().numpy(), model(x).detach().numpy(), rtol=1e-5)
    tracer.flush()
    assert rows_of() == 12
    hidden = column("hidden")
    np.testing.assert_allclose(hidden[ids[1]], model.body(x)[1].detach().numpy(), rtol=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_backward_is_not_recorded_twice(reentrant: bool, make_tracer: Any) -> None:
    model = Checkpointed(reentrant)
    tracer = make_tracer(model, layers={"inner": "block.0"})
    for i in range(3):
        x, y, ids = batch(4, i)
        expected = model.block[0](model.first(x))
        tracer(x, y, ids).sum().backward()
    tracer.flush()
    assert rows_of() == 12
    expect_column("inner", ids, expected)


def test_a_model_wrapped_by_ddp_is_recorded_under_its_plain_names(run_child: Any, tmp_path: Any) -> None:
    run_child(
        """
        import sys
        import torch.distributed as dist
        from contract_models import Net, batch
        from ml_debugger import open_trace
        from ml_debugger.training import ClassificationTracer

        dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
        model = torch.nn.parallel.DistributedDataParallel(Net())
        with ClassificationTracer(model, "net", "v1", {"plain": "body", "full": "module.act"}) as tracer:
            for i in range(3):
                x, y, ids = batch(4, i)
                torch.nn.functional.cross_entropy(tracer(x, y, ids), y).backward()
        with ClassificationTracer(Net(), "net", "v1", {"plain": "body", "full": "act"}) as tracer:
            tracer(*batch(4, 3))
        dist.destroy_process_group()
        """,
        tmp_path / "rendezvous",
    )
    assert rows_of() == 16
    expect_column("plain", batch(4, 3)[2], Net().body(batch(4, 3)[0]))
