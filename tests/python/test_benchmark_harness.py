"""The parts that all benchmarks share: statistics, timed blocks, results."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import blocks as timed
from benchmarks.harness.blocks import Arm, Block, ratio_of, rounds_within, run_blocks, step_seconds
from benchmarks.harness.estimates import describe_samples, estimate_median
from benchmarks.harness.machine import describe_machine, filesystem_of, missing_gpu
from benchmarks.harness.results import Bar, Findings, write_results


def test_the_interval_of_a_median_covers_it_and_tightens_with_more_samples() -> None:
    generator = torch.Generator().manual_seed(1)
    few = estimate_median(torch.randn(10, generator=generator).tolist())
    many = estimate_median(torch.randn(1000, generator=generator).tolist())
    assert few.low <= few.median <= few.high
    assert many.low <= 0.05
    assert many.high >= -0.05
    assert many.high - many.low < (few.high - few.low) / 3
    assert (few.samples, many.level) == (10, 0.95)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(60):
        estimate = estimate_median(torch.randn(40, generator=generator).tolist())
        covered += estimate.low <= 0 <= estimate.high
    assert 50 <= covered <= 60


def test_an_interval_is_the_same_in_every_run_and_a_constant_has_no_width() -> None:
    samples = [1.0, 4.0, 2.0, 8.0]
    assert estimate_median(samples) == estimate_median(samples)
    constant = estimate_median([3.0] * 5)
    assert (constant.low, constant.median, constant.high) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="no samples"):
        estimate_median([])


def test_the_tail_of_samples_is_described_by_their_quantiles() -> None:
    described = describe_samples([float(value) for value in range(1, 1001)])
    assert described["median"] == 500.5
    assert described["worst"] == 1000
    assert math.isclose(described["p99"], 990.01)
    assert described["samples"] == 1000


class Clock:
    """Time that passes only when told to, for wall, CPU and the thread alike."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.cpu_s = self.thread_s = 0.0
        monkeypatch.setattr(timed.time, "perf_counter", lambda: self.wall_s)
        monkeypatch.setattr(timed.time, "process_time", lambda: self.cpu_s)
        monkeypatch.setattr(timed.time, "thread_time", lambda: self.thread_s)

    def arm(self, step_s: float, drain_s: float) -> Arm:
        left: list[float] = []

        def run(steps: int) -> None:
            self.wall_s += steps * step_s
            self.cpu_s += steps * step_s / 2
            self.thread_s += steps * (step_s + drain_s) / 4
            left.append(drain_s)

        def drain() -> None:
            while left:
                self.wall_s += left.pop()

        return Arm(run, drain)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    return Clock(monkeypatch)


def test_the_drain_of_a_block_counts_as_its_time(clock: Clock) -> None:
    arms = {"plain": clock.arm(0.01, 0), "traced": clock.arm(0.01, 0.03)}
    blocks = run_blocks(arms, rounds=8, steps=30)
    assert math.isclose(step_seconds(blocks, "plain").median, 0.01)
    assert math.isclose(step_seconds(blocks, "traced").median, 0.011)
    assert math.isclose(ratio_of(blocks, "traced", "plain").median, 1.1)
    assert math.isclose(ratio_of(blocks, "traced", "plain", clock="cpu_s").median, 1.0)
    assert math.isclose(ratio_of(blocks, "traced", "plain", clock="thread_s").median, 4.0)


def test_every_round_has_every_arm_once_in_an_order_that_changes(clock: Clock) -> None:
    arms = {name: clock.arm(0.01, 0) for name in ("a", "b", "c")}
    blocks = run_blocks(arms, rounds=20, steps=30, seed=5)
    orders = ["".join(block.arm for block in blocks if block.round == number) for number in range(20)]
    assert {"".join(sorted(order)) for order in orders} == {"abc"}
    assert len(set(orders)) > 3
    again = run_blocks(arms, rounds=20, steps=30, seed=5)
    assert [block.arm for block in again] == [block.arm for block in blocks]


def test_arms_are_compared_within_a_round_so_that_drift_cancels() -> None:
    slow = [1.0, 2.0, 4.0, 8.0]
    blocks = [Block(number, "plain", 30, 30 * value, 0.1, 0.1) for number, value in enumerate(slow)]
    blocks += [Block(number, "traced", 30, 30 * value * 1.02, 0.1, 0.1) for number, value in enumerate(slow)]
    ratio = ratio_of(blocks, "traced", "plain")
    assert math.isclose(ratio.low, 1.02)
    assert math.isclose(ratio.high, 1.02)


def test_rounds_fit_the_budget_within_their_limits() -> None:
    assert rounds_within(60, 3, 2, least=4, most=30) == 10
    assert rounds_within(60, 3, 20, least=4, most=30) == 4
    assert rounds_within(60, 3, 0.01, least=4, most=30) == 30


def test_results_say_where_how_and_what(tmp_path: Path) -> None:
    machine = describe_machine(torch.device("cpu"))
    samples = [Block(0, "plain", 30, 1.0, 0.5, 0.25)]
    findings = Findings({"steps": 30}, samples, {"ratio": estimate_median([1.0])}, "s", [Bar("plain", 1.0)])
    path = write_results(tmp_path / "new", "step_time", "What?", machine, findings)
    document = json.loads(path.read_text())
    assert path.name == "step_time.json"
    assert list(path.parent.iterdir()) == [path]
    assert document["question"] == "What?"
    seconds = {"wall_s": 1.0, "cpu_s": 0.5, "thread_s": 0.25}
    assert document["samples"] == [{"round": 0, "arm": "plain", "steps": 30, **seconds}]
    assert document["summary"]["ratio"]["median"] == 1.0
    assert document["options"] == {"steps": 30}
    for key in ("date", "cpu", "gpu", "gpu_driver", "torch", "cuda", "python", "package", "git_revision"):
        assert key in document["machine"]


def test_the_filesystem_of_a_folder_is_that_of_its_mount() -> None:
    if not Path("/proc/self/mounts").exists():
        pytest.skip("there is no /proc here")
    assert filesystem_of(Path("/proc/self")) == "proc"


def test_a_missing_gpu_is_told_in_one_sentence() -> None:
    problem = missing_gpu()
    if torch.cuda.is_available():
        assert problem is None
    else:
        assert problem is not None
        assert "\n" not in problem
        assert torch.__version__ in problem


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_stays_with_a_process_that_asks_for_it() -> None:
    program = """if True:
        import sys
        from benchmarks.harness.allocator import keep_freed_memory
        def resident_bytes():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        assert sys.argv[1] == "default" or keep_freed_memory()
        before = resident_bytes()
        block = bytearray(b"x") * (64 << 20)
        del block
        print(resident_bytes() - before)
    """
    kept, returned = (
        int(subprocess.run([sys.executable, "-c", program, how], capture_output=True, check=True).stdout)
        for how in ("kept", "default")
    )
    assert returned < 32 << 20 < kept
