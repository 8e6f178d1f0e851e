"""What a record costs LMDB, without us, that goes into an environment that is open, into a new one each, or
into one that must be opened again. No syncs. Needs lmdb alone: python new_environments.py EMPTY_FOLDER
"""

import os
import sys
import time

import lmdb

FOLDER, ENVIRONMENTS, RECORD = sys.argv[1], 300, bytes(100_000)


def open_environment(name):
    os.makedirs(f"{FOLDER}/{name}", exist_ok=True)
    return lmdb.open(f"{FOLDER}/{name}", map_size=1 << 30, sync=False)


def put(environment, number):
    with environment.begin(write=True) as transaction:
        transaction.put(number.to_bytes(8, "big"), RECORD)


def put_alone(number):
    environment = open_environment(number % ENVIRONMENTS)
    put(environment, number)
    environment.close()


def microseconds(run, numbers):
    began = time.process_time()
    for number in numbers:
        run(number)
    return (time.process_time() - began) / len(numbers) * 1e6


with open_environment("open") as kept:
    put(kept, 0)
    for label, run, numbers in (
        ("into one that is open", lambda number: put(kept, number), range(1, ENVIRONMENTS)),
        ("into a new one each", put_alone, range(ENVIRONMENTS)),
        ("into one opened again", put_alone, range(ENVIRONMENTS, 2 * ENVIRONMENTS)),
    ):
        print(f"{label:24} {microseconds(run, numbers):.0f} us of CPU a record of 100 KB")
