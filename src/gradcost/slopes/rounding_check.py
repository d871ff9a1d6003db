"""Whether a difference of losses is seen at all: perturbations that round away, and losses too coarse to differ.

Looked at in an estimate's numbers at the first estimate of a slope on a model, and of the loss also at the second,
fourth, eighth and so on, so that it costs nothing in the long run. What is found is said once, with both figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradcost.core.fake import is_fake, numbers
from gradcost.core.notes import say_once
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import HALVES, spacing
from gradcost.directions import Directions
from gradcost.directions.direction import combination

WHOLE, LEAF = 0.9, 0.5  # the least cosine of the kept perturbation with the meant one, over all leaves and over one
UNITS = 4  # units in the last place of the loss, below which a difference is mostly rounding
_CHUNK = 1 << 20  # elements that are float32 at once

_estimates: WeakKeyDictionary[nn.Module, dict[str, int]] = WeakKeyDictionary()


class Kept(NamedTuple):
    """What is left of a perturbation of one leaf once the leaf's type has rounded it.

    cosine: of what is left with what was meant. lost: the share of the weights that were to move and did not.
    scale: the RMS of the weights.
    """

    leaf: Leaf
    cosine: float
    lost: float
    scale: float


def look(
    objective: Objective, slope: object, eps: float, directions: Directions, seed: int, ends: Sequence[Tensor]
) -> None:
    """Say what drowns the differences between pairs of `ends`, losses in their own type, (a, b), (c, d), ..."""
    if any(map(is_fake, ends)):
        return
    counts = _estimates.setdefault(objective.model, {})
    number = counts[repr(slope)] = counts.get(repr(slope), 0) + 1
    if number == 1:
        _look_at_weights(objective, slope, eps, directions, seed)
    if number & (number - 1) == 0:
        _look_at_loss(objective.model, slope, eps, ends)


def kept(objective: Objective, directions: Directions, seed: int, eps: float) -> tuple[float, list[Kept]]:
    """The cosine of the perturbation eps z as rounded with eps z, over all half-precision leaves and for each.

    Leaves that the direction leaves alone are not among them. Costs a pass over the half-precision leaves.
    """
    halves = [leaf for leaf in objective.leaves if leaf.parameter.dtype in HALVES]
    if not halves:
        return 1.0, []
    device = halves[0].parameter.device
    sums = torch.stack([_sums(leaf, directions, seed, eps).to(device) for leaf in halves])
    rows = [numbers(row) for row in sums]
    found = []
    for leaf, (both, meant, left, moved, meant_to, weights) in zip(halves, rows, strict=True):
        if meant:
            cosine = both / math.sqrt(meant * left) if left else 0.0
            found.append(Kept(leaf, cosine, 1 - moved / meant_to, math.sqrt(weights / leaf.parameter.numel())))
    both, meant, left = (sum(row[i] for row in rows) for i in range(3))
    return both / math.sqrt(meant * left) if left else float(not meant), found


def _sums(leaf: Leaf, directions: Directions, seed: int, eps: float) -> Tensor:
    """Over a leaf: meant . left, |meant|^2, |left|^2, how many moved, how many were to, |weights|^2."""
    base = leaf.parameter.detach()
    meant = combination(directions, leaf, [seed], [1.0])
    end = directions.add(base, leaf, [seed], [eps])
    total = torch.zeros(6, dtype=torch.float64, device=base.device)
    flat = (tensor.reshape(-1).split(_CHUNK) for tensor in (base, meant, end))
    for some, z, there in zip(*flat, strict=True):
        weights, z = some.float(), z.float()
        left = (there.float() - weights) / eps
        parts = z @ left, z @ z, left @ left, left.count_nonzero(), z.count_nonzero(), weights @ weights
        total += torch.stack([part.double() for part in parts])
    return total


def _look_at_weights(objective: Objective, slope: object, eps: float, directions: Directions, seed: int) -> None:
    whole, found = kept(objective, directions, seed, eps)
    worst = min(found, key=lambda one: one.cosine, default=None)
    if worst is None or (whole >= WHOLE and worst.cosine >= LEAF):
        return
    dtype = worst.leaf.parameter.dtype
    name = str(dtype).removeprefix("torch.")
    say_once(
        objective.model,
        f"rounds away at {slope!r}",
        f"at eps = {eps:.2g} `{worst.leaf.name}` ({name} weights of about {worst.scale:.2g}) keeps its perturbation "
        f"to a cosine of {worst.cosine:.2f}: {100 * worst.lost:.3g}% of its weights round back to where they were; "
        f"over all half-precision weights the cosine is {whole:.2f}. eps = {spacing(worst.scale, dtype):.2g} would "
        "keep 0.9 there; eps=None chooses one for the bulk of the weights, and float32 weights keep all.",
    )


def _look_at_loss(model: nn.Module, slope: object, eps: float, ends: Sequence[Tensor]) -> None:
    dtype = ends[0].dtype
    losses = numbers(torch.stack([end.double() for end in ends]))
    size = max(map(abs, losses))
    if not math.isfinite(size):
        return
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    apart = math.sqrt(sum((one - other) ** 2 for one, other in pairs) / len(pairs))
    unit, name = spacing(size, dtype), str(dtype).removeprefix("torch.")
    figures = (
        f"at eps = {eps:.2g} the two losses of a difference lie {apart:.2g} apart, and one unit in the last place of "
        f"the loss ({size:.3g}, {name}) is {unit:.2g}"
    )
    if dtype in HALVES:
        advice = "Compute the loss in float32: `logits.float()` before it."
        say_once(model, f"half-precision loss at {slope!r}", f"{figures}. {advice}")
    elif apart < UNITS * unit:
        advice = "Take a larger eps, or eps=None, which chooses one; a loss in float64 has finer units."
        say_once(model, f"coarse loss at {slope!r}", f"{figures}: the slope is mostly rounding. {advice}")
