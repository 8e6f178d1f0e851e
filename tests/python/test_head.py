"""The classification head is found by watching one forward, for the usual families of models."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ml_debugger.errors import LayerNotFoundError
from ml_debugger.tracer.head import Head, HeadSearch
from ml_debugger.tracer.outputs import CallState, find_logits

BATCH, CLASSES = 6, 5


def find_head(model: nn.Module, *inputs: torch.Tensor, **keywords: torch.Tensor) -> tuple[Head, Any]:
    """Watch one forward of ``model``; the batch size is that of the first input."""
    state = CallState()
    state.batch_size = BATCH
    search = HeadSearch(model, state)
    with search.watching():
        output = model(*inputs, **keywords)
    return search.find(find_logits(output, BATCH)), output


@pytest.fixture(autouse=True, params=["train", "eval"])
def grad_mode(request: pytest.FixtureRequest) -> Any:
    """Heads are found with an autograd graph and without."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(request.param == "train"):
        yield request.param


def images(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size)


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, CLASSES)  # registered first, run last
        self.conv1 = nn.Conv2d(3, 7, 3)
        self.bn1 = nn.BatchNorm2d(7)
        self.unused = nn.Linear(7, CLASSES)  # registered last, never run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.fc(x.mean((2, 3)))


class SqueezeNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 9, 1))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(9, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class DenseNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.features(x), inplace=True), 1)
        return self.classifier(torch.flatten(x, 1))


class ViTLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.encoder(x))[:, 0])


class BertLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(11, 8)
        self.encoder = nn.Linear(8, 8)
        self.pooler = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.encoder(self.embeddings(input_ids))
        return {"loss": x.sum(), "logits": self.classifier(self.pooler(x[:, 0]))}


class RobertaHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(8, CLASSES)
        self.dense = nn.Linear(8, 8)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.out_proj(torch.tanh(self.dense(features[:, 0])))


class RobertaLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = RobertaHead()
        self.roberta = nn.Sequential(nn.Embedding(11, 8), nn.LayerNorm(8))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.roberta(input_ids)
        return self.classifier(hidden), hidden


class CosineHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 16 * F.linear(F.normalize(x), F.normalize(self.weight))


class ScaledLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scale


class AuxiliaryAfter(nn.Module):
    """The main head runs before another one with as many classes, whose result is not the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.main = nn.Linear(8, CLASSES)
        self.auxiliary = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.trunk(x)
        return {"logits": self.main(x), "aux": self.auxiliary(x)}


def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (BATCH, 3))


FAMILIES = [
    pytest.param(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
        torch.randn(BATCH, 4),
        "2",
        (8,),
        id="mlp",
    ),
    pytest.param(nn.Linear(4, CLASSES), torch.randn(BATCH, 4), "", (4,), id="linear"),
    pytest.param(ResNetLike(), images(), "fc", (7,), id="resnet"),
    pytest.param(SqueezeNetLike(), images(), "classifier.1", (9, 6, 6), id="squeezenet"),
    pytest.param(DenseNetLike(), images(), "classifier", (8,), id="densenet"),
    pytest.param(ViTLike(), images(), "head", (8,), id="vit"),
    pytest.param(BertLike(), tokens(), "classifier", (8,), id="bert"),
    pytest.param(RobertaLike(), tokens(), "classifier.out_proj", (8,), id="roberta"),
    pytest.param(
        nn.Sequential(nn.Linear(4, 8), CosineHead()), torch.randn(BATCH, 4), "1", (8,), id="bare parameter"
    ),
    pytest.param(ScaledLogits(), torch.randn(BATCH, 4), "fc", (4,), id="scaled"),
    pytest.param(AuxiliaryAfter(), torch.randn(BATCH, 4), "main", (8,), id="auxiliary"),
    pytest.param(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES), nn.LogSoftmax(1)),
        torch.randn(BATCH, 4),
        "1",
        (8,),
        id="softmax",
    ),
    pytest.param(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Flatten(0)),
        torch.randn(BATCH, 4),
        "1",
        (8,),
        id="binary",
    ),
    pytest.param(
        nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, CLASSES)),
        tokens(),
        "1",
        (3, 8),
        id="tokens keep their shape",
    ),
]


@pytest.mark.parametrize(("model", "given", "path", "sample_shape"), FAMILIES)
def test_head_of_a_family_is_found(
    model: nn.Module, given: torch.Tensor, path: str, sample_shape: tuple[int, ...]
) -> None:
    head, _ = find_head(model, given)
    assert head.path == path
    assert tuple(head.inputs[-1].shape) == (BATCH, *sample_shape)
    assert dict(model.named_modules())[path] is head.module


def test_input_is_kept_as_it_was_when_the_head_was_called() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                features = self.body(x)
                logits = self.fc(features)
                features.zero_()
            return logits

    model = Overwriting()
    given = torch.randn(BATCH, 4)
    head, logits = find_head(model, given)
    assert torch.equal(model.fc(head.inputs[-1]), logits)


def test_input_by_keyword_is_found() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(input=x)

    head, _ = find_head(Keyword(), torch.randn(BATCH, 4))
    assert head.by_keyword
    assert head.path == "fc"


def test_model_without_parameters_has_no_head() -> None:
    with pytest.raises(LayerNotFoundError, match="target_layers"):
        HeadSearch(nn.Sequential(nn.Flatten()), CallState())


def test_parameters_that_do_not_make_the_logits_are_no_head() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(9, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.side(x)
            return x[:, :CLASSES] * 2

    with pytest.raises(LayerNotFoundError, match="target_layers"):
        find_head(Detached(), torch.randn(BATCH, 9))


def test_watching_leaves_no_hooks_behind_when_the_forward_raises() -> None:
    model = nn.Sequential(nn.Linear(4, CLASSES))
    search = HeadSearch(model, CallState())
    with pytest.raises(RuntimeError), search.watching():
        model(torch.randn(BATCH, 3))
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_watching_does_not_touch_the_inside_of_encoder_layers() -> None:
    model = ViTLike()
    search = HeadSearch(model, CallState())
    with search.watching():
        for layer in model.encoder.layers:
            assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in layer.modules())


def test_only_the_last_inputs_are_kept_while_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ml_debugger.tracer.head._KEPT_BYTES", 0)
    layers = [nn.Linear(4, 4) for _ in range(30)]
    model = nn.Sequential(*layers, nn.Linear(4, CLASSES))
    state = CallState()
    state.batch_size = BATCH
    search = HeadSearch(model, state)
    with search.watching():
        output = model(torch.randn(BATCH, 4))
        assert sum(run.input is not None for run in search._runs) <= 8
    assert search.find(output).path == "30"
    assert not search._runs


def test_containers_share_one_copy_of_what_they_hand_on() -> None:
    seen = []

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(run.input for run in search._runs)
            return x @ self.weight

    model = nn.Sequential(nn.Sequential(nn.Sequential(First())))
    state = CallState()
    state.batch_size = BATCH
    search = HeadSearch(model, state)
    with search.watching():
        output = model(torch.randn(BATCH, 4))
    assert len(seen) == 4
    assert len({id(copy) for copy in seen}) == 1
    assert search.find(output).path == "0.0.0"


def test_encoder_layers_keep_their_fused_path_while_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch._transformer_encoder_layer_fwd
    calls = []
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(len(args)) or fused(*args)
    )
    model = ViTLike().eval()
    given = images()
    with torch.no_grad():
        expected = model(given)
        assert len(calls) == 2
        head, output = find_head(model, given)
    assert len(calls) == 4
    assert torch.equal(output, expected)
    assert head.path == "head"
    assert not any("forward" in vars(module) for module in model.modules())


def test_patched_forward_of_an_encoder_layer_is_put_back() -> None:
    model = ViTLike()
    patched = model.encoder.forward
    model.encoder.forward = patched
    find_head(model, images())
    assert vars(model.encoder)["forward"] is patched


def test_other_modes_of_the_user_see_the_same_functions() -> None:
    class Counting(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    model, given = ResNetLike(), images()
    with Counting() as plain:
        model(given)
    with Counting() as watched:
        head, _ = find_head(model, given)
    assert head.path == "fc"
    assert [name for name in watched.names if name in plain.names][-3:] == plain.names[-3:]


def test_module_that_fails_inside_and_is_caught_does_not_confuse() -> None:
    class Caught(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad = nn.Sequential(nn.Linear(5, 5))
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(RuntimeError):
                self.bad(x)
            return self.fc(x)

    assert find_head(Caught(), torch.randn(BATCH, 4))[0].path == "fc"


def test_lazy_modules_are_found_in_the_call_that_makes_their_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(CLASSES))
    assert find_head(model, torch.randn(BATCH, 4))[0].path == "2"


def test_head_whose_kernel_is_out_of_sight_is_found() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = x.detach().numpy() @ self.weight.detach().numpy()
            if self.returns:
                return torch.from_numpy(made)
            output = torch.empty(made.shape)
            output.numpy()[:] = made
            return output

    for returns in (True, False):
        model = nn.Sequential(nn.Linear(4, 8), Foreign())
        model[1].returns = returns
        assert find_head(model, torch.randn(BATCH, 4))[0].path == "1"
    behind = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES), _Numpy())
    assert find_head(behind, torch.randn(BATCH, 4))[0].path == "1"


class _Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


def test_parameters_put_in_place_of_others_are_seen() -> None:
    """As sharded models do it: the weights that a module computes with come just before it runs."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, CLASSES, bias=False))

    def out_of_sight(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(weight.detach().numpy().copy())

    def as_parameter(module: nn.Module, args: Any) -> None:
        module.weight = nn.Parameter(out_of_sight(module.weight))

    def as_plain_tensor(module: nn.Module, args: Any) -> None:
        module.weight = out_of_sight(module._parameters.pop("weight"))

    for hook in (as_parameter, as_plain_tensor):
        given = copy.deepcopy(model)
        given[1].register_forward_pre_hook(hook)
        assert find_head(given, torch.randn(BATCH, 4))[0].path == "1"


def test_encoder_layer_that_ends_a_model_is_no_head() -> None:
    layer = nn.TransformerEncoderLayer(CLASSES, 1, 8, batch_first=True)
    with pytest.raises(LayerNotFoundError, match=r"'1' makes.*target_layers"):
        find_head(nn.Sequential(nn.Linear(4, CLASSES), layer), torch.randn(BATCH, 3, 4))


def test_tensors_of_a_failed_forward_are_not_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, CLASSES))
    state = CallState()
    state.batch_size = BATCH
    search = HeadSearch(model, state)
    with pytest.raises(RuntimeError), search.watching():
        model(torch.randn(BATCH, 4))
    assert search._flow is None
    assert not search._runs
