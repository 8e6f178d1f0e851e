"""Question: what does a training step pay for the same job done by a tracer and by other tools?

Method: the network of `training_overhead`, once for each tool with its own copy; blocks of at least 30 steps,
and of 1 s (2 s in a full run) or 256 MB, drained within their time, in random order within a round, in one
process, data on the disk; ratios to the untraced arm of the round. Jobs of several sizes: features, logits
and labels at B = 32 and 256, a map of 16 KiB a sample besides (B = 1024 in a full run). The tracer runs with
``durability="process"``, which is what the others do at most, and with ``"power"``. A tool that is not
installed is left out by name; one whose step takes more than four untraced ones has two blocks of 30 steps,
and one that would need more than 20 s for a block has none, and is named. Afterwards everything is read back:
the ids of all rows, and features, logits, labels and maps of the last steps bit for bit; a tool that stores
something else has no figure.

Excluded: opening, closing and reading back; what survives a crash differs and is listed (`survives`).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.baselines import ALL, Baseline
from benchmarks.baselines.tracer import DurableTracer, Tracer
from benchmarks.cpu.models import MAP_BYTES, SAMPLE_BYTES, depth_for_rate, make_trainer, untraced_arm
from benchmarks.cpu.training_overhead import (
    CHECKED_STEPS,
    FEATURE_LAYERS,
    MAP_LAYERS,
    compared,
    one_thread,
)
from benchmarks.gpu.models import Trainer
from benchmarks.harness import setting as settings
from benchmarks.harness.blocks import (
    BLOCK_S,
    LEAST_STEPS,
    Arm,
    Block,
    rounds_within,
    run_blocks,
    seconds_per_step,
    step_seconds,
    steps_of_block,
)
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting

NAME = "cpu_baselines"
QUESTION = "What does a training step pay for the same job done by a tracer and by other tools?"
SLOW_RATIO = 4
LONGEST_BLOCK_S = 20
SHORT_BLOCK_S = 1.0
LARGEST_BLOCK_BYTES = 256_000_000
UNTRACED = "untraced"


def measure(setting: Setting) -> Findings:
    jobs = [(32, FEATURE_LAYERS), (256, FEATURE_LAYERS), (256, MAP_LAYERS)]
    if setting.is_full:
        jobs += [(1024, FEATURE_LAYERS), (1024, MAP_LAYERS)]
    if setting.is_quick:
        jobs = [(4, MAP_LAYERS)]
    tools: list[type[Baseline]] = [Tracer, DurableTracer]
    skipped = {}
    for tool in ALL:
        missing = tool.missing()
        if missing is None:
            tools.append(tool)
        else:
            skipped[tool.name] = f"{missing} is not installed"
    summary: dict[str, Any] = {"skipped": skipped, "versions": versions_of(tools), "jobs": []}
    samples: dict[str, list[Block]] = {}
    bars: list[Bar] = []
    with one_thread():
        for batch_size, layers in jobs:
            job = f"B = {batch_size}, {' and '.join(layers)}"
            samples[job], found = time_job(setting, tools, batch_size, layers)
            summary["jobs"].append({"job": job, **found})
            for name, arm in found["arms"].items():
                ratio = arm["ratio"]
                bars.append(Bar(f"{job}: {name}", ratio.median, ratio.low, ratio.high))
    return Findings(setting.described(), samples, summary, "step time / untraced", bars, 1.0)


def told(error: BaseException) -> str:
    """The error, or what caused it in a thread, as one line."""
    return "".join(traceback.format_exception_only(error.__cause__ or error)).strip()[:500]


def versions_of(tools: list[type[Baseline]]) -> dict[str, str]:
    """Of the packages that the tools use."""
    owners = importlib.metadata.packages_distributions()
    found = {}
    for module in sorted({name for tool in tools for name in tool.requires}):
        for package in owners.get(module, ()):
            found[package] = importlib.metadata.version(package)
    return found


def time_job(
    setting: Setting, tools: list[type[Baseline]], batch_size: int, layers: dict[str, str]
) -> tuple[list[Block], dict[str, Any]]:
    """Time all tools on one job; a tool that fails has its error in place of a figure."""
    depth = 0 if setting.is_quick else depth_for_rate(batch_size, setting.seed)
    untraced = make_trainer(batch_size, depth, setting.seed)
    trainers: dict[str, Trainer] = {}
    opened: dict[str, Baseline] = {}
    failed: dict[str, str] = {}
    arms = {UNTRACED: untraced_arm(untraced)}
    for tool in tools:
        trainer = copy.deepcopy(untraced)
        folder = setting.disk_dir / tool.__name__
        folder.mkdir()
        try:
            baseline = tool(trainer.model, layers, folder)
            arm = arm_of(trainer, baseline)
            arm.run(3)
            arm.drain()
        except Exception as error:
            failed[tool.name] = told(error)
            continue
        arms[tool.name], opened[tool.name], trainers[tool.name] = arm, baseline, trainer
    took_s = {name: seconds_per_step(arm, 2) for name, arm in arms.items()}
    for name in [name for name in opened if took_s[name] * LEAST_STEPS > LONGEST_BLOCK_S]:
        failed[name] = f"a step takes {took_s[name] / took_s[UNTRACED]:.0f} untraced ones: no block was timed"
        del arms[name]
        opened.pop(name).close()
    step_bytes = batch_size * (SAMPLE_BYTES + (MAP_BYTES if "map" in layers else 0))
    blocks = time_arms_fairly(setting, arms, took_s, step_bytes)
    summary: dict[str, Any] = {
        "depth": depth,
        "batch_size": batch_size,
        "captured_bytes_a_step": step_bytes,
        "untraced_step_s": step_seconds(blocks, UNTRACED),
        "failed": failed,
        "arms": {},
    }
    for name, baseline in opened.items():
        try:
            check_stored(trainers[name], baseline, arms[name])
        except Exception as error:
            failed[name] = told(error)
            continue
        summary["arms"][name] = {
            **compared(blocks, name, UNTRACED),
            "survives": baseline.survives,
            "bytes_on_disk": disk_bytes(baseline.folder),
            "rows_lost": 0,
        }
    settings.empty_folder(setting.disk_dir)
    if Tracer.name in failed or DurableTracer.name in failed:
        raise settings.WrongDataError(f"the tracer's own run has no figure: {failed}")
    return blocks, summary


def arm_of(trainer: Trainer, baseline: Baseline) -> Arm:
    def forward(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return baseline.forward(inputs, labels, trainer.ids)

    return Arm(lambda steps: trainer.run(steps, forward), baseline.drain)


def time_arms_fairly(
    setting: Setting, arms: dict[str, Arm], took_s: dict[str, float], step_bytes: int
) -> list[Block]:
    """Two rounds of short blocks for the slow arms, then rounds of the others; the untraced one in both."""
    slow = {name for name in arms if took_s[name] > SLOW_RATIO * took_s[UNTRACED]}
    fast = {name: arm for name, arm in arms.items() if name not in slow}
    short = 2 if setting.is_quick else LEAST_STEPS
    blocks = []
    if slow:
        beside = {name: arm for name, arm in arms.items() if name in slow or name == UNTRACED}
        blocks = run_blocks(beside, rounds=2, steps=short, seed=setting.seed)
    block_s = BLOCK_S if setting.is_full else SHORT_BLOCK_S
    steps = max(short, min(steps_of_block(took_s[UNTRACED], block_s), LARGEST_BLOCK_BYTES // step_bytes))
    budget_s = 0 if setting.is_quick else 180.0 if setting.is_full else 30.0
    average_s = steps * sum(took_s[name] for name in fast) / len(fast)
    rounds = rounds_within(budget_s, len(fast), average_s, least=1 if setting.is_quick else 4, most=25)
    more = run_blocks(fast, rounds=rounds, steps=short if setting.is_quick else steps, seed=setting.seed + 1)
    return blocks + [dataclasses.replace(block, round=block.round + 2) for block in more]


def check_stored(trainer: Trainer, baseline: Baseline, arm: Arm) -> None:
    """Do a few more steps and compare what they computed with what is read back.

    Raises:
        WrongDataError: Something else is stored.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    model, first_step = trainer.model, trainer.steps

    def keep(column: str) -> Any:
        def hook(module: nn.Module, given: Any, returned: torch.Tensor) -> None:
            seen.setdefault(column, []).append(returned.detach().clone())

        return hook

    modules = {name: model.get_submodule(path) for name, path in baseline.layers.items()}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    handles.append(model.fc.register_forward_hook(keep("logits")))
    arm.run(CHECKED_STEPS)
    arm.drain()
    for handle in handles:
        handle.remove()
    baseline.close()
    stored = baseline.read()
    for step in range(first_step, first_step + CHECKED_STEPS):
        seen.setdefault("label", []).append(trainer.labels[step % len(trainer.labels)])
    rows = CHECKED_STEPS * len(trainer.ids)
    for column, parts in seen.items():
        expected = torch.cat(parts)
        last = torch.from_numpy(np.array(stored[column][-rows:]))
        settings.check_equal(last, expected, f"{baseline.name}: {column}")
    ids = np.array(stored["input_id"])
    if not np.array_equal(ids, np.resize(np.array(trainer.ids), len(ids))):
        raise settings.WrongDataError(f"{baseline.name}: ids read back different")
    kept_everything = baseline.survives != "nothing" or hasattr(baseline, "store")
    if kept_everything and len(ids) != trainer.steps * len(trainer.ids):
        raise settings.WrongDataError(
            f"{baseline.name}: expected {trainer.steps * len(trainer.ids)} rows, there are {len(ids)}"
        )


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
