"""How fast slices travel over loopback that are copied, checksummed and hashed before they go, beside pieces
of a file that are hashed on their way; the server hashes and syncs. python send_slices.py FOLDER"""

import hashlib
import mmap
import os
import socket
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

SIZE, SLICES, STEP, ROUNDS = 32 << 20, 8, 1 << 20, 9
FILE, THERE = os.path.join(sys.argv[1], "file"), os.path.join(sys.argv[1], "there")


def serve(connection):
    block = memoryview(bytearray(STEP))
    while connection.recv(1, socket.MSG_PEEK):
        digest, left = hashlib.sha256(), SIZE
        with open(THERE, "wb", buffering=0) as file:
            while left:
                left -= (length := connection.recv_into(block[: min(left, STEP)]))
                file.write(block[:length])
                digest.update(block[:length])
            os.fsync(file.fileno())
        connection.sendall(digest.digest())
        os.unlink(THERE)


def send_pieces(file, connection):
    for _ in range(SLICES):
        digest = hashlib.sha256()
        for _ in range(SIZE // STEP):
            digest.update(data := file.read(STEP))
            connection.sendall(data)
        assert connection.recv(32) == digest.digest()


def send_slices(file, connection, checksum=zlib.crc32):
    memories, pages = (
        [mmap.mmap(-1, SIZE) for _ in range(2)],
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ),
    )

    def cut(number):
        memory, source = memoryview(memories[number % 2]), memoryview(pages)
        memory[:] = source[number * SIZE : (number + 1) * SIZE]
        return memory, checksum(memory), hashlib.sha256(memory).digest()

    with ThreadPoolExecutor(1) as cutter:
        slices = [cutter.submit(cut, 0)]
        for number in range(SLICES):
            memory, _, digest = slices[number].result()
            slices += (
                [cutter.submit(cut, number + 1)] if number + 1 < SLICES else []
            )  # while this one travels
            connection.sendall(memory)
            assert connection.recv(32) == digest


listener = socket.create_server(("127.0.0.1", 0))
ours, (theirs, _) = socket.create_connection(listener.getsockname()), listener.accept()
if os.fork() == 0:
    ours.close()
    sys.exit(serve(theirs))
with open(FILE, "wb") as made:
    made.write(os.urandom(SIZE) * SLICES)
ways, took = {"pieces": send_pieces, "slices": send_slices}, []
ways["slices without CRC-32"] = lambda *given: send_slices(*given, checksum=len)
for _ in range(ROUNDS + 1):
    took.append({})
    for name in sorted(ways, key=lambda _: os.urandom(4)):
        with open(FILE, "rb", buffering=0) as file:
            began = time.perf_counter()
            ways[name](file, ours)
            took[-1][name] = time.perf_counter() - began
for name in ways:
    ratios = sorted(round_["pieces"] / round_[name] for round_ in took[1:])  # the first one warms up
    print(f"{name:22} {ratios[ROUNDS // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
