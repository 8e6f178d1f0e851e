"""Question: what do the usual ways to keep features cost beside a tracer: `.cpu()` in a hook, or copies
without waiting and one synchronisation a step?

Method: the MLP with steps of about 5 ms and the ResNet-50-like model of `step_time`, drained blocks in
random order in one process, ratios to the untraced arm within a round. The usual ways copy features,
logits and labels to the host and keep nothing: no file is written. The tracer commits every row to tmpfs
within its block. What was recorded is checked as in `step_time`, and for the other arms the last copies
are compared with what the head was given.

Excluded: writing anything in the arms beside the tracer; loading data.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks.gpu.models import Trainer, synchronize
from benchmarks.gpu.step_time import (
    Workload,
    check_stored,
    depth_for_small_steps,
    described,
    make_mlp,
    make_resnet,
    run_checked_steps,
    share_batches,
    traced_arm,
    untraced_arm,
)
from benchmarks.harness import setting as settings
from benchmarks.harness.blocks import (
    LEAST_STEPS,
    Arm,
    Block,
    ratio_of,
    rounds_within,
    run_blocks,
    seconds_per_step,
    step_seconds,
)
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig
from ml_debugger.training import ClassificationTracer

NAME = "gpu_alternatives"
QUESTION = "What do .cpu() in a hook, and a non_blocking copy with a synchronisation, cost beside a tracer?"
ARMS = ("tracer", "non_blocking and synchronize", ".cpu() in the hook")


class HostCopies:
    """Keeps what the head is given and returns, and the labels, on the host, the way many programs do.

    Args:
        trainer: Whose model is watched.
        is_blocking: ``.cpu()`` at once; otherwise copies into pinned memory, and one wait a step.
    """

    def __init__(self, trainer: Trainer, *, is_blocking: bool) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self.given: dict[str, torch.Tensor] = {}
        self.is_checking = False
        self._is_blocking = is_blocking
        self._trainer = trainer
        self._pinned: dict[str, torch.Tensor] = {}
        trainer.model.fc.register_forward_hook(self._see)

    def _see(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...], returned: torch.Tensor) -> None:
        self._keep("features", given[0].detach())
        self._keep("logits", returned.detach())

    def _keep(self, name: str, values: torch.Tensor) -> None:
        if self.is_checking:
            self.given[name] = values.clone()
        if self._is_blocking:
            self.kept[name] = values.cpu()
            return
        pinned = self._pinned.get(name)
        if pinned is None:
            pinned = self._pinned[name] = torch.empty(
                values.shape, dtype=values.dtype, pin_memory=values.is_cuda
            )
        self.kept[name] = pinned.copy_(values, non_blocking=True)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self._trainer.plain(inputs, labels)
        self._keep("label", labels)
        if not self._is_blocking and inputs.is_cuda:
            torch.cuda.current_stream().synchronize()
        return logits

    def check(self) -> None:
        """Do a step and compare what was kept of it."""
        self.is_checking = True
        self._trainer.run(1, self.forward)
        self.is_checking = False
        for name, values in self.given.items():
            settings.check_equal(self.kept[name], values, name)


def workloads(setting: Setting) -> list[Workload]:
    if setting.is_quick:
        return [Workload("MLP, B = 256", lambda: make_mlp(setting, 1), 1, LEAST_STEPS)]
    depth = depth_for_small_steps(setting)
    return [
        Workload("MLP, B = 256", lambda: make_mlp(setting, depth), 20, 60),
        Workload("ResNet-50-like, B = 256", lambda: make_resnet(setting, 256, 224), 30, LEAST_STEPS),
    ]


def measure(setting: Setting) -> Findings:
    samples: dict[str, list[Block]] = {}
    summary: dict[str, Any] = {}
    bars: list[Bar] = []
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        for number, workload in enumerate(workloads(setting)):
            samples[workload.name], summary[workload.name] = time_workload(setting, workload, f"alt-{number}")
            gc.collect()  # models and their hooks refer to each other
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            for arm in ARMS:
                ratio = summary[workload.name][arm]["ratio"]
                bars.append(Bar(f"{workload.name}, {arm}", ratio.median, ratio.low, ratio.high))
    finally:
        torch.backends.cudnn.benchmark = before
    return Findings(setting.described(), samples, summary, "step time / untraced", bars, 1.0)


def time_workload(setting: Setting, workload: Workload, version: str) -> tuple[list[Block], dict[str, Any]]:
    untraced = workload.make()
    traced, waiting, blocking = (share_batches(untraced) for _ in range(3))
    waiting_copies, blocking_copies = (
        HostCopies(waiting, is_blocking=False),
        HostCopies(blocking, is_blocking=True),
    )
    config = TracerConfig(data_dir=setting.memory_dir)
    with ClassificationTracer(traced.model, "benchmark", version, config=config) as tracer:

        def host_arm(trainer: Trainer, copies: HostCopies) -> Arm:
            return Arm(lambda steps: trainer.run(steps, copies.forward), lambda: synchronize(setting.device))

        arms = {
            "untraced": untraced_arm(setting, untraced),
            "tracer": traced_arm(setting, traced, tracer),
            "non_blocking and synchronize": host_arm(waiting, waiting_copies),
            ".cpu() in the hook": host_arm(blocking, blocking_copies),
        }
        for arm in arms.values():
            arm.run(5)
            arm.drain()
        step_s = max(seconds_per_step(arm, 2 if setting.is_quick else 10) for arm in arms.values())
        rounds = rounds_within(workload.budget_s, len(arms), step_s * workload.steps, least=3, most=25)
        blocks = run_blocks(arms, rounds=rounds, steps=workload.steps, seed=setting.seed)
        checked = run_checked_steps(traced, arms["tracer"])
        losses = settings.losses_of(tracer)
        settings.check_nothing_lost(losses, workload.name)
        check_stored(setting.memory_dir, version, traced, checked)
        for copies in (waiting_copies, blocking_copies):
            copies.check()
    summary: dict[str, Any] = {
        **described(workload, untraced, rounds),
        "untraced": {"step_s": step_seconds(blocks, "untraced")},
    }
    for arm_name in ARMS:
        summary[arm_name] = {
            "ratio": ratio_of(blocks, arm_name, "untraced"),
            "step_s": step_seconds(blocks, arm_name),
            "cpu_s_a_step": step_seconds(blocks, arm_name, clock="cpu_s"),
        }
    summary["tracer"]["losses"] = losses
    return blocks, summary
