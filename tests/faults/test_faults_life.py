"""The life of a trace as a state machine: write, read, drop, reopen, export, in any order."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ml_debugger import TracerConfig, load_export, open_trace
from ml_debugger.errors import NotFoundError
from ml_debugger.training import ClassificationTracer
from recorder import Scene
from trials import is_long, rounds

EPOCHS = st.sampled_from([None, 0, 1, 2])
# (attempt, epoch or -1, id, value, label or None)
Row = tuple[int, int, str, float, int | None]


class Life(RuleBasedStateMachine):
    """A trace and what it should hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.folder = Path(tempfile.mkdtemp(prefix="mld-life-"))
        self.tracer: ClassificationTracer | None = None
        self.attempt = -1
        self.committed: list[Row] = []
        self.calls = 0
        self.truth = False

    @initialize(durability=st.sampled_from(["power", "process"]), ring=st.sampled_from([1 << 18, 1 << 20]))
    def begin(self, durability: str, ring: int) -> None:
        self.config = TracerConfig(
            data_dir=self.folder / "data", durability=durability, ring_bytes=ring, commit_interval_s=0.001
        )
        self.open(recreate=False)

    def open(self, recreate: bool) -> None:
        self.tracer = ClassificationTracer(
            Scene(), "net", "v0", {"features": "tap"}, force_table_recreate=recreate, config=self.config
        )
        self.attempt += 1
        if recreate:
            self.committed, self.truth = [], False

    @precondition(lambda self: self.tracer is not None)
    @rule(
        rows=st.integers(0, 4), width=st.sampled_from([4, 700, 40000]), epoch=EPOCHS, labelled=st.booleans()
    )
    def call(self, rows: int, width: int, epoch: int | None, labelled: bool) -> None:
        self.calls += 1
        value = float(self.calls)
        ids = [f"s{self.calls % 3}-{row}" for row in range(rows)]
        labels = torch.arange(rows) if labelled else None
        assert self.tracer is not None
        self.tracer(torch.full((rows, width), value), labels, ids, "train", epoch)
        number = -1 if epoch is None else epoch
        self.committed += [
            (self.attempt, number, key, value, row if labelled else None) for row, key in enumerate(ids)
        ]
        self.truth = self.truth or (labelled and rows > 0)

    @precondition(lambda self: self.tracer is not None)
    @rule()
    def failing_call(self) -> None:
        assert self.tracer is not None
        try:
            self.tracer(torch.ones(2, 2, 2, 2, 2)[0], None, ["a"], "train", 0)  # one id for two samples
        except ValueError:
            return
        raise AssertionError("a wrong number of ids was taken")

    @precondition(lambda self: self.tracer is not None)
    @rule(epoch=st.sampled_from([0, 1, 2, 7]), own=st.booleans())
    def drop_epoch(self, epoch: int, own: bool) -> None:
        assert self.tracer is not None
        gone = [row for row in self.committed if row[1] == epoch and (not own or row[0] == self.attempt)]
        deleted = self.tracer.drop_epoch_data(epoch, attempt=self.attempt if own else None)
        assert deleted["extracted_feature"] == len(gone)
        assert deleted.get("ground_truth", 0) == sum(row[4] is not None for row in gone)
        self.committed = [row for row in self.committed if row not in gone]

    @precondition(lambda self: self.tracer is not None)
    @rule()
    def drop_version(self) -> None:
        assert self.tracer is not None
        self.tracer.drop_version_data()
        self.committed = []

    @precondition(lambda self: self.tracer is not None)
    @rule()
    def close(self) -> None:
        assert self.tracer is not None
        self.tracer.close()
        stats = self.tracer.stats()
        assert stats.rows_in_flight == stats.rows_failed == stats.rows_discarded == 0
        self.tracer = None

    @precondition(lambda self: self.tracer is None)
    @rule(recreate=st.booleans())
    def reopen(self, recreate: bool) -> None:
        self.open(recreate)

    @precondition(lambda self: self.tracer is not None)
    @rule()
    def export(self) -> None:
        assert self.tracer is not None
        path = self.tracer.export(self.folder / "out.zip", dedupe=False)
        assert path is not None
        assert self.read(load_export(path)) == Counter(self.committed_values())

    @invariant()
    def readers_see_what_was_written(self) -> None:
        if self.attempt < 0:
            return
        if self.tracer is not None:
            self.tracer.flush()
        trace = open_trace("net", "v0", data_dir=self.folder / "data")
        assert self.read(trace) == Counter(self.committed_values())
        assert trace.epochs == sorted({row[1] for row in self.committed})
        newest = {row[1:3] for row in self.committed if row[1] >= 0}
        without = sum(row[1] < 0 for row in self.committed)
        assert trace.num_rows("extracted_feature", dedupe=True) == len(newest) + without

    def committed_values(self) -> list[Any]:
        return [row[1:] for row in self.committed]

    def read(self, trace: Any) -> Counter[Any]:
        """(epoch, id, value, label) of all rows, every value of a row looked at."""
        features = trace.tensors("extracted_feature", columns=["input_id", "n_epoch", "features", "row_id"])
        truth = trace.tensors("ground_truth", columns=["row_id", "label"])
        labels = dict(zip(map(int, truth["row_id"]), map(int, truth["label"]), strict=True))
        found: Counter[Any] = Counter()
        columns = (features[name] for name in ("n_epoch", "input_id", "features", "row_id"))
        for epoch, key, x, row_id in zip(*columns, strict=True):
            assert bool((x == x[0]).all())
            found[int(epoch), str(key), float(x[0]), labels.get(int(row_id))] += 1
        return found

    def teardown(self) -> None:
        try:
            if self.tracer is not None:
                self.tracer.close()
            if self.attempt >= 0:
                try:
                    open_trace("net", "v0", data_dir=self.folder / "data")
                except NotFoundError as error:
                    raise AssertionError("the trace is gone") from error
        finally:
            shutil.rmtree(self.folder)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=rounds(8, 0.2),
    stateful_step_count=40 if is_long() else 15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
