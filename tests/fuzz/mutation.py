"""Mutants of sound bytes: a seeded generator, and the numbers that break arithmetic."""

from __future__ import annotations

import random

_NUMBERS = (
    b"\xcf" + b"\xff" * 8,  # msgpack's largest integers and lengths
    b"\xd3\x80" + b"\x00" * 7,
    b"\xce\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xff" * 8,  # little-endian ones
    b"\x00" * 8,
    b"\xff\xff\xff\x7f",
    b"-1",  # JSON's
    b"1e400",
    b"99999999999999999999",
    b"null",
    b"{}",
    b"[" * 2000,
    b'"\\ud800"',
    b"\xc0",
)


def mutant(data: bytes, other: bytes, choice: random.Random) -> bytes:
    """``data`` with one to four changes; ``other`` lends an end."""
    value = bytearray(data)
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(len(value) + 1)
        kind = choice.randrange(7)
        if kind < 2 and at < len(value):
            value[at] = choice.randrange(256) if kind == 0 else value[at] ^ (1 << choice.randrange(8))
        elif kind == 2:
            del value[at : at + choice.randint(1, 12)]
        elif kind == 3:
            value[at:at] = choice.choice(_NUMBERS)
        elif kind == 4:
            value[at : at + choice.randint(1, 9)] = choice.choice(_NUMBERS)
        elif kind == 5 and choice.random() < 0.3:
            del value[at:]
        elif kind == 6:
            value[at:] = other[choice.randrange(len(other) + 1) :]
    return bytes(value)
