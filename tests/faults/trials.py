"""A store under trial: rounds of recording with a fault in each, a ledger a round, the judge at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acknowledgements import Promise, Shape
from fork_server import ForkServer, Hung, Process

CONFIG = {"ring_bytes": 4 << 20, "commit_interval_s": 0.01}
# Steps of a round that nothing disturbs.
CALM = [["open"], ["train", 3, 1], ["close"]]


@dataclass
class Score:
    """One line of the table of `docs/reliability.md`."""

    fault: str
    rounds: int = 0
    fired: int = 0
    lost: int = 0
    hung: int = 0
    corrupt: int = 0

    def add(self, other: Score) -> None:
        """Count what another test has seen of the same fault."""
        for name in ("rounds", "fired", "lost", "hung", "corrupt"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Scoreboard:
    """Lines by fault, in the order in which they came."""

    scores: dict[str, Score] = field(default_factory=dict)

    def of(self, fault: str) -> Score:
        return self.scores.setdefault(fault, Score(fault))


class Trial:
    """One data directory with the ledgers of all that was recorded there.

    Args:
        server: Where recorders and judges come from.
        folder: For ledgers and logs; on another filesystem than ``data_dir`` when that one is cut off.
        score: Where rounds and findings are counted.
    """

    def __init__(
        self,
        server: ForkServer,
        folder: Path,
        score: Score,
        *,
        data_dir: Path | None = None,
        shape: Shape | None = None,
        seed: int = 0,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.server, self.folder, self.score, self.seed = server, folder, score, seed
        self.data_dir = data_dir or folder / "data"
        self.shape = shape or Shape()
        self.config = {**CONFIG, **(config or {})}
        self.promises: list[Promise] = []
        self.processes: list[Process] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(
        self, steps: list[Any], *, config: dict[str, Any] | None = None, survives: str = "flushed", **job: Any
    ) -> Process:
        """Begin a round of recording."""
        number = len(self.promises)
        promise = Promise.of(number, self.folder / f"ledger-{number}", self.shape, survives)
        self.promises.append(promise)
        request = {
            "kind": "record",
            "log": str(self.folder / f"round-{number}.log"),
            "data_dir": str(self.data_dir),
            "ledger": promise.path,
            "shape": promise.shape,
            "number": number,
            "seed": self.seed + number,
            "steps": steps,
            "config": {**self.config, **(config or {})},
            **job,
        }
        process = self.server.start(request)
        self.processes.append(process)
        return process

    def wait(self, process: Process, deadline_s: float = 60.0) -> int:
        """Its exit status; a hang is counted."""
        try:
            return process.wait(deadline_s)
        except Hung:
            self.score.hung += 1
            raise

    def judge(self, **job: Any) -> int:
        """Let the judge read the store; returns the rows that are there, fails on any finding."""
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        request = {
            "kind": "judge",
            "log": str(self.folder / "judge.log"),
            "data_dir": str(self.data_dir),
            "promises": [asdict(promise) for promise in self.promises],
            "tracers": self.shape.tracers,
            "report": str(report),
            **job,
        }
        process = self.server.start(request)
        status = self.wait(process)
        if status != 0:
            self.score.corrupt += 1
            raise AssertionError(f"{self._title()}: the reader ended with {status}\n{process.output()}")
        findings = json.loads(report.read_text())
        rows = int(findings.pop("rows"))
        if findings:
            self.score.lost += len(findings.get("lost", []))
            self.score.corrupt += sum(len(found) for kind, found in findings.items() if kind != "lost")
            last = self.processes[-1].output() if self.processes else ""
            raise AssertionError(
                f"{self._title()}: {json.dumps(findings, indent=1)}\nlast recorder:\n{last[-3000:]}"
            )
        return rows

    def verify(self, **job: Any) -> int:
        """The end of every fault test: judged, written to once more by a new process, judged again.

        Returns:
            The rows that the fault has left.
        """
        rows = self.judge(**job)
        process = self.start(CALM, **job)
        status = self.wait(process)
        if status != 0:
            self.score.corrupt += 1
            raise AssertionError(f"{self._title()}: the next run ended with {status}\n{process.output()}")
        assert self.judge(**job) > rows
        return rows

    def remove(self) -> None:
        """Take away what was found sound: long runs have thousands of stores, tens of GB."""
        shutil.rmtree(self.folder)

    def _title(self) -> str:
        return f"seed {self.seed}, after round {len(self.promises) - 1} in {self.data_dir}"


@contextmanager
def no_process_left(trial: Trial) -> Iterator[Trial]:
    """Kills what a failed test leaves running."""
    try:
        yield trial
    finally:
        for process in trial.processes:
            process.kill()


def rounds(short: int, share: float = 1.0) -> int:
    """How many rounds: ``short`` in `make test`, that share of ROUNDS in `make test-faults`."""
    return max(short, int(int(os.environ.get("FAULT_ROUNDS", "0")) * share))


def is_long() -> bool:
    """Whether this is `make test-faults`."""
    return bool(os.environ.get("FAULT_ROUNDS"))
