"""Unit round-off, spacing, and the step of a difference that balances truncation against it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput
from gradcost.core.fake import numbers
from gradcost.core.objective import Objective

HALVES = (torch.float16, torch.bfloat16)
LEAST_SCALE = 1e-2  # below it (zero-initialised layers) the weights say nothing of the length the loss varies over
_CHUNK = 1 << 20  # elements of a half-precision leaf that may be float32 at once


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to nearest, half a machine epsilon (bfloat16: 2^-8)."""
    return torch.finfo(dtype).eps / 2


def spacing(number: float, dtype: torch.dtype) -> float:
    """The distance from |number| to the next larger one of a type (one unit in the last place)."""
    information = torch.finfo(dtype)
    size = max(abs(number), information.smallest_normal)
    return 2.0 ** math.floor(math.log2(size)) * information.eps


def loss_roundoff(dtype: torch.dtype) -> float:
    """u: the relative round-off of a loss computed with weights of `dtype`, and itself in float32 or better.

    float32 and float64: their own unit round-off. Half precision: the geometric mean of its unit round-off and
    float32's, for a loss is the mean over very many activations, each rounded by itself, so that most of their errors
    cancel. An estimate: a small GPT's loss over 128 words had 1.6e-5 in bfloat16 and 2.8e-6 in float16; this gives
    1.5e-5 and 5.4e-6.
    """
    return math.sqrt(unit_roundoff(dtype) * min(unit_roundoff(dtype), unit_roundoff(torch.float32)))


def best_eps(dtype: torch.dtype, scale: float = 1.0, loss: float = 1.0, third: float = 1.0) -> float:
    """The eps of a central difference at which truncation and round-off together are least.

    Law: the error eps^2/6 |f'''| + u |f| / eps is least at eps = (3 u |f| / |f'''|)^(1/3), where u is the round-off
    of a loss computed with weights of `dtype` (`loss_roundoff`). `loss` is |f|, and `third` the third derivative
    along the direction when weights are measured in units of `scale`: f''' = third / scale^3. With both 1 the
    assumption is that the loss changes by its own size when every weight changes by `scale`.

    Source: Press et al., Numerical Recipes (3rd ed. 2007), section 5.7; Dennis and Schnabel 1983, section 5.4.
    Raises: ValueError when scale, loss or third is not above 0.
    """
    _above_zero(scale, loss, third)
    return scale * (3 * loss_roundoff(dtype) * loss / third) ** (1 / 3)


def best_forward_eps(dtype: torch.dtype, scale: float = 1.0, loss: float = 1.0, second: float = 1 / 16) -> float:
    """The eps of a one-sided difference at which truncation and round-off together are least.

    Law: the error eps/2 |f''| + 2 u |f| / eps is least at eps = 2 (u |f| / |f''|)^(1/2); f'' = second / scale^2.
    The default of `second` is a network's: along a random direction the second derivative is the mean of curvatures
    most of which are near 0 (1/20 of the loss in units of the scale in a GPT, 1/27 in an MLP). Else as `best_eps`.
    """
    _above_zero(scale, loss, second)
    return scale * 2 * (loss_roundoff(dtype) * loss / second) ** 0.5


def _above_zero(*given: float) -> None:
    if not all(0 < number < math.inf for number in given):
        raise BadInput(f"the scale, the loss and its derivative are sizes, finite and above 0, not {given}.")


def scale_of(objective: Objective) -> float:
    """How large the weights are: the RMS of each leaf, averaged over the weights; at least 0.01.

    A few large leaves (LayerNorm's ones) hardly move it, nor do the zeros of a layer that starts at zero. Costs
    one pass over the weights and no copy of them.
    """
    leaves = [leaf.parameter.detach() for leaf in objective.leaves]
    norms = numbers(torch.stack([_norm(leaf).to(leaves[0].device) for leaf in leaves]))
    total = sum(norm * math.sqrt(leaf.numel()) for norm, leaf in zip(norms, leaves, strict=True))
    return max(total / objective.dimension, LEAST_SCALE)


def _norm(leaf: Tensor) -> Tensor:
    if leaf.dtype not in HALVES:
        return torch.linalg.vector_norm(leaf).double()
    pieces = leaf.reshape(-1).split(_CHUNK)  # a norm in float32 of the whole would make a float32 copy of it
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms)).double()


def coarsest(objective: Objective) -> torch.dtype:
    """The type of least precision that an evaluation computes in, as far as can be seen before it: that of the
    leaves, and autocast's where it is on."""
    types = {leaf.parameter.dtype for leaf in objective.leaves}
    device = objective.leaves[0].parameter.device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    return max(types, key=unit_roundoff)


# ---- a loss in float32


def _in_float32(function: Any) -> Any:
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = pytree.tree_map(_raised, (args, kwargs))
        return function(*args, **kwargs)

    return loss


def _raised(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.dtype in HALVES else argument


# Losses that are given half precision are computed in float32: one bfloat16 unit of a loss near 2 is 7.8 in a
# slope measured at eps = 1e-3. Rules for `substituted`.
LOSSES_IN_FLOAT32 = {
    function: _in_float32(function)
    for function in (
        F.cross_entropy,
        F.nll_loss,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.kl_div,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
    )
}
