"""Layer paths: wrappers may be given or left out, picks are split off, unknown paths name the closest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger.errors import InvalidTypeError, LayerNotFoundError
from ml_debugger.tracer.layers import resolve_layers, split_picks, strip_wrappers


class Wrapper(nn.Module):
    """Wraps as DDP (`module`), torch.compile (`_orig_mod`) and checkpointing do."""

    def __init__(self, inner: nn.Module, name: str = "module") -> None:
        super().__init__()
        self.add_module(name, inner)


def model() -> nn.Module:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return nn.ModuleDict({"stem": nn.Linear(2, 2), "block": Wrapper(block, "_checkpoint_wrapped_module")})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("layer4", ("layer4", ())),
        ("layer4[0]", ("layer4", (0,))),
        ('encoder["last"][-1]', ("encoder", ("last", -1))),
        ("encoder['a]b']", ("encoder", ("a]b",))),
        ("[1]", ("", (1,))),
        ("a.0[ 2 ]", ("a.0", (2,))),
    ],
)
def test_picks_are_split_off(given: str, expected: tuple[str, tuple[Any, ...]]) -> None:
    assert split_picks(given) == expected


@pytest.mark.parametrize(
    "path", ["block.0", "module._orig_mod.block.0", "block._checkpoint_wrapped_module.0"]
)
def test_wrapper_prefixes_may_be_given_or_left_out(path: str) -> None:
    inner = model()
    wrapped = Wrapper(Wrapper(inner, "_orig_mod"))
    for root in (inner, wrapped):
        (layer,) = resolve_layers(root, {"a": path})
        assert layer.module is dict(inner.named_modules())["block._checkpoint_wrapped_module.0"]
        assert layer.path == "block.0"


def test_a_wrapper_is_taken_before_what_it_wraps() -> None:
    root = model()
    (layer,) = resolve_layers(root, {"a": "block"})
    assert isinstance(layer.module, Wrapper)


def test_the_empty_path_is_the_model_itself() -> None:
    root = Wrapper(model())
    assert resolve_layers(root, {"a": ""})[0].module is root
    assert resolve_layers(root, {"a": "[0]"})[0].picks == (0,)


def test_a_shared_module_is_found_under_both_names() -> None:
    shared = nn.Linear(2, 2)
    root = nn.ModuleDict({"a": shared, "b": shared})
    assert {layer.module for layer in resolve_layers(root, {"x": "a", "y": "b"})} == {shared}


def test_an_unknown_path_names_the_closest() -> None:
    with pytest.raises(LayerNotFoundError, match=r"'stem'") as caught:
        resolve_layers(model(), {"a": "stm"})
    assert "named_modules" in caught.value.hint
    with pytest.raises(LayerNotFoundError, match="the model itself"):
        resolve_layers(nn.Linear(1, 1), {"a": "fc"})


@pytest.mark.parametrize("given", [["stem"], {"a": 1}, {1: "stem"}, "stem"])
def test_other_types_are_refused(given: Any) -> None:
    with pytest.raises(InvalidTypeError):
        resolve_layers(model(), given)


def test_wrappers_are_stripped_wherever_they_stand() -> None:
    assert strip_wrappers("module.a._fsdp_wrapped_module.b._orig_mod") == "a.b"
    assert strip_wrappers("module") == ""


def test_a_module_of_the_user_named_like_a_wrapper_is_found_exactly() -> None:
    root = nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.ReLU()})
    assert isinstance(resolve_layers(root, {"a": "module"})[0].module, torch.nn.Linear)
