"""Optimizers for half-precision weights whose updates are not lost to rounding.

The spacing of bfloat16 is 1/256 to 1/128 of a weight. A fine-tuning step has updates of RMS 1e-5 on weights of RMS
0.02: in bfloat16 12% of them change a weight at all, in float16 61%. Both optimizers here compute a step in float32,
with the optimizer's state in float32. `Master` keeps the float32 weights, `StochasticallyRounded` rounds at random.
A float32 parameter moves as under the plain optimizer, bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.fake import is_fake
from gradcost.core.key import Key
from gradcost.core.objective import Leaf
from gradcost.core.precision import HALVES
from gradcost.core.value import value
from gradcost.noise.philox import philox_at
from gradcost.training.optimizers import LeafOptimizer, Optimizer

_CHUNK = 1 << 16  # elements rounded at once, which bounds the temporaries


class _InFloat32(Optimizer):
    """Wraps another optimizer and has its learning rate and decay."""

    optimizer: Optimizer

    @property
    def lr(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.lr

    @property
    def decay(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.decay


@value
class Master(_InFloat32):
    """Apply `optimizer` to a float32 master copy of each half-precision parameter, then round the copy to nearest.

    Memory: 4 bytes per half-precision weight, beside the optimizer's state. The copies are made when the optimizer is
    built. Changes that other code makes to a parameter afterwards are lost at the next step.

    Args:
        optimizer: moves the float32 copies, and the other parameters directly.
    Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.1.
    """

    optimizer: Optimizer

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return _MasterCopies(self.optimizer, leaves) if _halves(leaves) else self.optimizer.build(leaves)


@value
class StochasticallyRounded(_InFloat32):
    """Apply `optimizer` in float32, then round each half-precision weight at random to one of its two neighbours.

    Law: E[rounded weight] = the float32 weight, for every weight within the type's range. Updates far below a unit in
    the last place are therefore right on average. No copy is kept. The bits are a function of (key, step, index of
    the weight) alone.

    Args:
        optimizer: moves the weights in float32.
        key: the source of the rounding's randomness.
    Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.1; Zamirai et al. 2020 (arXiv 2010.06192) for bfloat16.
    """

    optimizer: Optimizer
    key: Key = Key(0)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return _RandomRounding(self.optimizer, leaves, self.key) if _halves(leaves) else self.optimizer.build(leaves)


def _halves(leaves: Sequence[Leaf]) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.parameter.dtype in HALVES]


class _StandIns(ABC):
    """An optimizer of float32 stand-ins for the half-precision leaves, and of the other leaves themselves."""

    def __init__(self, optimizer: Optimizer, leaves: Sequence[Leaf]) -> None:
        self.pairs = [(leaf, nn.Parameter(leaf.parameter.detach().float())) for leaf in _halves(leaves)]
        stand_ins = {leaf.name: leaf._replace(parameter=stand_in) for leaf, stand_in in self.pairs}
        self.inner = optimizer.build([stand_ins.get(leaf.name, leaf) for leaf in leaves])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self) -> None:
        with torch.no_grad():
            for leaf, stand_in in self.pairs:
                self.lift(leaf, stand_in)
                stand_in.grad = None if leaf.parameter.grad is None else leaf.parameter.grad.float()
            self.inner.step()
            for leaf, stand_in in self.pairs:
                stand_in.grad = None
                self.lower(leaf, stand_in)
            self.end_step()

    @abstractmethod
    def lift(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        """Set the stand-in to the float32 weight before the step."""

    @abstractmethod
    def lower(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        """Round the stand-in, after the step, into the leaf."""

    @abstractmethod
    def end_step(self) -> None:
        """Count the step, where the rounding depends on its number."""


class _MasterCopies(_StandIns):
    def lift(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        pass

    def lower(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        leaf.parameter.copy_(stand_in)

    def end_step(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        masters = {leaf.name: master.detach() for leaf, master in self.pairs}
        return {"optimizer": self.inner.state_dict(), "masters": masters}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        with torch.no_grad():
            for leaf, master in self.pairs:
                master.copy_(state_dict["masters"][leaf.name])


class _RandomRounding(_StandIns):
    def __init__(self, optimizer: Optimizer, leaves: Sequence[Leaf], key: Key) -> None:
        super().__init__(optimizer, leaves)
        self.key, self.taken = key, 0
        for _, stand_in in self.pairs:
            _empty(stand_in)

    def lift(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        stand_in.data = leaf.parameter.detach().float()

    def lower(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        rounded_into(leaf.parameter.detach(), stand_in.detach(), self.key.fold("rounding", self.taken), leaf.start)
        _empty(stand_in)

    def end_step(self) -> None:
        self.taken += 1

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.inner.state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        self.taken = state_dict["taken"]


def _empty(stand_in: nn.Parameter) -> None:
    """Free the stand-in's memory between steps; it stays the key of the optimizer's state."""
    stand_in.data = stand_in.data.new_empty(0)


def rounded_into(out: Tensor, source: Tensor, key: Key, start: int = 0) -> Tensor:
    """Round `source` at random into `out`: each number to one of its two neighbours in the type of `out`.

    Law: x between neighbours a < b becomes b with probability (x - a) / (b - a), to 2^-32.
    - A number of the type is unchanged.
    - A number beyond the largest of the type is rounded to nearest.
    - Element i uses word i mod 4 of Philox block i div 4, on every device. Rounding in pieces therefore equals
      rounding at once, bit for bit.

    Args:
        out: half precision; any strides.
        source: float32, of the shape of `out`.
        key: the source of randomness.
        start: the index of the first element.
    Returns:
        `out`.
    """
    flat, rounded = source.reshape(-1), torch.empty(source.numel(), dtype=out.dtype, device=out.device)
    starts = range(0, flat.numel(), _CHUNK)
    for at in starts[:1] if is_fake(out) else starts:  # fake tensors: no later chunk needs more memory than the first
        piece = flat[at : at + _CHUNK]
        rounded[at : at + _CHUNK] = _rounded(piece, out.dtype, key.seed, start + at)
    return out.copy_(rounded.reshape(out.shape))


def _rounded(piece: Tensor, dtype: torch.dtype, seed: int, start: int) -> Tensor:
    information = torch.finfo(dtype)
    exact = piece.double()  # every operation below is exact
    # frexp's exponent, at least that of the smallest normal number, below which the spacing is constant.
    exponent = torch.frexp(exact).exponent.clamp_(min=round(math.log2(information.smallest_normal)) + 1).long()
    # 2^exponent * eps / 2, built from bits because a vectorised power of 2 need not be exact.
    spacing = ((exponent + (1022 + round(math.log2(information.eps)))) << 52).view(torch.float64)
    steps = exact / spacing
    below = steps.floor()
    up = _uniform(seed, start, piece) < steps - below
    rounded = (below + up) * spacing
    return torch.where(exact.abs() <= information.max, rounded, exact).to(dtype)


def _uniform(seed: int, start: int, piece: Tensor) -> Tensor:
    """Return one number in [0, 1) per element, a multiple of 2^-32: those of the indices from `start` on."""
    first, last = start // 4, (start + piece.numel() - 1) // 4
    if is_fake(piece):  # not arange: small integer fake tensors carry real values
        counter = torch.empty(last + 1 - first, dtype=torch.int64, device=piece.device)
    else:
        counter = torch.arange(first, last + 1, dtype=torch.int64, device=piece.device)
    words = torch.stack(philox_at(counter, seed), dim=1).reshape(-1)
    offset = start - 4 * first
    return words[offset : offset + piece.numel()].double() * 2.0**-32
