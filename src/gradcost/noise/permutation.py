"""Sampling without replacement from 0 .. size - 1 for any size, without a table."""

from __future__ import annotations

import math
from hashlib import blake2b

from gradcost.core.key import Key


def sample_without_replacement(key: Key, count: int, size: int) -> tuple[int, ...]:
    """Sample integers from 0 to `size` - 1 without replacement.

    Law: each run of `size` consecutive samples is a random permutation of all integers; a new permutation starts when
    one is used up. Element k is a function of (key, k, size) alone.

    Args:
        key: the source of the permutations.
        count: how many samples. More than `size` use more than one permutation.
        size: how many integers to sample from.
    Returns:
        The samples, in order.
    """
    # The names "deal" and "cut" determine the random bits of every run: they stay.
    return tuple(_permuted(key.fold("deal", k // size), k % size, size) for k in range(count))


def _permuted(key: Key, position: int, size: int) -> int:
    """Return the image of `position` under the key's permutation of 0 .. size - 1.

    A four-round Feistel network permutes the integers of an even number of bits; cycle walking restricts it to
    0 .. size - 1. Source: Black and Rogaway 2002.
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
            # Cycle walking prefers some images (by 6% at size 8); a random rotation makes all equally likely.
            return (position + key.fold("cut").seed) % size
