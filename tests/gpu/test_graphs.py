"""CUDA graphs: captured beside a recording thread, refused to a tracer, and replayed without a record."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from ml_debugger import TracerConfig, _core
from ml_debugger.errors import StreamCaptureError
from ml_debugger.training import ClassificationTracer
from patterns import Emitter, logits_of, pattern, same_bits
from recording import TAP, check_nothing_lost, check_staged, keep_busy, recording, row_ids, stored

pytestmark = pytest.mark.cuda_only

BATCH_SIZE, WIDTH, SOURCES = 4, 4096, 16
DEADLINE_S = 60


@pytest.fixture(scope="module")
def capture_stream() -> torch.cuda.Stream:
    """One stream for all captures: torch deals them out of a pool, and another test may hold the same."""
    return torch.cuda.Stream(priority=-1)


class Copying(nn.Module):
    """Fills its one buffer with a prepared batch, sends it through the layer, and overwrites it.

    It takes no memory: the plain cudaMalloc of a thread would itself break a capture of another one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.tap = nn.Identity()
        shape = (BATCH_SIZE, WIDTH)
        self.sources = [pattern(shape, torch.int32, number, device) for number in range(SOURCES)]
        self.buffer = torch.empty(shape, dtype=torch.int32, device=device)
        self.logits = logits_of(BATCH_SIZE, device)

    def forward(self, call: int) -> torch.Tensor:
        self.buffer.copy_(self.sources[call % SOURCES])
        self.tap(self.buffer)
        self.buffer.zero_()
        return self.logits


@dataclass
class Recording:
    """A thread that records call after call, until it is told to stop."""

    tracer: ClassificationTracer
    stream: torch.cuda.Stream
    may_start: threading.Event = field(default_factory=threading.Event)
    may_stop: threading.Event = field(default_factory=threading.Event)
    calls: int = 0
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.may_start.wait(DEADLINE_S)
            with torch.cuda.stream(self.stream):
                while not self.may_stop.is_set():
                    self.tracer(self.calls, None, row_ids(self.calls, BATCH_SIZE))
                    self.calls += 1
                    self.may_stop.wait(0.0005)  # so that the disk keeps up
        except BaseException as error:
            self.error = error

    def wait_for_commits(self, more_rows: int) -> None:
        """Return when the writer has seen copies arrive that were enqueued after this began."""
        goal = self.tracer.stats().rows_submitted + more_rows
        for _ in range(DEADLINE_S * 100):
            if self.error is not None or self.tracer.stats().rows_committed >= goal:
                return
            self.may_stop.wait(0.01)
        raise TimeoutError(f"no rows were committed: {self.tracer.stats()}")


def capture_graph(
    stream: torch.cuda.Stream, inputs: torch.Tensor, inside: Callable[[], None]
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture a few operations in torch's default mode, which bars unsafe calls in all threads.

    ``inside`` runs midway. Returns the graph and the tensor that a replay fills.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        values = inputs * 3
        inside()
        for _ in range(10):
            values = values + 1
    return graph, values


@pytest.mark.parametrize("where", ["default stream", "side stream"])
@pytest.mark.parametrize("setup", ["before the capture", "within the capture"])
def test_graphs_are_captured_while_another_thread_records(
    device: torch.device, capture_stream: torch.cuda.Stream, where: str, setup: str
) -> None:
    model = Copying(device)
    side = torch.cuda.Stream() if where == "side stream" else torch.cuda.default_stream()
    assert side.cuda_stream != capture_stream.cuda_stream
    model(0)  # its kernels are loaded
    inputs = torch.arange(1000.0, device=device)
    expected = inputs * 3
    for _ in range(10):
        expected = expected + 1
    torch.cuda.synchronize()
    with recording(model, device, commit_interval_s=0.02, durability="process") as tracer:
        recorder = Recording(tracer, side)
        thread = threading.Thread(target=recorder.run)
        thread.start()
        if setup == "before the capture":
            recorder.may_start.set()
            recorder.wait_for_commits(BATCH_SIZE)
        try:
            for _ in range(8):

                def record_now() -> None:
                    recorder.may_start.set()
                    recorder.wait_for_commits(20 * BATCH_SIZE)

                graph, values = capture_graph(capture_stream, inputs, record_now)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(values, expected)
        finally:
            recorder.may_start.set()
            recorder.may_stop.set()
            thread.join(DEADLINE_S)
        assert recorder.error is None, repr(recorder.error)
    assert recorder.calls >= 160
    check_sources(recorder.calls)


def check_sources(calls: int) -> None:
    values = stored("out")
    assert len(values) == calls * BATCH_SIZE
    prepared = [pattern((BATCH_SIZE, WIDTH), torch.int32, number) for number in range(SOURCES)]
    for call, rows in enumerate(values.split(BATCH_SIZE)):
        assert torch.equal(rows, prepared[call % SOURCES]), f"call {call}"


def test_a_call_under_capture_is_refused_before_the_forward_and_the_capture_survives(
    device: torch.device, capture_stream: torch.cuda.Stream
) -> None:
    model = Emitter()
    inputs = torch.arange(8.0, device=device).reshape(4, 2)
    with recording(model, device) as tracer:
        tracer(inputs.clone(), None, row_ids(0, 4))
        forwards = model.forwards

        def call() -> None:
            with pytest.raises(StreamCaptureError):
                tracer(inputs, None, row_ids(1, 4))

        graph, values = capture_graph(capture_stream, inputs, call)
        assert model.forwards == forwards
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(values, inputs * 3 + 10)
        tracer(inputs.clone(), None, row_ids(2, 4))
        assert tracer.stats().rows_submitted == 8
    assert same_bits(stored("out"), torch.cat([inputs, inputs]))


def test_a_first_call_under_capture_is_refused_too(
    device: torch.device, capture_stream: torch.cuda.Stream
) -> None:
    inputs = torch.arange(8.0, device=device).reshape(4, 2)
    with ClassificationTracer(Emitter(), "net", "v1", TAP) as tracer:

        def call() -> None:
            with pytest.raises(StreamCaptureError):
                tracer(inputs, None, row_ids(0, 4))

        graph, values = capture_graph(capture_stream, inputs, call)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(values, inputs * 3 + 10)
        assert tracer.stats().rows_submitted == 0


def test_a_hundred_replays_record_nothing_and_leave_the_ring_alone(
    device: torch.device, capture_stream: torch.cuda.Stream
) -> None:
    """The captured forward has our hooks on it; what waits in the ring meanwhile stays as it was."""
    model = Copying(device)
    options = {"commit_interval_s": 30.0, "commit_bytes": 1 << 30}
    tracer = ClassificationTracer(model, "net", "v1", TAP, config=TracerConfig(**options))
    with tracer:
        for call in range(20):
            tracer(call, None, row_ids(call, BATCH_SIZE))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capture_stream):
            model(5)
        before = tracer.stats(), _core.device_report()
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
        after = tracer.stats(), _core.device_report()
        assert after[1]["copies"] == before[1]["copies"]
        assert after[0].rows_submitted == before[0].rows_submitted == 20 * BATCH_SIZE
        assert after[0].bytes_submitted == before[0].bytes_submitted
        assert after[0].ring_high_water_bytes == before[0].ring_high_water_bytes
        assert after[0].rows_in_flight == 20 * BATCH_SIZE  # all of it still was in the ring
        for call in range(20, 40):
            tracer(call, None, row_ids(call, BATCH_SIZE))
        check_staged()
    check_nothing_lost(tracer.stats())
    check_sources(40)


def test_replays_beside_copies_on_their_way_disturb_nothing(
    device: torch.device, capture_stream: torch.cuda.Stream
) -> None:
    model = Copying(device)
    inputs = torch.arange(1000.0, device=device)
    graph, values = capture_graph(capture_stream, inputs, lambda: None)
    with recording(model, device) as tracer:
        for call in range(200):
            if call % 50 == 0:
                keep_busy(device, 0.01)
            tracer(call, None, row_ids(call, BATCH_SIZE))
            graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(values, inputs * 3 + 10)
    check_sources(200)
