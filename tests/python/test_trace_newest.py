"""Choosing the newest row of every sample."""

from __future__ import annotations

import numpy as np
import pytest

from ml_debugger.trace import newest
from ml_debugger.trace.newest import NewestRows


@pytest.mark.parametrize("unsplit_rows", [1 << 20, 10])
def test_the_last_row_of_every_sample_is_kept(unsplit_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "_MAX_UNSPLIT_ROWS", unsplit_rows)
    generator = np.random.default_rng(0)
    rows = NewestRows(5000)
    samples = []
    for _ in range(100):
        dataset_type = ["train", "val", "", "0"][int(generator.integers(0, 4))]
        input_ids = [str(number) if number else "" for number in generator.integers(0, 700, 50)]
        rows.add(dataset_type, input_ids)
        samples += [(dataset_type, input_id) for input_id in input_ids]
    last = {sample: position for position, sample in enumerate(samples)}
    assert np.flatnonzero(rows.mask()).tolist() == sorted(last.values())


def test_no_rows_give_an_empty_mask() -> None:
    assert NewestRows(0).mask().tolist() == []


def test_a_type_and_an_id_that_look_alike_together_stay_apart() -> None:
    rows = NewestRows(4)
    rows.add("a", ["bc", "c"])
    rows.add("ab", ["c", "bc"])
    assert rows.mask().all()
