"""Two or more ways to do the same steps, timed side by side in one process.

Steps are timed in *blocks* of one way (an *arm*), the drain inside: single alternating steps would hide the
work that one of them leaves behind in the time of the next. The blocks of a round come in random order, and
arms are compared within a round, so that what drifts (clocks, a neighbour) meets all of them alike.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness.estimates import Estimate, estimate_median

LEAST_STEPS = 30
# Several commit intervals: a shorter block would hold the drain of all that it captured, where training has
# one drain at its end.
BLOCK_S = 2.0
Clock = Literal["wall_s", "cpu_s", "thread_s"]


@dataclass(frozen=True)
class Arm:
    """One way to do the steps.

    Attributes:
        run: Does that many steps.
        drain: Returns when nothing is left to do of them, here or on a device.
    """

    run: Callable[[int], None]
    drain: Callable[[], None]


@dataclass(frozen=True)
class Block:
    """One timed block.

    Attributes:
        round: Blocks with the same number ran one after the other.
        arm: Name of the arm.
        steps: How many.
        wall_s: From its begin until it was drained.
        cpu_s: Of all threads of the process meanwhile.
        thread_s: CPU time of the thread that does the steps: what they themselves pay, and what noise of the
            machine changes least.
    """

    round: int
    arm: str
    steps: int
    wall_s: float
    cpu_s: float
    thread_s: float


def run_blocks(
    arms: Mapping[str, Arm],
    *,
    rounds: int,
    steps: int,
    seed: int = 0,
    before: Callable[[], None] = lambda: None,
) -> list[Block]:
    """Time ``rounds`` blocks of every arm, each of ``steps`` steps. All arms are warm before.

    ``before`` is called ahead of every block, outside of its time.
    """
    order, shuffled = list(arms), random.Random(seed)
    blocks = []
    for number in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            before()
            blocks.append(_time_block(number, name, arms[name], steps))
    return blocks


def _time_block(number: int, name: str, arm: Arm, steps: int) -> Block:
    arm.drain()
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    began = [clock() for clock in clocks]
    arm.run(steps)
    arm.drain()
    return Block(number, name, steps, *(clock() - start for clock, start in zip(clocks, began, strict=True)))


def seconds_per_step(arm: Arm, steps: int) -> float:
    """A rough figure, to choose the number of rounds by."""
    return _time_block(0, "", arm, steps).wall_s / steps


def steps_of_block(step_s: float, block_s: float = BLOCK_S) -> int:
    """At least `LEAST_STEPS`, and at least ``block_s`` of them."""
    return max(LEAST_STEPS, math.ceil(block_s / step_s))


def rounds_within(budget_s: float, arms: int, block_s: float, *, least: int, most: int) -> int:
    """How many rounds fit into ``budget_s``."""
    return max(least, min(most, int(budget_s / (arms * block_s))))


def ratio_of(blocks: list[Block], arm: str, base: str, clock: Clock = "wall_s") -> Estimate:
    """Time of a step of ``arm`` over that of ``base``, by the rounds that have both: median and interval."""
    times: dict[tuple[int, str], float] = {
        (block.round, block.arm): getattr(block, clock) / block.steps for block in blocks
    }
    ratios = [
        times[number, arm] / value
        for (number, name), value in times.items()
        if name == base and (number, arm) in times
    ]
    return estimate_median(ratios)


def step_seconds(blocks: list[Block], arm: str, clock: Clock = "wall_s") -> Estimate:
    """Seconds of a step of ``arm``: median over blocks and interval."""
    mine = [block for block in blocks if block.arm == arm]
    return estimate_median([getattr(block, clock) / block.steps for block in mine])
