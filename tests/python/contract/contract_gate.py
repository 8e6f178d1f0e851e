"""Holds the write lock of every live segment of a trace, as a second LMDB writer would: the core cannot
commit.

Run as ``python contract_gate.py DATA_DIR``; prints ``held N``, lets go at the next line of standard input.
"""

import sys
from pathlib import Path

import lmdb

if __name__ == "__main__":
    held = []
    for data in sorted(Path(sys.argv[1]).rglob("data.mdb")):
        if not (data.parent / "sealed.json").exists():
            env = lmdb.open(str(data.parent), map_size=4 << 30, max_dbs=4, create=False)
            held.append((env, env.begin(write=True)))
    print(f"held {len(held)}", flush=True)
    sys.stdin.readline()
    for env, txn in held:
        txn.abort()
        env.close()
