"""Random damage to the bytes of a file, for tests with a fixed seed."""

from __future__ import annotations

import random


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return the content with one kind of damage: a bit, a few bytes, zeros, a cut, or an insertion."""
    at, size = chance.randrange(len(content)), chance.randrange(1, 64)
    match chance.randrange(6):
        case 0 | 1:
            return flipped(content, 8 * at + chance.randrange(8))
        case 2:
            return content[:at] + chance.randbytes(size) + content[at + size :]
        case 3:
            return content[:at] + bytes(size) + content[at + size :]
        case 4:
            return content[:at] + (b"" if chance.random() < 0.5 else content[at + size :])
    return content[:at] + chance.randbytes(size) + content[at:]


def flipped(content: bytes, bit: int) -> bytes:
    at = bit // 8
    return content[:at] + bytes([content[at] ^ 1 << bit % 8]) + content[at + 1 :]
