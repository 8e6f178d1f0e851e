"""Contract 2 and 3: overflow "block", "discard", "raise"; a call larger than the ring; stall_timeout_s;
flush of a stuck writer. The writer is held up by the write lock of its own segment, not by a sleep."""

from __future__ import annotations

import json
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_models import (
    FLOATS,
    RING,
    by_id,
    carrier_tracer,
    carry,
    check_law,
    refused,
    rows_of,
    send,
    small_ring,
)

from ml_debugger import errors, open_trace


def stored_calls() -> dict[str, float]:
    """Value of every stored row by id, after checking that each row is of one piece."""
    stored = by_id(open_trace("net", "v1").tensors("extracted_feature"), "tap")
    assert all(bool((value == value[0]).all()) for value in stored.values())
    return {key: float(value[0]) for key, value in stored.items()}


def started(make_tracer: Any, **kwargs: Any) -> Any:
    """A tracer whose segment exists and whose first row is committed."""
    tracer = carrier_tracer(make_tracer, config=small_ring(**kwargs))
    send(tracer, 0)
    tracer.flush()
    return tracer


def test_block_loses_nothing_when_much_more_than_the_ring_is_sent(make_tracer: Any) -> None:
    tracer = started(make_tracer)
    for call in range(1, 100):
        send(tracer, call)
    tracer.flush()
    assert stored_calls() == {f"{call}-0": float(call) for call in range(100)}
    stats = tracer.stats()
    assert stats.rows_discarded == stats.rows_failed == 0
    assert 0 < stats.ring_high_water_bytes <= RING


def test_block_waits_until_the_writer_goes_on(make_tracer: Any, shut_gate: Any) -> None:
    tracer = started(make_tracer)
    gate = shut_gate()

    def train() -> None:
        for call in range(1, 41):
            send(tracer, call)

    trainer = threading.Thread(target=train)
    trainer.start()
    deadline = time.monotonic() + 30
    while tracer.stats().stalls == 0:
        assert time.monotonic() < deadline and trainer.is_alive(), (
            "40 calls of 64 KiB went through a ring of 1 MiB"
        )
        time.sleep(0.01)
    stats = tracer.stats()
    check_law(stats)
    assert stats.rows_submitted < 41 and stats.rows_committed == 1
    gate.open()
    trainer.join(60)
    assert not trainer.is_alive()
    tracer.flush()
    assert stored_calls() == {f"{call}-0": float(call) for call in range(41)}
    assert tracer.stats().stalls >= 1 and tracer.stats().stall_seconds > 0


def test_block_raises_trace_stall_error_after_the_timeout_and_recovers(
    make_tracer: Any, shut_gate: Any
) -> None:
    tracer = started(make_tracer, stall_timeout_s=1.0)
    gate = shut_gate()
    begin, sent = time.monotonic(), 0
    with refused(errors.TraceStallError) as caught:
        for call in range(1, 41):
            send(tracer, call)
            sent = call
    assert 0.9 < time.monotonic() - begin < 20
    assert isinstance(caught.value, TimeoutError) and sent < 40
    gate.open()
    send(tracer, 100)
    tracer.flush()
    expected = {f"{call}-0": float(call) for call in [*range(sent + 1), 100]}
    assert stored_calls() == expected


def test_flush_and_its_timeout_end_while_the_writer_is_held_up(make_tracer: Any, shut_gate: Any) -> None:
    tracer = started(make_tracer, stall_timeout_s=1.0)
    gate = shut_gate()
    send(tracer, 1)
    for timeout in (0.3, None):
        begin = time.monotonic()
        with refused(errors.TraceStallError):
            tracer.flush(timeout)
        assert time.monotonic() - begin < 15
    assert rows_of() == 1
    gate.open()
    tracer.flush()
    assert rows_of() == 2


def test_signals_work_while_a_call_waits_for_the_ring(start_child: Any, store: Path) -> None:
    child = start_child(
        """
        import os, signal, subprocess, sys
        from contract_models import carrier_tracer, carry
        from ml_debugger import TracerConfig
        from ml_debugger.training import ClassificationTracer
        import contract_gate

        class Stop(Exception):
            pass

        def stop(number, frame):
            raise Stop

        signal.signal(signal.SIGALRM, stop)
        def make(model, layers, config):
            return ClassificationTracer(model, "net", "v1", layers, config=config)
        tracer = carrier_tracer(make, config=TracerConfig(ring_bytes=1 << 20, commit_interval_s=0.05))
        carry(tracer, torch.zeros(1, 1 << 14), ["first"])
        tracer.flush()
        gate = subprocess.Popen([sys.executable, contract_gate.__file__, os.environ["MLD_DATA_DIR"]],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert gate.stdout.readline().startswith("held 1")
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        sent = 0
        try:
            for i in range(40):
                carry(tracer, torch.zeros(1, 1 << 14), [str(i)])
                sent += 1
        except Stop:
            print("stopped", flush=True)
        gate.communicate("\\n")
        carry(tracer, torch.ones(1, 1 << 14), ["last"])
        tracer.close()
        print(sent, tracer.stats().rows_committed)
        """
    )
    assert child.line() == "stopped"
    sent, committed = map(int, child.line().split())
    assert child.finish().returncode == 0
    assert sent < 40 and committed == sent + 2 == rows_of()


def test_discard_loses_whole_calls_counts_them_and_marks_the_gap(
    make_tracer: Any, shut_gate: Any, store: Path, foreign_read: Any
) -> None:
    tracer = started(make_tracer, overflow="discard")
    gate = shut_gate()
    for call in range(1, 61):
        send(tracer, call, rows=3, floats=FLOATS // 2)
    stats = tracer.stats()
    check_law(stats)
    assert stats.rows_submitted == 181
    assert stats.rows_discarded >= 90, "60 calls of 96 KiB cannot fit into 1 MiB"
    assert sum(stats.discarded_by_cause.values()) == stats.rows_discarded
    gate.open()
    tracer.flush()
    send(tracer, 61, rows=3, floats=FLOATS // 2)
    tracer.flush()
    stats = tracer.stats()
    kept = stored_calls()
    assert len(kept) == stats.rows_committed == 184 - stats.rows_discarded
    assert all(f"{key.split('-')[0]}-{i}" in kept for key in kept if key != "0-0" for i in range(3))
    assert {f"61-{i}" for i in range(3)} <= set(kept)
    assert all(value == float(key.split("-")[0]) for key, value in kept.items())
    with zipfile.ZipFile(tracer.export(store.parent / "out.zip")) as archive:
        discarded = json.loads(archive.read("manifest.json"))["discarded"]
    assert discarded["rows"] == stats.rows_discarded
    assert {k: n for k, n in discarded["by_cause"].items() if n} == {
        k: n for k, n in stats.discarded_by_cause.items() if n
    }
    foreign = foreign_read()
    assert len(foreign["rows"]) == stats.rows_committed
    assert sum(gap["rows"] for gap in foreign["gaps"]) == stats.rows_discarded
    assert sum(meta["discarded_rows"] for meta in foreign["meta"]) == stats.rows_discarded


def test_wait_for_save_raises_ring_overflow_once_for_what_was_discarded(
    make_tracer: Any, shut_gate: Any
) -> None:
    tracer = started(make_tracer, overflow="discard")
    tracer.wait_for_save()
    gate = shut_gate()
    for call in range(1, 41):
        send(tracer, call)
    gate.open()
    with refused(errors.RingOverflowError) as caught:
        tracer.wait_for_save()
    assert str(tracer.stats().rows_discarded) in str(caught.value)
    tracer.wait_for_save()
    assert rows_of() == tracer.stats().rows_committed


def test_raise_raises_ring_overflow_and_nothing_of_that_call_is_stored(
    make_tracer: Any, shut_gate: Any
) -> None:
    tracer = started(make_tracer, overflow="raise")
    gate = shut_gate()
    sent = 0
    with refused(errors.RingOverflowError) as caught:
        for call in range(1, 41):
            send(tracer, call)
            sent = call
    assert "ring_bytes" in str(caught.value) + str(caught.value.hint)
    gate.open()
    send_until_accepted(tracer, 100)
    tracer.flush()
    assert stored_calls() == {f"{call}-0": float(call) for call in [*range(sent + 1), 100]}
    check_law(tracer.stats())


def send_until_accepted(tracer: Any, call: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            send(tracer, call)
        except errors.RingOverflowError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return


def test_a_call_larger_than_the_ring_works_under_block(make_tracer: Any) -> None:
    tracer = started(make_tracer)
    generator = torch.Generator().manual_seed(1)
    payload = torch.randn(5, 1 << 18, generator=generator)
    carry(tracer, payload, list("abcde"), n_epoch=3)
    send(tracer, 1)
    tracer.flush()
    trace = open_trace("net", "v1")
    stored = by_id(trace.tensors("extracted_feature", n_epoch=3), "tap")
    assert torch.equal(torch.stack([stored[key] for key in "abcde"]), payload)
    assert tracer.stats().ring_high_water_bytes <= RING
    assert rows_of() == 7


def test_an_aborted_call_larger_than_the_ring_stores_nothing(make_tracer: Any) -> None:
    tracer = started(make_tracer)
    with refused(TypeError):
        carry(tracer, torch.zeros(5, 1 << 18), list("abcde"), n_epoch=True)
    with pytest.raises(RuntimeError):
        tracer({"x": torch.zeros(5, 9), "tap": torch.zeros(5, 1 << 18)}, None, list("abcde"))
    send(tracer, 1)
    tracer.flush()
    assert stored_calls() == {"0-0": 0.0, "1-0": 1.0}


def test_a_call_larger_than_the_ring_gives_hooked_features(make_tracer: Any) -> None:
    tracer = started(make_tracer)
    payload = torch.randn(5, 1 << 18)
    carry(tracer, payload, list("abcde"))
    assert torch.equal(tracer.get_hooked_features("tap"), payload)


def test_block_with_warn_discards_after_the_timeout_and_training_goes_on(
    make_tracer: Any, shut_gate: Any
) -> None:
    tracer = started(make_tracer, on_error="warn", stall_timeout_s=0.5)
    gate = shut_gate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in range(1, 18):
            send(tracer, call)
    discarded = tracer.stats().rows_discarded
    assert discarded >= 1
    gate.open()
    tracer.flush()
    check_law(tracer.stats())
    assert rows_of() == 18 - discarded == tracer.stats().rows_committed
