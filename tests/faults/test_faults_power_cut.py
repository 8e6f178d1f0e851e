"""Power cuts, on a loop image with ext4 that is shut down under a recorder: what each durability promises."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disks import ext4
from fork_server import ForkServer
from injection import require_strace
from rank_processes import Ranks
from trials import Score, rounds
from write_log import WriteLog

CUTS_A_DISK = 5


def another_boot(folder: Path) -> str:
    """A file that holds the id of a boot that never was."""
    path = folder / f"boot-{uuid.uuid4()}"
    path.write_text(f"{uuid.uuid4()}\n")
    return str(path)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_power_cut_costs_what_the_durability_says(
    durability: str, make_trial: Callable[..., Any], score: Callable[[str], Score], seed: int, tmp_path: Path
) -> None:
    """``power``: nothing acknowledged. ``process``: at most open segments, and no crash of the next run."""
    survives, promise = ("flushed", "all acknowledged") if durability == "power" else ("sealed", "all sealed")
    tally = score(f"power cut on ext4, durability {durability}: {promise} rows are there")
    choice = random.Random(seed)
    config = {"durability": durability, "commit_interval_s": 0.02}
    total = rounds(3, 0.25)
    for first in range(0, total, CUTS_A_DISK):
        with ext4(tmp_path / f"disk-{first}", 128) as disk:
            trial = make_trial(tally, config=config, data_dir=disk.mount / "data")
            boot = another_boot(tmp_path)
            for _ in range(min(CUTS_A_DISK, total - first)):
                tally.rounds += 1
                # A part that is sealed and a part that is open when the power goes.
                steps = [["open"], ["train", 4, 2], ["close"], ["open"], ["train", None, 3]]
                process = trial.start(
                    steps, survives=survives, tolerant=True, boot_id_file=boot, pause_s=0.002, flush_every=4
                )
                time.sleep(0.1 + choice.random())
                disk.cut()
                tally.fired += disk.is_cut()
                process.kill()
                trial.wait(process)
                disk.detach()
                disk.attach()
                boot = another_boot(tmp_path)
                trial.judge(boot_id_file=boot)
            assert trial.verify(boot_id_file=boot) > 0
    assert tally.fired == tally.rounds


def test_a_drop_of_what_is_staged_is_synced_where_it_was_staged_too(
    server: ForkServer, tmp_path: Path
) -> None:
    """Else a power cut brings the segment back, and the next tracer moves it home."""
    require_strace()
    job = Ranks(server, tmp_path / "job")
    source = """
tracer = open_tracer(staging_dir=folder / "stage")
call(tracer, 0)
tracer.flush()
reach("staged")
wait_for("drop")
tracer.drop_epoch_data(0)
reach("dropped")
wait_for("end")
"""
    try:
        process = job.start(0, source)
        job.reached("staged", 0, process)
        with WriteLog(process.pid, tmp_path / "log") as log:
            job.tell("drop")
            job.reached("dropped", 0, process)
        job.tell("end")
        assert process.wait(60) == 0, process.output()
    finally:
        job.end()
    operations = log.operations()
    renames = [
        number
        for number, operation in enumerate(operations)
        if operation.name == "rename" and "/trash-" in operation.paths[1]
    ]
    homes = {str(Path(operations[number].paths[1]).parent) for number in renames}
    assert len(homes) == 2
    assert homes <= {
        operation.paths[0] for operation in operations[renames[-1] :] if operation.name == "fsync"
    }
