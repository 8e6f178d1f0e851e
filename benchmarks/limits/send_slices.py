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

SIZE, SLICES, STEP, ROUNDS, PLACE = 32 << 20, 8, 1 << 20, 9, sys.argv[1]


def serve(connection):
    block, number = memoryview(bytearray(STEP)), 0
    while connection.recv(1, socket.MSG_PEEK):
        digest, left, number = hashlib.sha256(), SIZE, number + 1
        with open(f"{PLACE}/there-{number % SLICES}", "wb", buffering=0) as there:
            while left:
                left -= (length := connection.recv_into(block[: min(left, STEP)]))
                there.write(block[:length])
                digest.update(block[:length])
            os.fsync(there.fileno())
        connection.sendall(digest.digest())


def send_pieces(connection, file):
    for _ in range(SLICES):
        digest = hashlib.sha256()
        for _ in range(SIZE // STEP):
            digest.update(data := file.read(STEP))
            connection.sendall(data)
        assert connection.recv(32) == digest.digest()


def send_slices(connection, file, checksum=zlib.crc32):
    memories, pages = (
        [mmap.mmap(-1, SIZE) for _ in range(2)],
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ),
    )

    def cut(number):  # while the one before travels
        memory = memoryview(memories[number % 2])
        memory[:] = memoryview(pages)[number * SIZE : (number + 1) * SIZE]
        return memory, checksum(memory), hashlib.sha256(memory).digest()

    with ThreadPoolExecutor(1) as cutter:
        ahead = cutter.submit(cut, 0)
        for number in range(SLICES):
            memory, _, digest = ahead.result()
            ahead = cutter.submit(cut, number + 1) if number + 1 < SLICES else None
            connection.sendall(memory)
            assert connection.recv(32) == digest


listener = socket.create_server(("127.0.0.1", 0))
ours, (theirs, _) = socket.create_connection(listener.getsockname()), listener.accept()
if os.fork() == 0:
    sys.exit(ours.close() or serve(theirs))
with open(f"{PLACE}/file", "wb") as made:
    made.write(os.urandom(SIZE) * SLICES)
ways, seconds = {"pieces": send_pieces, "slices": send_slices}, []
ways["slices without CRC-32"] = lambda *given: send_slices(*given, checksum=len)
for _ in range(ROUNDS + 1):  # the first one warms up
    seconds.append({})
    for name in sorted(ways, key=lambda _: os.urandom(4)):
        with open(f"{PLACE}/file", "rb", buffering=0) as file:
            began = time.perf_counter()
            ways[name](ours, file)
            seconds[-1][name] = time.perf_counter() - began
for name in ways:
    ratios = sorted(took["pieces"] / took[name] for took in seconds[1:])
    print(f"{name:22} {ratios[ROUNDS // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
