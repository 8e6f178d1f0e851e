"""Two ranks of a job train a model under each wrapper of torch; each records what it computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import InvalidInputError
from ml_debugger.tracer.fingerprint import fingerprint
from ml_debugger.training import ClassificationTracer
from ranks import run_ranks

if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

WORLD_SIZE = 2
BATCH, STEPS = 3, 2
WRAPPERS = ("ddp", "replicate", "fsdp2", "fsdp2_bf16", "hsdp", "fsdp1", "fsdp1_orig", "tensor_parallel")


class Net(nn.Module):
    """4 inputs, 6 features, 3 classes; one buffer, so that wrappers have one to carry."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.norm(self.body(x))))


def wrap(name: str) -> nn.Module:
    """A fresh ``Net`` under the wrapper of that name."""
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Net()
    if name == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if name == "replicate":
        return replicate(model)
    if name.startswith("fsdp1"):
        options: dict[str, Any] = {"use_orig_params": name == "fsdp1_orig", "device_id": torch.device("cpu")}
        model.body = FullyShardedDataParallel(model.body, **options)
        return FullyShardedDataParallel(model, **options)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    if name == "tensor_parallel":  # its head's output is one that the collective may still be writing
        from torch.distributed.tensor import Replicate

        plan = {
            "body": ColwiseParallel(output_layouts=Replicate()),
            "head": RowwiseParallel(input_layouts=Replicate()),
        }
        return parallelize_module(model, mesh, plan)
    if name == "hsdp":  # two replicas, each of one shard
        mesh = init_device_mesh("cpu", (WORLD_SIZE, 1), mesh_dim_names=("replicate", "shard"))
    half = torch.bfloat16 if name == "fsdp2_bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)
    fully_shard(model.body, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(BATCH, 4, generator=generator)
    return x, torch.arange(BATCH) % 3, [f"r{rank}s{step}i{i}" for i in range(BATCH)]


def train(model: nn.Module, call: Callable[..., Any], rank: int, shared_input: bool) -> dict[str, Any]:
    """Some steps of SGD; outputs, gradients of the last step, and final parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for step in range(STEPS):
        x, y, ids = batch(rank, step)
        if shared_input:  # tensor parallel ranks work on the same samples
            x = batch(0, step)[0]
        outputs.append(call(x, y, ids, "train", step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs[-1].float(), y).backward()
        gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
    return {
        "outputs": [local(output) for output in outputs],
        "gradients": gradients,
        "parameters": [local(parameter) for parameter in model.parameters()],
    }


def local(tensor: Any) -> torch.Tensor:
    """A plain copy of this rank's part."""
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return (tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor).clone()


def find(model: nn.Module, name: str) -> nn.Module:
    return next(module for path, module in model.named_modules() if path.rpartition(".")[2] == name)


def train_under_every_wrapper(rank: int, data_dir: str) -> dict[str, Any]:
    """In a rank: each wrapper untraced with a hook of our own, then traced; what both saw."""
    os.environ["MLD_RING_BYTES"] = str(8 << 20)
    config = TracerConfig(data_dir=data_dir, durability="process")
    results: dict[str, Any] = {}
    for name in WRAPPERS:
        same = name == "tensor_parallel"
        plain = wrap(name)
        seen: list[torch.Tensor] = []
        find(plain, "act").register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.detach().clone())
        )
        untraced = train(plain, lambda x, *_, model=plain: model(x), rank, same)
        model = wrap(name)
        prints = [fingerprint(model)]
        prefix = "module." if name == "ddp" else "_fsdp_wrapped_module." if name.startswith("fsdp1") else ""
        layers = {"plain": "act", "prefixed": f"{prefix}act"}
        with ClassificationTracer(model, name, "v1", layers, config=config) as tracer:
            traced = train(model, tracer, rank, same)
        prints.append(fingerprint(model))
        if not same:  # the head's input is a DTensor there
            with ClassificationTracer(wrap(name), name, "head", config=config) as tracer:
                tracer(*batch(rank, 0))
        results[name] = {"seen": seen, "untraced": untraced, "traced": traced, "fingerprints": prints}
    results["sampled"] = sample(rank, data_dir)
    results["dtensor"] = refuse_a_dtensor(data_dir)
    return results


def sample(rank: int, data_dir: str) -> int:
    """Both ranks get the same ids, as a padding sampler or an evaluation on every rank gives them."""
    config = TracerConfig(data_dir=data_dir, durability="process", sample_fraction=0.5)
    with ClassificationTracer(wrap("ddp"), "sampled", "v1", {"hidden": "act"}, config=config) as tracer:
        tracer(torch.randn(40, 4), None, list(range(40)), "val", 0)
    return tracer.stats().rows_committed


def refuse_a_dtensor(data_dir: str) -> str:
    """A layer that returns a DTensor: refused as it stands, recorded where a callable makes it local."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(4, 6))
    plan = {"0": ColwiseParallel(use_local_output=False)}
    model = parallelize_module(model, init_device_mesh("cpu", (WORLD_SIZE,)), plan)
    x, _, ids = batch(0, 0)

    class Take(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.head = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(x).to_local())

    layers = {"hidden": "inner.0"}
    config = TracerConfig(data_dir=data_dir, durability="process")
    with ClassificationTracer(Take(), "dtensor", "v1", layers, config=config) as tracer:
        try:
            tracer(x, None, ids)
        except InvalidInputError as error:
            refusal = str(error)
        else:
            refusal = "none"
        assert tracer.stats().rows_submitted == 0
    config = TracerConfig(data_dir=data_dir, durability="process", reduce={"hidden": lambda t: t.to_local()})
    with ClassificationTracer(Take(), "dtensor", "v1", layers, config=config) as tracer:
        tracer(x, None, ids)
        expected = model(x).to_local()
        assert torch.equal(tracer.get_hooked_features("hidden"), expected)
    return refusal


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One job of two ranks for all tests of this file: where it recorded, and what each rank saw."""
    folder = tmp_path_factory.mktemp("job")
    return folder / "data", run_ranks(train_under_every_wrapper, WORLD_SIZE, folder, str(folder / "data"))


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_rank_records_what_its_layer_returned_under_a_path_with_and_without_prefix(
    name: str, job: tuple[Path, list[dict[str, Any]]]
) -> None:
    data_dir, results = job
    stored = open_trace(name, "v1", data_dir=data_dir).tensors("extracted_feature")
    assert len(stored["input_id"]) == WORLD_SIZE * STEPS * BATCH
    row = {input_id: number for number, input_id in enumerate(stored["input_id"])}
    for rank, result in enumerate(results):
        for step in range(STEPS):
            rows = [row[input_id] for input_id in batch(rank, step)[2]]
            expected = {
                "plain": result[name]["seen"][step],
                "prefixed": result[name]["seen"][step],
                "logits": result[name]["untraced"]["outputs"][step],
            }
            for column, values in expected.items():
                assert stored[column].dtype is values.dtype
                assert torch.equal(stored[column][rows], values), (column, rank, step)


@pytest.mark.parametrize("name", WRAPPERS)
def test_outputs_gradients_and_parameters_are_those_of_an_untraced_run(
    name: str, job: tuple[Path, list[dict[str, Any]]]
) -> None:
    for result in job[1]:
        traced, untraced = result[name]["traced"], result[name]["untraced"]
        assert len(untraced["gradients"]) > 0
        for what in ("outputs", "gradients", "parameters"):
            assert len(traced[what]) == len(untraced[what])
            assert all(map(torch.equal, traced[what], untraced[what])), what


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_fingerprint_is_that_of_the_plain_model_on_every_rank_and_after_training(
    name: str, job: tuple[Path, list[dict[str, Any]]]
) -> None:
    found = [printed for result in job[1] for printed in result[name]["fingerprints"]]
    assert found == [fingerprint(Net())] * (2 * WORLD_SIZE)


@pytest.mark.parametrize("name", WRAPPERS[:-1])
def test_the_head_of_a_wrapped_model_is_found(name: str, job: tuple[Path, list[dict[str, Any]]]) -> None:
    stored = open_trace(name, "head", data_dir=job[0]).tensors("extracted_feature")
    assert stored["features"].shape == (WORLD_SIZE * BATCH, 6)
    first = torch.cat([result[name]["seen"][0] for result in job[1]])
    assert torch.equal(stored["features"], first)


def test_sample_fraction_keeps_the_same_ids_on_every_rank(job: tuple[Path, list[dict[str, Any]]]) -> None:
    ids = open_trace("sampled", "v1", data_dir=job[0]).tensors("extracted_feature")["input_id"]
    kept = sorted(set(ids))
    assert sorted(ids) == sorted(kept * WORLD_SIZE)
    assert [result["sampled"] for result in job[1]] == [len(kept)] * WORLD_SIZE
    assert 10 < len(kept) < 30


def test_a_distributed_tensor_is_refused_by_name_unless_a_callable_makes_it_local(
    job: tuple[Path, list[dict[str, Any]]],
) -> None:
    for result in job[1]:
        assert "'hidden'" in result["dtensor"]
        assert "DTensor" in result["dtensor"]
        assert "to_local()" in result["dtensor"]
