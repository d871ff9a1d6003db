"""Sampling without replacement from 0 .. size - 1 for any size, without a table."""

from __future__ import annotations

import math
from hashlib import blake2b

from gradcost.core.key import Key


def sample_without_replacement(key: Key, count: int, size: int) -> tuple[int, ...]:
    """Sample integers from 0 to `size` - 1 without replacement.

    Law: samples 0 .. size - 1 are a random permutation of all integers. The next `size` samples are another
    permutation, and so on. Sample k depends only on (key, k, size).

    Args:
        key: determines the permutations.
        count: number of samples; may exceed `size`.
        size: number of integers to sample from.
    Returns:
        The samples, in order.
    """
    # Do not rename "deal" and "cut": the random bits of every run depend on these names.
    return tuple(_permuted(key.fold("deal", k // size), k % size, size) for k in range(count))


def _permuted(key: Key, position: int, size: int) -> int:
    """Return the image of `position` under the key's permutation of 0 .. size - 1.

    A four-round Feistel network permutes the integers below a power of 4. Cycle walking applies it until the result
    is below `size`. Source: Black and Rogaway 2002.
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for round_ in range(4):
            message = f"{key.seed}/{round_}/{right}".encode()
            digest = int.from_bytes(blake2b(message, digest_size=8).digest(), "little") & mask
            left, right = right, left ^ digest
        position = left << half | right
        if position < size:
            # Without the random rotation some images are more likely than others (by 6% at size 8).
            return (position + key.fold("cut").seed) % size
