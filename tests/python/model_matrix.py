"""The matrix of models, modes and wrappers: what a cell is, and how one is tried.

A cell trains one model three times from the same seed: untraced; untraced with witnesses, plain Python hooks
of the test's own on the watched layers; and traced. In compiled code a witness is an operator that does to
the graph what ours does (an ordered effect), so that the compiler sees the same graph.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

from matrix_models import KINDS, NEEDS_TRANSFORMERS, Kind, set_checkpointing
from ml_debugger import open_trace
from ml_debugger.training import ClassificationTracer

STEPS = 10
SIZES = (5, 3, 4)  # of the batches, in turn, where shapes may change
COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, RuntimeError)

# What a cell may turn out to be.
SAME = "="  # stored right; the user's run has the bits of an untraced one
SAME_GRAPH = (
    "≈"  # stored right; the run has the bits of the same graph with another operator in place of ours
)
TORCH_REFUSES = "torch"  # it fails without a tracer


class Mode(NamedTuple):
    """How the model runs.

    Attributes:
        words: How the page calls it.
        compile: Arguments of ``torch.compile``; None runs eagerly.
        half: Whether under autocast to bfloat16.
        reentrant: Kind of activation checkpointing; None for none.
    """

    words: str
    compile: dict[str, Any] | None = None
    half: bool = False
    reentrant: bool | None = None

    @property
    def is_inductor(self) -> bool:
        return self.compile is not None and self.compile["backend"] == "inductor"

    @property
    def sizes(self) -> Iterator[int]:
        """Sizes of the batches: compiled code is made anew for another one, unless it is dynamic."""
        fixed = self.compile is not None and not self.compile.get("dynamic")
        return itertools.repeat(SIZES[0]) if fixed else itertools.cycle(SIZES)


MODES = {
    "eager": Mode("eager"),
    "autocast": Mode("autocast bf16", half=True),
    "reentrant": Mode("checkpoint, reentrant", reentrant=True),
    "non_reentrant": Mode("checkpoint, non-reentrant", reentrant=False),
    "compile_eager": Mode('compile, `"eager"`', {"backend": "eager"}),
    "compile_aot": Mode('compile, `"aot_eager"`', {"backend": "aot_eager"}),
    "fullgraph": Mode("compile, `fullgraph`", {"backend": "aot_eager", "fullgraph": True}),
    "dynamic": Mode("compile, `dynamic`", {"backend": "aot_eager", "dynamic": True}),
    "inductor": Mode("compile, inductor", {"backend": "inductor"}),
    "inductor_half": Mode("inductor, autocast bf16", {"backend": "inductor"}, half=True),
}
WRAPPERS = {
    "none": "The model itself",
    "data_parallel": "`nn.DataParallel` (on a CPU)",
    "ddp": "`DistributedDataParallel` (gloo, one process)",
    "averaged": "With an `AveragedModel` beside it that runs after each step, compiled likewise",
    "fsdp2": "`fully_shard` (FSDP2; gloo, one process)",
}


class Cell(NamedTuple):
    model: str
    mode: str
    wrapper: str

    @property
    def kind(self) -> Kind:
        return KINDS[self.model]

    @property
    def how(self) -> Mode:
        return MODES[self.mode]

    def __str__(self) -> str:
        return "-".join(self)


ALL_CELLS = [Cell(*names) for names in itertools.product(KINDS, MODES, WRAPPERS)]


def is_quick(cell: Cell) -> bool:
    """Whether `make test` runs the cell: what is eager, and a choice of what compiles."""
    if cell.how.is_inductor:
        return cell.model == "mlp" and cell.wrapper == "none"
    if cell.how.compile is None:
        return cell.model not in NEEDS_TRANSFORMERS or cell.wrapper == "none"
    if (cell.model, cell.mode) == ("transformer", "dynamic"):  # symbolic shapes in attention take long
        return False
    if cell.model in NEEDS_TRANSFORMERS:
        return cell.model == "bert" and cell.mode == "fullgraph" and cell.wrapper == "none"
    return cell.wrapper == "none" or (cell.model in ("mlp", "cnn") and cell.mode == "compile_aot")


# Witnesses.

_library = torch.library.Library("mld_tests", "FRAGMENT")
_seen_by: dict[int, Callable[[torch.Tensor], None]] = {}
_numbers = itertools.count()


def _define_witness() -> None:
    from ml_debugger.tracer.compiled import _make_effectful

    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    _library.define("witness(Tensor[] tensors, int number) -> ()", tags=() if tag is None else (tag,))
    _library.impl(
        "witness", lambda tensors, number: _seen_by[number](tensors[0]), "CompositeExplicitAutograd"
    )
    torch.library.register_fake("mld_tests::witness", lambda tensors, number: None, lib=_library)
    _make_effectful(torch.ops.mld_tests.witness.default)


_define_witness()


class Witness:
    """Keeps a copy of what each watched layer returns in a forward."""

    def __init__(self, layers: dict[str, str]) -> None:
        self.layers = layers
        self.calls: list[dict[str, torch.Tensor]] = []
        self.in_forward = False

    def attach(self, model: nn.Module) -> None:
        for alias, path in self.layers.items():
            module = model.get_submodule(path.removesuffix("[0]"))
            module.register_forward_hook(self._hook(alias, path.endswith("[0]")))

    def _hook(self, alias: str, first: bool) -> Callable[[nn.Module, Any, Any], None]:
        number = next(_numbers)
        _seen_by[number] = lambda tensor: self._see(alias, tensor)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if first else output
            if torch.compiler.is_compiling():
                torch.ops.mld_tests.witness([tensor], number)
            else:
                self._see(alias, tensor)

        return hook

    def _see(self, alias: str, tensor: torch.Tensor) -> None:
        if not self.in_forward:  # backward computes it again
            return
        runs = sum(name.split(".")[0] == alias for name in self.calls[-1])
        self.calls[-1][f"{alias}.{runs}" if runs else alias] = tensor.detach().clone()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        self.calls.append({})
        self.in_forward = True
        yield
        self.in_forward = False


# Runs.


@dataclass
class Run:
    """What the user has at the end of a run, and what was counted."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    outputs_of_twin: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    state: list[torch.Tensor] = field(default_factory=list)  # parameters, buffers, RNG
    graphs: int = 0
    graph_breaks: dict[str, int] = field(default_factory=dict)  # by reason

    WHAT: ClassVar = ("outputs", "outputs_of_twin", "gradients", "state")

    def expect_same(self, other: Run, what: str) -> None:
        for name in self.WHAT:
            assert self._equal(other, name), f"{name} differ from those of {what}"

    def _equal(self, other: Run, name: str) -> bool:
        mine, theirs = getattr(self, name), getattr(other, name)
        return len(mine) == len(theirs) and all(map(same_bits, mine, theirs))


def same_bits(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)


def local(tensor: Any) -> torch.Tensor | None:
    """A copy of it, or of this process's part of it."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "data_parallel":
        return nn.DataParallel(model)
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))  # type: ignore[no-any-return]
    return model


def logits_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def inputs_of(cell: Cell, step: int, size: int) -> tuple[Any, torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(3, (size,), generator=generator)
    return cell.kind.inputs(size, generator), labels, [f"{step}-{number}" for number in range(size)]


class Training:
    """One run of a cell. ``attach`` is given the model before the first step and returns what to call."""

    def __init__(
        self, cell: Cell, attach: Callable[[nn.Module, nn.Module], Callable[..., Any]], copy_first: bool
    ) -> None:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(7)
        self.cell, self.how, self.run = cell, cell.how, Run()
        self.model = cell.kind.build().train()
        if self.how.reentrant is not None:
            set_checkpointing(self.model, self.how.reentrant)
        # A witness, unlike a hook of ours, would live on in a copy. The code of a compiled twin without any
        # hook is what the compiler may run in place of the traced model's.
        copy_first = copy_first or self.how.compile is not None
        self.average = AveragedModel(self.model) if cell.wrapper == "averaged" and copy_first else None
        wrapped = self._compile(wrap(self.model, cell.wrapper))
        self.call = attach(self.model, wrapped)
        if cell.wrapper == "averaged" and not copy_first:
            self.average = AveragedModel(self.model)
        self.twin = None if self.average is None else self._compile(self.average.module)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def _compile(self, model: nn.Module) -> nn.Module:
        return model if self.how.compile is None else torch.compile(model, **self.how.compile)  # type: ignore[no-any-return]

    def finish(self) -> Run:
        for step, size in zip(range(STEPS), self.how.sizes):  # noqa: B905
            self._step(*inputs_of(self.cell, step, size), step)
        if not self.how.is_inductor:  # another graph, and one that holds nothing new for inductor
            self.model.eval()
            with torch.no_grad():
                inputs, labels, ids = inputs_of(self.cell, STEPS, SIZES[0])
                self.run.outputs.append(local(logits_of(self.call(inputs, labels, ids, "val", STEPS))))
        tensors = [*self.model.parameters(), *self.model.buffers(), torch.get_rng_state()]
        self.run.state = [local(tensor) for tensor in tensors]
        self.run.graphs = counters["stats"]["unique_graphs"]
        self.run.graph_breaks = dict(counters["graph_break"])
        torch._dynamo.reset()
        return self.run

    def _step(self, inputs: Any, labels: torch.Tensor, ids: list[str], step: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.how.half):
            logits = logits_of(self.call(inputs, labels, ids, "train", step))
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self.run.gradients += [local(parameter.grad) for parameter in self.model.parameters()]
        self.optimizer.step()
        self.run.outputs.append(local(logits))
        if self.average is not None and self.twin is not None:
            self.average.update_parameters(self.model)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.how.half):
                self.run.outputs_of_twin.append(local(logits_of(call_plainly(self.twin, inputs))))


def call_plainly(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def run_untraced(cell: Cell) -> Run:
    return Training(
        cell, lambda model, wrapped: lambda inputs, *_: call_plainly(wrapped, inputs), copy_first=False
    ).finish()


def run_witnessed(cell: Cell) -> tuple[Run, list[dict[str, torch.Tensor]]]:
    witness = Witness(cell.kind.layers)

    def attach(model: nn.Module, wrapped: nn.Module) -> Callable[..., Any]:
        witness.attach(model)

        def call(inputs: Any, *_: Any) -> Any:
            with witness.forward():
                return call_plainly(wrapped, inputs)

        return call

    # The settings that a tracer needs (docs/architecture.md), so that the graphs are the same.
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False, optimize_ddp=False):
        return Training(cell, attach, copy_first=True).finish(), witness.calls


def run_traced(cell: Cell, make: Callable[[nn.Module, dict[str, str]], ClassificationTracer]) -> Run:
    made: list[ClassificationTracer] = []

    def attach(model: nn.Module, wrapped: nn.Module) -> Callable[..., Any]:
        made.append(make(wrapped, cell.kind.layers))
        return made[0]

    try:
        run = Training(cell, attach, copy_first=False).finish()
        made[0].flush()
        return run
    finally:
        for tracer in made:
            tracer.close()


def try_cell(cell: Cell, make: Callable[[nn.Module, dict[str, str]], ClassificationTracer]) -> str:
    """Check what must hold in a cell, and say how near the traced run is to an untraced one."""
    try:
        untraced = run_untraced(cell)
    except COMPILER_ERRORS as error:
        print(f"torch refuses {cell}: {error}")
        return TORCH_REFUSES
    witnessed, seen = run_witnessed(cell)
    traced = run_traced(cell, make)
    expect_recorded(cell, traced, seen)
    traced.expect_same(witnessed, "the run of the same graph with another operator in place of ours")
    if cell.wrapper == "averaged":  # the twin without hooks is compiled apart, and counts its own anew
        assert traced.graph_breaks.keys() == untraced.graph_breaks.keys()
    else:
        assert traced.graph_breaks == untraced.graph_breaks
    assert (traced.graphs > 0) == (untraced.graphs > 0)
    if cell.how.is_inductor and cell.how.half:
        return SAME_GRAPH  # whether it is an untraced run's too is the luck of a machine's fusions
    traced.expect_same(untraced, "an untraced run")
    return SAME


def expect_recorded(cell: Cell, run: Run, seen: list[dict[str, torch.Tensor]]) -> None:
    """One record a call, with the bits that the layers returned, and the logits that the user got."""
    trace = open_trace("net", "v1")
    runs = range(cell.kind.runs)
    columns = [f"{alias}.{number}" if number else alias for alias in cell.kind.layers for number in runs]
    assert trace.columns("extracted_feature")[4:] == [*columns, "logits"]
    assert trace.epochs == list(range(len(seen)))
    for step, (call, logits) in enumerate(zip(seen, run.outputs, strict=True)):
        stored = trace.tensors("extracted_feature", n_epoch=step)
        _, labels, ids = inputs_of(cell, step, len(logits))
        assert stored["input_id"] == ids
        assert torch.equal(trace.tensors("ground_truth", n_epoch=step)["label"], labels)
        assert same_bits(stored["logits"], logits), f"logits of call {step}"
        assert sorted(call) == sorted(columns)
        for column in columns:
            assert same_bits(stored[column], call[column]), f"{column!r} of call {step}"
