"""Round-off of floating-point types, and the finite-difference step that balances truncation and round-off errors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.core.complex_numbers import real_count
from gradcost.core.errors import BadInput
from gradcost.core.evaluation.autocast import UnderAutocast
from gradcost.core.fake import numbers
from gradcost.core.objective import Objective

HALVES = (torch.float16, torch.bfloat16)
LEAST_SCALE = 1e-2  # least result of `scale_of`: smaller weights (zero-initialised layers) give too small an eps
_CHUNK = 1 << 20  # elements of a half-precision leaf converted to float32 at once, to bound the temporary memory


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u, the largest relative error of rounding to nearest: half a machine epsilon (bfloat16: 2^-8)."""
    return torch.finfo(dtype).eps / 2


def spacing(number: float, dtype: torch.dtype) -> float:
    """Return the distance from |number| to the next larger number of `dtype`: one unit in the last place (ulp)."""
    limits = torch.finfo(dtype)
    size = max(abs(number), limits.smallest_normal)
    return 2.0 ** math.floor(math.log2(size)) * limits.eps


def loss_roundoff(dtype: torch.dtype) -> float:
    """Return u, the relative round-off of a loss. The weights have this dtype; the loss is in float32 or float64.

      - float32 and float64: u is the unit round-off of `dtype`.
      - Half precision: u is the geometric mean of the unit round-offs of `dtype` and of float32. A loss is a mean
        over many activations, each rounded separately, so most of their errors cancel.

    The half-precision value is an estimate: 1.5e-5 in bfloat16 and 5.4e-6 in float16. Measured on the loss of a small
    GPT over 128 words: 1.6e-5 and 2.8e-6.
    """
    return math.sqrt(unit_roundoff(dtype) * min(unit_roundoff(dtype), unit_roundoff(torch.float32)))


def best_eps(dtype: torch.dtype, scale: float = 1.0, loss: float = 1.0, third: float = 1.0) -> float:
    """Return the eps of a central difference that minimises truncation error plus round-off error.

    Law: f(t) is the loss at theta + t z, with z the direction. The error eps^2/6 |f'''| + u |f| / eps is least at
    eps = (3 u |f| / |f'''|)^(1/3), with u = `loss_roundoff(dtype)` and f''' = third / scale^3.
    The defaults assume that the loss changes by about its own size when every weight changes by `scale`.

    Args:
        dtype: the dtype of the weights.
        scale: typical absolute value of a weight.
        loss: |f|.
        third: |f'''| with weights measured in units of `scale`.
    Returns:
        eps, in units of the parameters.
    Raises:
        BadInput: scale, loss or third is infinite, nan, 0 or negative.
    Source: Press et al., Numerical Recipes (3rd ed. 2007), section 5.7; Dennis and Schnabel 1983, section 5.4.
    """
    _above_zero(scale, loss, third)
    return scale * (3 * loss_roundoff(dtype) * loss / third) ** (1 / 3)


def best_forward_eps(dtype: torch.dtype, scale: float = 1.0, loss: float = 1.0, second: float = 1 / 16) -> float:
    """Return the eps of a one-sided difference that minimises truncation error plus round-off error.

    Law: f(t) is the loss at theta + t z, with z the direction. The error eps/2 |f''| + 2 u |f| / eps is least at
    eps = 2 (u |f| / |f''|)^(1/2), with u = `loss_roundoff(dtype)` and f'' = second / scale^2.

    Args:
        dtype: the dtype of the weights.
        scale: typical absolute value of a weight.
        loss: |f|.
        second: |f''| with weights measured in units of `scale`. The default is typical of networks: along a random
            direction, f'' averages many curvatures near 0. Measured: 1/20 of the loss (GPT) and 1/27 (MLP).
    Returns:
        eps, in units of the parameters.
    Raises:
        BadInput: scale, loss or second is infinite, nan, 0 or negative.
    """
    _above_zero(scale, loss, second)
    return scale * 2 * (loss_roundoff(dtype) * loss / second) ** 0.5


def _above_zero(*sizes: float) -> None:
    if not all(0 < size < math.inf for size in sizes):
        raise BadInput(f"scale, loss and derivative must be finite and above 0, not {sizes}.")


def scale_of(objective: Objective) -> float:
    """Return the typical absolute value of a weight, at least 0.01.

    Law: the mean of the root mean squares of the leaves, weighted by their numbers of elements.

    A few leaves with large weights (LayerNorm's ones) or zeros (zero-initialised layers) hardly change the result.
    Cost: one pass over the weights, without a copy.
    """
    leaves = [leaf.parameter.detach() for leaf in objective.leaves]
    norms = numbers(torch.stack([_norm(leaf).to(leaves[0].device) for leaf in leaves]))
    total = sum(norm * math.sqrt(real_count(leaf)) for norm, leaf in zip(norms, leaves, strict=True))
    return max(total / objective.dimension, LEAST_SCALE)


def central_eps(objective: Objective) -> float:
    """Return the eps of a central difference at the current weights, by `best_eps`.

    If most weights are frozen (LoRA adapters), moving the trainable weights by their size changes the loss f by less
    than |f|. Law: f''' = sqrt(trainable weights / all weights) |f|, with weights in units of `scale_of`.
    Measured on adapters of a small Llama (2% of its weights): f''' = 0.02 |f| is best for fresh adapters, up to 1 |f|
    for trained ones.
    """
    total = sum(p.numel() for p in objective.model.parameters() if p.is_floating_point() or p.is_complex())
    return best_eps(coarsest(objective), scale_of(objective), third=math.sqrt(objective.dimension / total))


def _norm(leaf: Tensor) -> Tensor:
    if leaf.dtype not in HALVES:
        return torch.linalg.vector_norm(leaf).double()
    pieces = leaf.reshape(-1).split(_CHUNK)  # without pieces, torch would copy all of the leaf to float32
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms)).double()


def coarsest(objective: Objective) -> torch.dtype:
    """Return the least precise dtype of an evaluation, among those of the leaves and of autocast (if enabled)."""
    types = {leaf.parameter.dtype for leaf in objective.leaves}
    device = objective.leaves[0].parameter.device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    if isinstance(objective.loss, UnderAutocast):
        types.add(objective.loss.dtype)
    return max(types, key=unit_roundoff)


# ---- a loss in float32


def _in_float32(function: Any) -> Any:
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = pytree.tree_map(_as_float32, (args, kwargs))
        return function(*args, **kwargs)

    return loss


def _as_float32(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and argument.dtype in HALVES else argument


# Versions of torch's losses that convert half-precision inputs to float32. In bfloat16, one ulp of a loss near 2 is
# an error of 7.8 in a slope measured at eps = 1e-3. `substituted` and `with_rules` replace each loss by its version.
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
