"""`AdamW8bit`: AdamW whose state has 8 bits per number, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._mode_utils import no_dispatch

from gradcost.core.errors import BadInput, require
from gradcost.core.objective import Leaf
from gradcost.core.value import value
from gradcost.training.optimizers import AdamW, LeafOptimizer

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@value
class AdamW8bit(AdamW):
    """AdamW with its two running means in 8 bits (`bitsandbytes.optim.AdamW8bit`).

    Memory: 2 bytes per weight and 8 for each 256 weights. Leaves below 4,096 elements have float32 means, 8 bytes per
    weight. On a CPU, bitsandbytes updates a leaf in float32 copies, about 30 bytes per weight of the leaf.

    Args:
        lr: learning rate, above 0.
        beta1: decay rate of the running mean of the gradients.
        beta2: decay rate of the running mean of the squared gradients.
        eps: added to the denominator.
        weight_decay: each step multiplies the weights by 1 - lr * weight_decay.
        decay: decay rate of the learning rate, which is lr * exp(-decay * step).
    Raises:
        MissingExtra: when built: bitsandbytes is not installed.
        BadInput: when built: a leaf is neither float32 nor of 16 bits.
    Source: Dettmers et al. 2022 (arXiv 2110.02861).
    """

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        optim = require("bitsandbytes.optim", "AdamW8bit", "bitsandbytes")
        for leaf in leaves:
            if leaf.parameter.dtype not in _TYPES:
                raise BadInput(f"AdamW8bit: {leaf.name} has dtype {leaf.parameter.dtype}; use float32, or 16 bits.")
        parameters = [leaf.parameter for leaf in leaves]
        betas = (self.beta1, self.beta2)
        with no_dispatch():  # its tables of 256 levels are numbers in a forecast too
            return optim.AdamW8bit(parameters, self.lr, betas, self.eps, weight_decay=self.weight_decay)
