"""Contract 3: two tracers share a trace; a second process gets TraceInUseError; readers elsewhere."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from contract_models import Net, batch, refused, rows_of

from ml_debugger import TracerConfig, errors, open_trace


def test_two_tracers_on_one_pair_in_one_process_share_the_trace(make_tracer: Any) -> None:
    first, second = (
        make_tracer(Net(), layers={"hidden": "body"}),
        make_tracer(Net(seed=3), layers={"hidden": "body"}),
    )
    for i in range(10):
        first(*batch(3, i), n_epoch=i % 2)
        second(*batch(2, 100 + i), n_epoch=i % 2)
    first.flush()
    second.flush()
    assert first.stats().rows_committed == 30
    assert second.stats().rows_committed == 20
    data = open_trace("net", "v1").arrays("extracted_feature")
    assert len(set(data["row_id"].tolist())) == 50
    assert len(open_trace("net", "v1").attempts) == 2
    first.close()
    second(*batch(2, 999))
    second.flush()
    assert rows_of() == 52


def test_two_tracers_on_one_model_of_different_versions_do_not_mix(make_tracer: Any) -> None:
    model = Net()
    first = make_tracer(model, version="v1", layers={"hidden": "body"})
    second = make_tracer(model, version="v2", layers={"other": "act"})
    first(*batch(3, 0))
    second(*batch(2, 1))
    first.flush()
    second.flush()
    assert (rows_of(version="v1"), rows_of(version="v2")) == (3, 2)
    assert "other" not in open_trace("net", "v1").columns("extracted_feature")


OTHER = {
    "durability": lambda: {"config": TracerConfig(durability="process")},
    "max_bytes": lambda: {"config": TracerConfig(max_bytes=1 << 30)},
    "fields": lambda: {"additional_fields": [{"name": "camera", "type": "str"}]},
    "label fields": lambda: {"additional_label_fields": [{"name": "annotator", "type": "str"}]},
}


@pytest.mark.parametrize("what", sorted(OTHER))
def test_sharing_with_other_durability_max_bytes_or_fields_is_an_invalid_input(
    what: str, make_tracer: Any
) -> None:
    first = make_tracer()
    with refused(errors.InvalidInputError):
        make_tracer(Net(), layers={"hidden": "body"}, **OTHER[what]())
    first(*batch(3))
    first.flush()
    assert rows_of() == 3


SECOND = """
from contract_models import Net, batch
from ml_debugger import errors
from ml_debugger.training import ClassificationTracer
import time
begin = time.monotonic()
try:
    ClassificationTracer(Net(), "net", "v1", {"hidden": "body"}, **eval(__import__("sys").argv[1]))
except errors.TraceInUseError as error:
    assert time.monotonic() - begin < 5
    print("in use:", bool(error.hint), isinstance(error, RuntimeError))
"""


@pytest.mark.parametrize("keywords", ["{}", "{'force_table_recreate': True}"])
def test_a_second_process_gets_trace_in_use_at_once(keywords: str, make_tracer: Any, run_child: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(3, 0))
    tracer.flush()
    assert run_child(SECOND, keywords).stdout.split() == ["in", "use:", "True", "True"]
    tracer(*batch(3, 1))
    tracer.flush()
    assert rows_of() == 6


def test_after_close_another_process_may_write(make_tracer: Any, run_child: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(3, 0))
    tracer.close()
    run_child(
        """
        from contract_models import Net, batch
        from ml_debugger.training import ClassificationTracer
        with ClassificationTracer(Net(), "net", "v1", {"hidden": "body"}) as tracer:
            tracer(*batch(4, 1))
        """
    )
    assert rows_of() == 7


def test_another_version_is_free_for_another_process(make_tracer: Any, run_child: Any) -> None:
    make_tracer()(*batch(3, 0))
    run_child(
        """
        from contract_models import Net, batch
        from ml_debugger.training import ClassificationTracer
        with ClassificationTracer(Net(), "net", "v2", {"hidden": "body"}) as tracer:
            tracer(*batch(4, 1))
        """
    )
    assert rows_of(version="v2") == 4


def test_another_process_reads_while_a_tracer_writes(make_tracer: Any, start_child: Any) -> None:
    tracer = make_tracer()
    tracer(*batch(3, 0), n_epoch=0)
    tracer.flush()
    child = start_child(
        """
        from ml_debugger import open_trace
        while True:
            trace = open_trace("net", "v1")
            data = trace.arrays("extracted_feature")
            print(trace.num_rows("extracted_feature"), len(data["hidden"]), *sorted(trace.epochs), flush=True)
            input()
        """
    )
    assert child.line().split() == ["3", "3", "0"]
    for epoch in range(1, 4):
        tracer(*batch(3, epoch), n_epoch=epoch)
        tracer.flush()
        child.say()
        count = str(3 * (epoch + 1))
        assert child.line().split() == [count, count, *map(str, range(epoch + 1))]


def test_stats_agree_with_what_a_second_process_reads(make_tracer: Any, run_child: Any) -> None:
    tracer = make_tracer()
    for i in range(25):
        tracer(*batch(1 + i % 5, i), n_epoch=i % 3)
    tracer.flush()
    stats = tracer.stats()
    done = run_child(
        """
        from ml_debugger import open_trace
        trace = open_trace("net", "v1")
        print(trace.num_rows("extracted_feature"), trace.num_rows("ground_truth"))
        """
    )
    assert list(map(int, done.stdout.split())) == [stats.rows_committed, stats.rows_committed]
    assert stats.commits >= 1


def test_readers_in_threads_see_whole_calls_only(make_tracer: Any) -> None:
    tracer = make_tracer(config=TracerConfig(commit_interval_s=0.01))
    tracer(*batch(7, 0))
    tracer.flush()
    stop, seen, broken = threading.Event(), [], []

    def read() -> None:
        while not stop.is_set():
            count = open_trace("net", "v1").num_rows("extracted_feature")
            seen.append(count)
            if count % 7:
                broken.append(count)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(1, 60):
        tracer(*batch(7, i))
        time.sleep(0.001)
    tracer.flush()
    stop.set()
    reader.join()
    assert not broken and seen == sorted(seen) and seen
    assert rows_of() == 420


def test_a_symlink_to_the_store_is_the_same_trace(make_tracer: Any, run_child: Any, store: Path) -> None:
    make_tracer()(*batch(3))
    link = store.parent / "link"
    link.symlink_to(store)
    done = run_child(SECOND, "{}", env={"MLD_DATA_DIR": str(link)})
    assert done.stdout.startswith("in use")
