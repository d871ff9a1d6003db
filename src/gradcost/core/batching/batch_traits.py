"""What padding, masks and weights change in a batch: a loss that has not met it may average over something else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradcost.core.pytree import leaves


def traits(batch: Any, rows: Sequence[Sequence[int]]) -> tuple[tuple[Any, ...], list[tuple[int, int]]]:
    """Return a key of the kinds of values in a batch, and the pairs of micro-batches that differ most.

    Args:
        batch: any pytree.
        rows: the examples of each micro-batch.
    Returns:
        A hashable key: for each tensor with one entry per example whether its values are equal, the sign of the least
        one, and whether the means of all micro-batches are equal. Padding gives a batch another key.
        For each tensor whose micro-batches have different means, the one with the least and the one with the largest
        mean, without repetition.
    """
    size, key, pairs = sum(map(len, rows)), [], []
    for leaf in leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_nested or leaf.is_complex():
            continue
        if not leaf.numel() or leaf.ndim == 0 or leaf.shape[0] != size:
            continue
        values = leaf.detach().reshape(size, -1)
        values = values.to(torch.uint8) if values.dtype == torch.bool else values
        low, high = (float(bound) for bound in torch.aminmax(values))
        sums = values.sum(1, dtype=torch.float64).tolist()
        means = [math.fsum(sums[row] for row in part) / len(part) for part in rows]
        is_even = all(math.isclose(mean, means[0], rel_tol=1e-9) for mean in means)
        key.append((low == high, math.isnan(low) or (low > 0) - (low < 0), is_even))
        if not is_even and not any(map(math.isnan, means)):
            pairs.append((means.index(min(means)), means.index(max(means))))
    return tuple(key), list(dict.fromkeys(pairs))
