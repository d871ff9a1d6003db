"""Warn if rounding makes a finite difference wrong.

Three causes are checked: half-precision weights lose the perturbation, the losses differ by only a few units in the
last place, or operations in half precision (weights or autocast) round the losses. Estimates are counted per slope
and model:

- First estimate: all three checks. That of operations costs six forward passes, and runs in half precision only.
- Estimates 2, 4, 8, 16, ...: only how far apart the two losses of a difference are.

All other estimates check nothing, so they copy no number from the device to the CPU. Each cause is reported once per
model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradcost.core.evaluation.first_use import can_check
from gradcost.core.fake import is_fake, numbers
from gradcost.core.notes import warn_once
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import HALVES, coarsest, spacing
from gradcost.directions import Directions

# Lowest accepted cosine between the rounded and the exact perturbation, over all leaves and over one leaf.
MIN_COSINE, MIN_LEAF_COSINE = 0.9, 0.5
MAX_NOISE = 0.1  # highest accepted ratio of rounding error to slope
MIN_UNITS = 4  # a loss difference below this many units in the last place of the loss is mostly rounding
_CHUNK = 1 << 20  # elements converted to float32 at once

# Global state: the number of estimates per model and per repr of the slope. It only decides when to check.
_estimate_counts: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


class RoundedLeaf(NamedTuple):
    """How rounding to the leaf's dtype changes the perturbation of one leaf.

    Args:
        leaf: the leaf.
        cosine: cosine between the rounded and the exact perturbation.
        lost: fraction of the perturbed weights that are unchanged after rounding.
        scale: RMS of the leaf's weights.
    """

    leaf: Leaf
    cosine: float
    lost: float
    scale: float


def warn_if_rounded(
    objective: Objective,
    slope: object,
    eps: float,
    directions: Directions,
    seed: int,
    losses: Sequence[Tensor],
    loss_at: Callable[[float], Tensor],
) -> None:
    """Emit a Note if rounding makes these finite differences wrong. Most estimates skip the check (module docstring).

    Args:
        objective: the model whose weights are perturbed.
        slope: the slope. Its estimates are counted by its repr.
        eps: the finite-difference step.
        directions: the distribution of the directions.
        seed: the seed of the direction whose rounding is checked.
        losses: a flat list a, b, c, d, ... in the loss's own dtype. The finite differences are a - b, c - d, ...
        loss_at: returns the loss at theta + t z for a number t, with z the direction of `seed`.
    """
    if any(map(is_fake, losses)):
        return
    counts = _estimate_counts.setdefault(objective.model, {})
    number = counts[repr(slope)] = counts.get(repr(slope), 0) + 1
    if number == 1:
        _warn_if_weights_round(objective, slope, eps, directions, seed)
        if coarsest(objective) in HALVES and can_check(objective.model):
            _warn_if_operations_round(objective, slope, eps, losses, loss_at)
    if number & (number - 1) == 0:
        _warn_if_loss_is_coarse(objective.model, slope, eps, losses)


def rounded_leaves(
    objective: Objective, directions: Directions, seed: int, eps: float
) -> tuple[float, list[RoundedLeaf]]:
    """Compare the exact perturbation eps z of half-precision leaves with the one after rounding to their dtype.

    Cost: one pass over the half-precision leaves.

    Args:
        objective: the model and its leaves.
        directions: the distribution of the directions.
        seed: the seed of the direction z.
        eps: the finite-difference step.
    Returns:
        The cosine over all half-precision leaves (1.0 if there are none), and one RoundedLeaf per half-precision leaf
        on which z is not zero.
    """
    halves = [leaf for leaf in objective.leaves if leaf.parameter.dtype in HALVES]
    if not halves:
        return 1.0, []
    device = halves[0].parameter.device
    sums = torch.stack([_sums(leaf, directions, seed, eps).to(device) for leaf in halves])
    rows = [numbers(row) for row in sums]
    leaves = []
    for leaf, (product, exact, rounded, moved, perturbed, weights) in zip(halves, rows, strict=True):
        if exact:
            cosine = product / math.sqrt(exact * rounded) if rounded else 0.0
            scale = math.sqrt(weights / leaf.parameter.numel())
            leaves.append(RoundedLeaf(leaf, cosine, 1 - moved / perturbed, scale))
    product, exact, rounded = (sum(row[i] for row in rows) for i in range(3))
    if not rounded:
        return (0.0 if exact else 1.0), leaves  # 1.0: z is zero on these leaves
    return product / math.sqrt(exact * rounded), leaves


def _sums(leaf: Leaf, directions: Directions, seed: int, eps: float) -> Tensor:
    """Return six sums over a leaf: z.r, z.z, r.r, the number of nonzero r, the number of nonzero z, and w.w.

    z is the exact direction, w the weights, and r = (rounded(w + eps z) - w) / eps.
    """
    base = leaf.parameter.detach()
    exact = directions.draw(leaf, [seed], [1.0])
    end = directions.add(base, leaf, [seed], [eps])
    total = torch.zeros(6, dtype=torch.float64, device=base.device)
    chunks = (tensor.reshape(-1).split(_CHUNK) for tensor in (base, exact, end))
    for start, z, stop in zip(*chunks, strict=True):
        weights, z = start.float(), z.float()
        rounded = (stop.float() - weights) / eps
        sums = z @ rounded, z @ z, rounded @ rounded, rounded.count_nonzero(), z.count_nonzero(), weights @ weights
        total += torch.stack([number.double() for number in sums])
    return total


def _warn_if_weights_round(
    objective: Objective, slope: object, eps: float, directions: Directions, seed: int
) -> None:
    cosine, leaves = rounded_leaves(objective, directions, seed, eps)
    worst = min(leaves, key=lambda rounded: rounded.cosine, default=None)
    if worst is None or (cosine >= MIN_COSINE and worst.cosine >= MIN_LEAF_COSINE):
        return
    dtype = worst.leaf.parameter.dtype
    name = str(dtype).removeprefix("torch.")
    warn_once(
        objective.model,
        f"rounds away at {slope!r}",
        f"eps = {eps:.2g} is small for `{worst.leaf.name}` ({name} weights of about {worst.scale:.2g}): "
        f"{100 * worst.lost:.3g}% of its weights round back to their old value, and the rounded perturbation has a "
        f"cosine of {worst.cosine:.2f} with the exact one ({cosine:.2f} over all half-precision weights). "
        f"eps = {spacing(worst.scale, dtype):.2g} gives this parameter a cosine of 0.9. eps=None chooses an eps that "
        "suits most weights of the model, perhaps not these. Float32 weights avoid the rounding.",
    )


def _distance(losses: Sequence[float]) -> float:
    """Return how far apart the two losses of a difference are: for losses a, b, c, d, ... the RMS of a - b, c - d."""
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    return math.sqrt(sum((one - other) ** 2 for one, other in pairs) / len(pairs))


def loss_noise(losses: Sequence[float]) -> float:
    """Return the standard deviation of the rounding errors of losses at equally spaced points of a line.

    Law: third differences remove the smooth part of the loss up to its quadratic term. The third differences of
    independent errors of standard deviation s have a mean square of 20 s^2.

    Args:
        losses: four losses or more.
    Source: Moré and Wild 2011, Estimating computational noise.
    """
    differences = list(losses)
    for _ in range(3):
        differences = [after - before for before, after in pairwise(differences)]
    return math.sqrt(sum(difference**2 for difference in differences) / len(differences) / 20)


def _warn_if_operations_round(
    objective: Objective, slope: object, eps: float, losses: Sequence[Tensor], loss_at: Callable[[float], Tensor]
) -> None:
    noise = loss_noise([float(losses[0]), *(float(loss_at(eps * (1 + step / 16))) for step in range(1, 7))])
    distance, error = _distance([float(loss) for loss in losses]), math.sqrt(2) * noise
    if not error > MAX_NOISE * distance:
        return
    name = str(coarsest(objective)).removeprefix("torch.")
    warn_once(
        objective.model,
        f"noisy operations at {slope!r}",
        f"operations in {name} round the loss by about {noise:.2g} (standard deviation). At eps = {eps:.2g} the two "
        f"losses of a difference are {distance:.2g} apart: rounding is {100 * error / distance:.0f}% of the slope. "
        "Compute the last layer and the loss in float32 (rounded logits are most of a language model's error), use "
        "float32 throughout, or use forward_gradient(), which does not divide by eps.",
    )


def _warn_if_loss_is_coarse(model: nn.Module, slope: object, eps: float, losses: Sequence[Tensor]) -> None:
    dtype = losses[0].dtype
    values = numbers(torch.stack([loss.double() for loss in losses]))
    size = max(map(abs, values))
    if not math.isfinite(size):
        return
    apart = _distance(values)
    unit, name = spacing(size, dtype), str(dtype).removeprefix("torch.")
    figures = (
        f"at eps = {eps:.2g} the two losses of a difference are {apart:.2g} apart, and one unit in the last place of "
        f"the loss ({size:.3g}, {name}) is {unit:.2g}"
    )
    if dtype in HALVES:
        advice = "Compute the loss in float32: call `logits.float()` before it."
        warn_once(model, f"half-precision loss at {slope!r}", f"{figures}. {advice}")
    elif apart < MIN_UNITS * unit:
        advice = "Use a larger eps, or eps=None, which chooses one; a float64 loss has finer units."
        advice += "" if apart else " Or the loss uses another model: it must use its first argument."
        warn_once(model, f"coarse loss at {slope!r}", f"{figures}: the slope is mostly rounding. {advice}")
