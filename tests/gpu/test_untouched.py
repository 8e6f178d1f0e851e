"""A tracer changes nothing in the user's run on a GPU: results, gradients, random numbers, device, stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ml_debugger.training import ClassificationTracer
from patterns import Emitter, pattern, same_bits
from recording import recording, row_ids, stored

BATCH_SIZE, STEPS = 16, 6


class ConvNet(nn.Module):
    """Convolutions, batch norm, in-place ReLU, a residual addition in place, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(16, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = self.stem(inputs)
        added = self.block(values)
        added += values
        return self.fc(self.dropout(torch.relu_(added).mean((2, 3))))


@pytest.fixture(autouse=True)
def repeatable() -> Any:
    """Equal runs give equal bits."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def train(device: torch.device, version: str | None, *, amp: bool) -> list[torch.Tensor]:
    """Everything that training computed: logits, gradients, parameters, states of random generators."""
    torch.manual_seed(3)
    model = ConvNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(device.type, enabled=amp)
    results: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def steps(call: Any) -> None:
        for step in range(STEPS):
            inputs = torch.randn(BATCH_SIZE, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(
                device
            )
            labels = (torch.arange(BATCH_SIZE, device=device) + step) % 10
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = call(inputs, labels, step)
                loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            gradients = [parameter.grad for parameter in model.parameters()]
            results.extend(
                [logits.detach().clone(), *(grad.clone() for grad in gradients if grad is not None)]
            )
            scaler.step(optimizer)
            scaler.update()

    if version is None:
        steps(lambda inputs, labels, step: model(inputs))
    else:
        layers = {"stem": "stem", "block": "block"}
        with recording(model, device, layers, version=version) as tracer:
            handle = model.block.register_forward_hook(lambda *given: seen.append(given[2].detach().clone()))
            steps(lambda inputs, labels, step: tracer(inputs, labels, row_ids(step, BATCH_SIZE), n_epoch=0))
            handle.remove()
        assert same_bits(stored("block", version), torch.cat(seen))
        assert same_bits(stored("logits", version), torch.cat(results[:: len(results) // STEPS]))
    results.extend(value.detach().clone() for value in model.state_dict().values())
    results.append(torch.get_rng_state())
    if device.type == "cuda":
        results.append(torch.cuda.get_rng_state())
    return results


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16 autocast"])
def test_training_is_bit_identical_with_and_without_a_tracer(device: torch.device, amp: bool) -> None:
    untraced, again = train(device, None, amp=amp), train(device, None, amp=amp)
    if not all(map(same_bits, untraced, again)):
        pytest.skip("this model does not repeat itself bit for bit on this device, with or without a tracer")
    traced = train(device, "v1", amp=amp)
    assert len(traced) == len(untraced)
    assert all(map(same_bits, traced, untraced))


def test_autocast_outputs_are_stored_in_the_dtype_of_their_call(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)).to(device)
    inputs = torch.randn(4, 8, device=device)
    with recording(model, device, {"hidden": "0"}) as tracer, torch.autocast(device.type, torch.bfloat16):
        logits = tracer(inputs, None, row_ids(0, 4))
        hidden = model[0](inputs)
    assert logits.dtype == hidden.dtype == torch.bfloat16
    assert same_bits(stored("hidden"), hidden)
    assert same_bits(stored("logits"), logits)


def test_hooked_features_are_on_the_device_and_equal_also_after_in_place_ops(device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)).to(device)
    inputs = torch.randn(4, 8, device=device)
    with recording(model, device, {"hidden": "0"}) as tracer:
        tracer(inputs, None, row_ids(0, 4))
        features = tracer.get_hooked_features("hidden")
        assert features.device.type == device.type
        assert same_bits(features, model[0](inputs))
        features.zero_()  # a tensor of the caller's own
    assert same_bits(stored("hidden"), model[0](inputs))


def test_hooked_features_can_be_read_while_the_call_is_saved(device: torch.device) -> None:
    seen: list[torch.Tensor] = []

    class Reading(ClassificationTracer):
        def _parse_and_save_io_data(self, *given: Any, **keywords: Any) -> None:
            seen.append(self.get_hooked_features("hidden"))
            super()._parse_and_save_io_data(*given, **keywords)

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)).to(device)
    inputs = torch.randn(4, 8, device=device)
    with Reading(model, "net", "v1", {"hidden": "0"}) as tracer:
        tracer(inputs, None, row_ids(0, 4))
    assert seen[0].device.type == device.type
    assert same_bits(seen[0], model[0](inputs))


@pytest.mark.cuda_only
def test_the_current_device_and_stream_stay_as_they_were(device: torch.device) -> None:
    side = torch.cuda.Stream()
    with recording(Emitter(), device) as tracer:
        for stream in (torch.cuda.default_stream(), side):
            with torch.cuda.stream(stream):
                before = torch.cuda.current_device(), torch.cuda.current_stream()
                tracer(pattern((4, 8), torch.float32, 0, device), None, row_ids(0, 4))
                assert (torch.cuda.current_device(), torch.cuda.current_stream()) == before
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.cuda_only
def test_tensors_of_two_devices_are_recorded_and_the_current_device_stays(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    class TwoDevices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()

        def forward(self, call: int) -> torch.Tensor:
            for layer, tap in enumerate((self.first, self.second)):
                out = tap(pattern((4, 4096), torch.float32, 2 * call + layer, f"cuda:{layer}"))
                out.zero_()
            return torch.zeros(4, 2, device="cuda:1")

    with recording(TwoDevices(), device, {"a": "first", "b": "second"}) as tracer:
        for current in (0, 1):
            with torch.cuda.device(current):
                for call in range(50):
                    tracer(50 * current + call, None, row_ids(50 * current + call, 4))
                    assert torch.cuda.current_device() == current
    for layer, column in enumerate("ab"):
        expected = torch.cat([pattern((4, 4096), torch.float32, 2 * call + layer) for call in range(100)])
        assert same_bits(stored(column), expected)
