"""Question: how fast is an upload, beside plain PUTs, and what does it cost a training step?

Method: pairs in turn over loopback, into tmpfs and onto a disk. One sends a recorded trace to our collector
by `upload_trace`: it reads the store, cuts slices, hashes and sends them, and the collector hashes and syncs
each before it answers. The other PUTs a file of as many bytes, which is there already, in pieces of the size
of a slice, to the same server stack, hashed on both sides, each piece and its name synced before the answer.
Both servers run through all rounds; a first round warms memory and modules up and does not count. CPU seconds
are those of the sending process and of the server.
What arrived is compared: the trace bit for bit, the pieces by their SHA-256.
The step: a training loop as in `training_overhead.py` (B = 256, at most 50 MB/s a core), recorded to the disk
by two tracers, one with ``auto_sync`` into a folder on tmpfs. Blocks of at least 30 steps and long enough
that slices travel meanwhile, in random order within a round; a block begins when the uploader has nothing to
do. The uploader's CPU seconds are listed. With a row lost, here or at the endpoint, there is no figure.

Excluded: recording; starting servers; in the step's figure, the endpoint's own work, which is not done on a
machine that trains.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.models import SAMPLE_BYTES, Layers, depth_for_rate, make_trainer, traced_arm
from benchmarks.cpu.training_overhead import compared, one_thread
from benchmarks.cpu.upload_servers import Server, running
from benchmarks.gpu.models import Trainer
from benchmarks.harness import setting as settings
from benchmarks.harness.blocks import (
    LEAST_STEPS,
    Arm,
    Block,
    run_blocks,
    seconds_per_step,
    step_seconds,
)
from benchmarks.harness.estimates import estimate_median
from benchmarks.harness.results import Bar, Findings
from benchmarks.harness.setting import Setting
from ml_debugger import TracerConfig, open_trace
from ml_debugger.errors import NotFoundError
from ml_debugger.training import ClassificationTracer
from ml_debugger.uploading import upload_trace

NAME = "cpu_upload"
QUESTION = "How fast is an upload, beside plain PUTs, and what does it cost a training step?"
PIECE_BYTES = 32 << 20
READ_BYTES = 1 << 20
CALL_SHAPE = (256, 4096)
BLOCK_S = 2.5
CATCH_UP_S = 60.0
RECORDED, UPLOADED = "recorded", "recorded and uploaded"
Sample = dict[str, float]


def measure(setting: Setting) -> Findings:
    samples: dict[str, Any] = {}
    summary: dict[str, Any] = {"throughput": {}}
    bars: list[Bar] = []
    with one_thread():
        for place, folder in (("tmpfs", setting.memory_dir), ("disk", setting.disk_dir)):
            samples[place], found = time_pairs(setting, folder)
            summary["throughput"][place] = found
            for figure, label in (("throughput_ratio", "throughput"), ("cpu_ratio", "CPU s")):
                ratio = found[figure]
                bars.append(Bar(f"{place}: {label} / plain PUT", ratio.median, ratio.low, ratio.high))
        samples["step"], summary["step"] = time_steps(setting)
    ratio = summary["step"]["ratio"]
    bars.append(Bar("step with auto_sync / without", ratio.median, ratio.low, ratio.high))
    options = {**setting.described(), "piece_bytes": PIECE_BYTES, "block_s": BLOCK_S}
    return Findings(options, samples, summary, "ratio", bars, 1.0)


# Throughput


def time_pairs(setting: Setting, folder: Path) -> tuple[dict[str, list[Sample]], dict[str, Any]]:
    calls = 4 if setting.is_quick else 256 if setting.is_full else 64  # 4 MiB each
    rounds = 2 if setting.is_quick else 10 if setting.is_full else 5
    losses = record(folder / "data", calls, setting.seed)
    puts: list[Sample] = []
    uploads: list[Sample] = []
    size = 0
    collected, pieces = folder / "collected", folder / "pieces"
    with running("collector", collected) as collector, running("put", pieces) as put:
        for number in range(rounds + 1):
            ours, size = send_trace(folder / "data", collector, collected)
            bare = send_pieces(folder / "source" / "file", put, size)
            for piece in pieces.iterdir():
                piece.unlink()
            if number:
                puts.append(bare)
                uploads.append(ours)
    settings.empty_folder(folder)
    summary = {
        "bytes": size,
        "throughput_ratio": _ratio(puts, uploads, "wall_s"),
        "cpu_ratio": _ratio(uploads, puts, "cpu_s"),
        "losses": losses,
    }
    for name, group in (("upload", uploads), ("put", puts)):
        summary[f"{name}_bytes_per_s"] = estimate_median([size / sample["wall_s"] for sample in group])
        for side in ("sender", "server"):
            per_gb = [sample[f"{side}_cpu_s"] / size * 1e9 for sample in group]
            summary[f"{name}_{side}_cpu_s_a_gb"] = estimate_median(per_gb)
    return {"upload": uploads, "put": puts}, summary


def _ratio(over: list[Sample], under: list[Sample], key: str) -> Any:
    return estimate_median([a[key] / max(b[key], 1e-9) for a, b in zip(over, under, strict=True)])


def record(data_dir: Path, calls: int, seed: int) -> dict[str, Any]:
    """A trace to send; what was lost of it."""
    values = torch.randn(CALL_SHAPE, generator=torch.Generator().manual_seed(seed))
    ids = list(range(len(values)))
    model = Layers(1, torch.zeros(len(values), 2))
    config = TracerConfig(data_dir=data_dir, durability="process")
    with ClassificationTracer(model, "benchmark", "upload", model.paths(), config=config) as tracer:
        for _ in range(calls):
            tracer(values, None, ids, "train", 0)
        tracer.flush()
        losses = settings.losses_of(tracer)
    settings.check_nothing_lost(losses, "upload")
    return losses


def send_trace(data_dir: Path, server: Server, storage: Path) -> tuple[Sample, int]:
    """Upload to a collector that has nothing of the trace; the figures, and how many bytes travelled."""
    for ledger in data_dir.rglob("uploads"):
        shutil.rmtree(ledger)
    sample, report = timed(
        server,
        lambda: upload_trace("benchmark", "upload", data_dir=data_dir, endpoint=server.url, progress=False),
    )
    here, there = (settings.read_column(place, "upload", "layer0") for place in (data_dir, storage))
    settings.check_equal(there, here, "upload")
    sent = sum(path.stat().st_size for path in storage.rglob("a*.zip"))
    if report.bytes_sent != sent:
        raise settings.WrongDataError(f"{report.bytes_sent} bytes were sent for {sent}")
    for model in storage.glob("[!.]*"):  # what begins with a dot is the collector's own
        shutil.rmtree(model)
    return sample, sent


def send_pieces(source: Path, server: Server, size: int) -> Sample:
    """PUT a file of ``size`` bytes, piece by piece."""
    import httpx

    if not source.exists():
        source.parent.mkdir()
        block = torch.randint(256, (READ_BYTES,), dtype=torch.uint8).numpy().tobytes()
        with open(source, "wb") as file:
            for begin in range(0, size, READ_BYTES):
                file.write(block[: size - begin])

    def send() -> None:
        with open(source, "rb") as file, httpx.Client(trust_env=False, timeout=60) as client:
            for number, begin in enumerate(range(0, size, PIECE_BYTES)):
                length, digest = min(PIECE_BYTES, size - begin), hashlib.sha256()

                def blocks(left: int = length, digest: Any = digest) -> Any:
                    while left:
                        data = file.read(min(READ_BYTES, left))
                        digest.update(data)
                        left -= len(data)
                        yield data

                answer = client.put(
                    f"{server.url}/{number}", content=blocks(), headers={"Content-Length": str(length)}
                )
                if answer.text != digest.hexdigest():
                    raise settings.WrongDataError(f"piece {number} arrived as {answer.text!r:.80}")

    return timed(server, send)[0]


def timed(server: Server, run: Any) -> tuple[Sample, Any]:
    """Seconds of ``run``, and CPU seconds of this process and of the server meanwhile."""
    wall_s, sender_s, server_s = time.perf_counter(), time.process_time(), server.cpu_s()
    result = run()
    sample = {
        "wall_s": time.perf_counter() - wall_s,
        "sender_cpu_s": time.process_time() - sender_s,
        "server_cpu_s": server.cpu_s() - server_s,
    }
    sample["cpu_s"] = sample["sender_cpu_s"] + sample["server_cpu_s"]
    return sample, result


# Step


def time_steps(setting: Setting) -> tuple[list[Block], dict[str, Any]]:
    batch_size = 8 if setting.is_quick else 256
    trainer = make_trainer(batch_size, 0 if setting.is_quick else depth_for_rate(batch_size, setting.seed), 0)
    trainers = {RECORDED: trainer, UPLOADED: copy.deepcopy(trainer)}
    there = setting.memory_dir / "endpoint"
    children_s = _children_cpu_s()
    with contextlib.ExitStack() as stack:
        tracers = {arm: stack.enter_context(traced(setting, arm, trainers[arm], there)) for arm in trainers}
        arms = {arm: traced_arm(trainers[arm], tracer) for arm, tracer in tracers.items()}
        blocks, steps = time_blocks(setting, arms, tracers[UPLOADED], there)
        losses = check_steps(setting, tracers, there)
    sent = sum(path.stat().st_size for path in there.rglob("a*.zip"))
    settings.empty_folder(setting.memory_dir)
    settings.empty_folder(setting.disk_dir)
    summary = {
        **compared(blocks, UPLOADED, RECORDED),
        "steps_a_block": steps,
        "captured_bytes_per_s": batch_size * SAMPLE_BYTES / step_seconds(blocks, RECORDED).median,
        "uploaded_bytes": sent,
        "uploader_cpu_s_a_gb": (_children_cpu_s() - children_s) / sent * 1e9,
        "losses": losses,
    }
    return blocks, summary


def traced(setting: Setting, arm: str, trainer: Trainer, there: Path) -> ClassificationTracer:
    """The tracer of an arm; that of `UPLOADED` has a process that uploads."""
    return ClassificationTracer(
        trainer.model,
        "benchmark",
        arm,
        {"features": "body"},
        auto_sync=arm == UPLOADED,
        api_endpoint=str(there) if arm == UPLOADED else None,
        config=TracerConfig(data_dir=setting.disk_dir),
    )


def time_blocks(
    setting: Setting, arms: dict[str, Arm], uploaded: ClassificationTracer, there: Path
) -> tuple[list[Block], int]:
    """The blocks, and how many steps each has."""
    for arm in arms.values():
        arm.run(5)
        arm.drain()
    step_s = max(seconds_per_step(arm, 5) for arm in arms.values())
    steps = 3 if setting.is_quick else max(LEAST_STEPS, round(BLOCK_S / step_s))
    rounds = 2 if setting.is_quick else 12 if setting.is_full else 6
    blocks = run_blocks(
        arms, rounds=rounds, steps=steps, seed=setting.seed, before=lambda: catch_up(uploaded, there)
    )
    return blocks, steps


def check_steps(setting: Setting, tracers: dict[str, ClassificationTracer], there: Path) -> dict[str, Any]:
    """Losses of each tracer; every row is here and at the endpoint.

    Raises:
        WrongDataError: One is not.
    """
    catch_up(tracers[UPLOADED], there)
    losses = {arm: settings.losses_of(tracer) for arm, tracer in tracers.items()}
    for arm, counted in losses.items():
        settings.check_nothing_lost(counted, arm)
    for column in ("features", "logits", "label"):
        here = settings.read_column(setting.disk_dir, UPLOADED, column)
        settings.check_equal(settings.read_column(there, UPLOADED, column), here, f"auto_sync: {column}")
    return losses


def catch_up(tracer: ClassificationTracer, there: Path) -> None:
    """Wait until the endpoint has every row, so that the uploader has nothing left to do.

    Raises:
        WrongDataError: It takes too long.
    """
    deadline = time.monotonic() + CATCH_UP_S
    while True:
        try:
            rows = open_trace("benchmark", UPLOADED, there).num_rows("extracted_feature")
        except NotFoundError:
            rows = 0
        expected = tracer.stats().rows_committed
        if rows == expected:
            return
        if time.monotonic() > deadline:
            raise settings.WrongDataError(f"the endpoint has {rows} of {expected} rows after {CATCH_UP_S} s")
        time.sleep(0.1)


def _children_cpu_s() -> float:
    """Of processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
