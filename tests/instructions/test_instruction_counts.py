"""Instructions of the hook path and of the writer, beside the recorded ones: `make instructions`."""

from __future__ import annotations

import pytest

from benchmarks.instructions import counting


@pytest.mark.timeout(900)
def test_hook_path_and_writer_take_no_more_instructions_than_recorded() -> None:
    problem = counting.missing_tool()
    if problem is not None:
        pytest.skip(problem)
    recorded = counting.recorded_counts().get(counting.environment())
    if recorded is None:
        pytest.skip(
            f"no counts are recorded for {counting.environment()} (make instructions-record writes them)"
        )
    counted = counting.count()
    print(counting.side_by_side(recorded, counted))
    assert not counting.grown(recorded, counted)
