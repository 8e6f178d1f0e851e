"""What a training step pays if hooks only copy into memory that is there already, and if a thread also writes
the copies to a file. Needs torch alone: python step_with_copies.py FILE BATCH_SIZE DEPTH 0_OR_1"""

import copy
import ctypes
import itertools
import os
import queue
import sys
import threading
import time

import torch
from torch import nn

ctypes.CDLL(None).mallopt(-4, ctypes.CDLL(None).mallopt(-1, 2**31 - 1) - 1)  # keep freed memory: steady steps
FILE, BATCH, DEPTH = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR), int(sys.argv[2]), int(sys.argv[3])
RING, _ = torch.ones(256 << 20, dtype=torch.uint8), torch.set_num_threads(1)
images, labels = torch.randn(BATCH, 3, 16, 16), torch.randint(100, (BATCH,))
pooled = nn.Conv2d(3, 256, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
linear = [layer for size in (256, *[512] * DEPTH) for layer in (nn.Linear(size, 512), nn.ReLU())]
base = nn.Sequential(*pooled, *linear, nn.Linear(512, 100))
pieces, slots = queue.Queue(12), itertools.cycle(range(0, len(RING), 16 << 20))


def copy_output(module, inputs, output, hand_on=False):
    begin = next(slots)
    RING[begin : begin + output.nbytes].copy_(output.detach().flatten().view(torch.uint8))
    if hand_on:
        pieces.put((begin, output.nbytes))


def write_pieces():
    while piece := pieces.get():
        os.pwrite(FILE, RING.numpy()[piece[0] : sum(piece)], piece[0])
        pieces.task_done()


def seconds_of(model, steps):
    optimizer, began = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    pieces.join()
    return (time.perf_counter() - began) / steps


arms = {name: copy.deepcopy(base) for name in ("untraced", "copied", "copied and written")}
for module in (0, -2, -1)[int(sys.argv[4]) :]:  # 0: the map of 16 KiB a sample besides features and logits
    arms["copied"][module].register_forward_hook(copy_output)
    arms["copied and written"][module].register_forward_hook(lambda *given: copy_output(*given, hand_on=True))
threading.Thread(target=write_pieces, daemon=True).start()
steps = max(30, int(2 / min(seconds_of(model, 5) for model in arms.values())))
orders = [sorted(arms, key=lambda _: os.urandom(4)) for _ in range(12)]
rounds = [{name: seconds_of(arms[name], steps) for name in order} for order in orders]
for name in arms:
    ratios = sorted(took[name] / took["untraced"] for took in rounds)
    print(f"{name:20} {ratios[6]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
