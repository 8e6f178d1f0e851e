"""What it takes to give back the space of as many bytes as one file, and as a folder with two small files
beside it, which is what an LMDB environment with its lock file and a description is.
Needs nothing: python remove_files.py FOLDER [MiB]
"""

import os
import pathlib
import shutil
import statistics
import sys
import time

FOLDER, MEBIBYTES, ROUNDS = pathlib.Path(sys.argv[1]), int((sys.argv[2:] or ["1"])[0]), 10


def write(path, mebibytes):
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())


def make_folder(number):
    folder = FOLDER / f"folder{number}"
    folder.mkdir(parents=True)
    write(folder / "data.mdb", MEBIBYTES)
    (folder / "lock.mdb").write_bytes(bytes(40960))
    (folder / "segment.json").write_text("{}")
    return folder


def milliseconds(run, argument):
    began = time.perf_counter()
    run(argument)
    return (time.perf_counter() - began) * 1e3


FOLDER.mkdir(parents=True, exist_ok=True)
took = {"one file": [], "a folder of three": []}
for number in range(ROUNDS):
    write(FOLDER / "file", MEBIBYTES)
    folder = make_folder(number)
    os.sync()
    took["one file"].append(milliseconds(os.unlink, FOLDER / "file"))
    took["a folder of three"].append(milliseconds(shutil.rmtree, folder))
for what, values in took.items():
    print(f"{what:18} {statistics.median(values):.2f} ms ({min(values):.2f} to {max(values):.2f})")
