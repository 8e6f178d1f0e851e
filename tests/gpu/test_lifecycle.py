"""Ends, forks and failures: each in a process of its own. Pinned memory is given back."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ml_debugger import TracerConfig, _core, open_trace
from ml_debugger.training import ClassificationTracer
from patterns import Emitter, pattern, same_bits
from recording import TAP, answer_of, check_staged, row_ids, run_program, stored

MIB = 1 << 20


@pytest.mark.parametrize(("ending", "status"), [("returns", 0), ("sys.exit", 7), ("raises", 1)])
def test_a_process_that_ends_with_copies_on_their_way_loses_nothing(
    device: torch.device, ending: str, status: int
) -> None:
    calls = 30
    done = run_program("exit_with_copies.py", device.type, ending, str(calls))
    assert done.returncode == status, done.stderr
    assert ("ValueError: the end of a training run" in done.stderr) == (ending == "raises")
    assert "CUDA error" not in done.stderr
    expected = torch.cat([pattern((4, 1 << 14), torch.float32, call) for call in range(calls)])
    assert same_bits(stored("out"), expected)


def test_fork_after_cuda_leaves_parent_and_child_sound(device: torch.device) -> None:
    done = run_program("fork_after_cuda.py", device.type)
    assert answer_of(done) == {"child": 0, "parent": True, "loader": True}, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(240)
def test_a_lost_context_is_the_users_exception_and_leaves_cpu_and_store_alone(device: torch.device) -> None:
    untraced = run_program("lose_context.py", device.type, "untraced")
    traced = run_program("lose_context.py", device.type, "traced")
    before, after = answer_of(untraced), answer_of(traced)
    assert before["raised"] is not None
    assert after["raised"] == before["raised"]
    assert traced.returncode == untraced.returncode, traced.stderr

    good_rows = 20 * 4
    rows = after["gpu"]
    assert rows["rows_in_flight"] == 0
    assert rows["rows_submitted"] == rows["rows_committed"] + rows["rows_failed"] + rows["rows_discarded"]
    assert good_rows <= rows["rows_submitted"]
    assert rows["rows_committed"] >= good_rows  # each of them was synchronised before the failure
    values = stored("out", "gpu")
    assert len(values) == rows["rows_committed"]
    for call, stored_rows in enumerate(values.split(4)):
        assert same_bits(stored_rows, pattern((4, 4096), torch.float32, call)), f"call {call}"

    assert after["cpu"] == after["cpu_before_close"]
    assert after["cpu"]["rows_submitted"] == after["cpu"]["rows_committed"] == 40
    assert after["trouble"] == []
    expected = torch.cat([pattern((4, 64), torch.float32, call) for call in range(10)])
    assert same_bits(stored("out", "cpu"), expected)
    assert open_trace("net", "gpu").epochs == [-1]


def available_memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


@pytest.mark.cuda_only
def test_pinned_and_device_memory_are_bounded_and_given_back(device: torch.device) -> None:
    ring_bytes, device_ring_bytes, rounds = 128 * MIB, 32 * MIB, 24

    def use_once(number: int) -> int:
        """Device memory that tracers hold: two share one ring."""
        config = TracerConfig(
            ring_bytes=ring_bytes, device_ring_bytes=device_ring_bytes, durability="process"
        )
        values = pattern((4, 1024), torch.float32, number, device)
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        with ClassificationTracer(Emitter(), "net", f"a{number}", TAP, config=config) as one:
            with ClassificationTracer(Emitter(), "net", f"b{number}", TAP, config=config) as other:
                one(values.clone(), None, row_ids(0, 4))
                other(values.clone(), None, row_ids(0, 4))
                check_staged()
                taken = before - torch.cuda.mem_get_info()[0]
        assert _core.device_report() == {}
        assert same_bits(stored("out", f"a{number}"), values)
        return taken

    use_once(0)  # what the driver keeps for itself once
    torch.cuda.synchronize()
    device_before, host_before = torch.cuda.mem_get_info()[0], available_memory_bytes()
    taken = [use_once(number) for number in range(1, rounds)]
    torch.cuda.synchronize()
    assert max(taken) <= device_ring_bytes + 16 * MIB, taken
    assert device_before - torch.cuda.mem_get_info()[0] <= 16 * MIB
    # 23 rings that stayed pinned would be 2.9 GB.
    assert host_before - available_memory_bytes() <= 6 * ring_bytes


def test_a_tracer_that_sees_no_cuda_tensor_takes_nothing_of_the_gpu(device: torch.device) -> None:
    """A tracer that never sees a CUDA tensor takes nothing on the GPU, also where CUDA is in use."""
    torch.ones(4, device=device)
    with ClassificationTracer(Emitter(), "net", "v1", TAP) as tracer:
        tracer(pattern((4, 8), torch.float32, 0), None, row_ids(0, 4))
        report = _core.device_report()
    assert report["copies"] == 0
    assert not report["pinned"]
    assert same_bits(stored("out"), pattern((4, 8), torch.float32, 0))


@pytest.mark.cuda_only
@pytest.mark.timeout(280)
def test_compute_sanitizer_finds_nothing() -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    try:
        # Without torch's cache every tensor is an allocation of its own, whose bounds the sanitizer knows.
        done = run_program(
            "record_and_check.py", "cuda", prefix=command, timeout_s=150, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
    except subprocess.TimeoutExpired:
        pytest.skip("compute-sanitizer did not end within 150 s on this machine")
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this GPU or machine")
    assert "exact" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr


def test_the_program_for_the_sanitizer_checks_what_it_recorded(device: torch.device) -> None:
    done = run_program("record_and_check.py", device.type)
    assert done.returncode == 0, done.stdout + done.stderr
