"""The judge itself: it finds each kind of damage, and nothing in a sound store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from acknowledgements import BEGUN, DROPPED, NEVER, REFUSED, RETURNED, Ledger
from trials import Score


def lie_lost(ledger: Ledger) -> None:
    ledger.begin(0, 6, 1, 3, 0)
    ledger.end(0, 6, RETURNED)
    ledger.lanes["flushed"][0] = 7


def lie_torn(ledger: Ledger) -> None:
    ledger.calls["rows"][1][2] += 1


def lie_wrong(ledger: Ledger) -> None:
    ledger.calls["crc"][2][3] ^= 1


def lie_epoch(ledger: Ledger) -> None:
    ledger.calls["epoch"][2][3] = 9


def lie_invented(ledger: Ledger) -> None:
    ledger.calls["state"][3][1] = NEVER


def lie_undead(ledger: Ledger) -> None:
    ledger.calls["state"][3][1] = REFUSED


def lie_dropped(ledger: Ledger) -> None:
    ledger.drops[0][0] = DROPPED


def lie_law(ledger: Ledger) -> None:
    ledger.tracers["law_broken"][1] = 1


def lie_committed(ledger: Ledger) -> None:
    ledger.tracers["committed"][0] += 1


def lie_submitted(ledger: Ledger) -> None:
    ledger.tracers["submitted"][0] += 1


LIES = {
    "lost": (lie_lost, "lost"),
    "torn": (lie_torn, "torn"),
    "another checksum": (lie_wrong, "wrong"),
    "another epoch": (lie_epoch, "wrong"),
    "never submitted": (lie_invented, "invented"),
    "raised and there": (lie_undead, "undead"),
    "dropped and there": (lie_dropped, "half_dropped"),
    "figures that do not add up": (lie_law, "accounts"),
    "fewer rows than committed": (lie_committed, "lost"),
    "more rows submitted than handed over": (lie_submitted, "accounts"),
}


def test_the_judge_finds_each_kind_of_damage(make_trial: Callable[..., Any]) -> None:
    trial = make_trial(Score("the judge"))
    process = trial.start([["open"], ["train", 6, 2], ["close"]])
    assert trial.wait(process) == 0, process.output()
    rows = trial.judge()
    assert rows > 0
    path = trial.folder / "ledger-0"
    truth = path.read_bytes()
    for lie, kind in LIES.values():
        ledger = trial.promises[0].open()
        assert (ledger.calls["state"] == BEGUN).sum() == 0
        lie(ledger)
        with pytest.raises(AssertionError, match=kind):
            trial.judge()
        path.write_bytes(truth)
    assert trial.judge() == rows
