"""Updates of half-precision weights that rounding does not swallow.

A weight in bfloat16 moves in steps of 1/256 to 1/128 of its size: of updates of RMS 1e-5 to weights of RMS 0.02, as a
fine-tuning step makes them, 12% move a weight at all, and 61% in float16. Both optimizers here move a float32 weight
instead, with the optimizer's state in float32, and round that: either it is kept, or it is rounded at random. A
float32 leaf is moved as by the plain optimizer, bit for bit.
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

_CHUNK = 1 << 16  # elements whose temporaries are alive at once


@value
class Master(Optimizer):
    """`optimizer` on a float32 copy of each half-precision leaf; the leaf is its rounding to nearest.

    Keeps 4 bytes a half-precision weight beside the optimizer's own state. The copies are made when the optimizer
    is built: a leaf that something else moves afterwards is put back at the next step.

    Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.1.
    """

    optimizer: Optimizer

    @property
    def lr(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.lr

    @property
    def decay(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.decay

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return _Kept(self.optimizer, leaves) if _halves(leaves) else self.optimizer.build(leaves)


@value
class StochasticallyRounded(Optimizer):
    """`optimizer` in float32, whose result is rounded at random to one of a half-precision weight's two neighbours.

    Law: the mean of the rounded weight is the weight, whatever its size within the type's range, so that updates
    far below a unit in the last place are right on average. No copy is kept. The same key gives the same bits: they
    are a function of (key, step, index of the weight) alone.

    Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.1; Zamirai et al. 2020 (arXiv 2010.06192) for bfloat16.
    """

    optimizer: Optimizer
    key: Key = Key(0)

    @property
    def lr(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.lr

    @property
    def decay(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.decay

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return _Drawn(self.optimizer, leaves, self.key) if _halves(leaves) else self.optimizer.build(leaves)


def _halves(leaves: Sequence[Leaf]) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.parameter.dtype in HALVES]


class _Raised(ABC):
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
            self.settle()

    @abstractmethod
    def lift(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        """Make the stand-in the float32 weight from which the leaf moves."""

    @abstractmethod
    def lower(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        """Round the moved stand-in to the leaf."""

    @abstractmethod
    def settle(self) -> None:
        """The step is over."""


class _Kept(_Raised):
    def lift(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        pass

    def lower(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        leaf.parameter.copy_(stand_in)

    def settle(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        masters = {leaf.name: master.detach() for leaf, master in self.pairs}
        return {"optimizer": self.inner.state_dict(), "masters": masters}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        with torch.no_grad():
            for leaf, master in self.pairs:
                master.copy_(state_dict["masters"][leaf.name])


class _Drawn(_Raised):
    def __init__(self, optimizer: Optimizer, leaves: Sequence[Leaf], key: Key) -> None:
        super().__init__(optimizer, leaves)
        self.key, self.taken = key, 0
        for _, stand_in in self.pairs:
            _emptied(stand_in)

    def lift(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        stand_in.data = leaf.parameter.detach().float()

    def lower(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        rounded_into(leaf.parameter.detach(), stand_in.detach(), self.key.fold("rounding", self.taken), leaf.start)
        _emptied(stand_in)

    def settle(self) -> None:
        self.taken += 1

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.inner.state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        self.taken = state_dict["taken"]


def _emptied(stand_in: nn.Parameter) -> None:
    """Between steps a stand-in is a name for the optimizer's state and holds nothing."""
    stand_in.data = stand_in.data.new_empty(0)


def rounded_into(out: Tensor, source: Tensor, key: Key, start: int = 0) -> Tensor:
    """Write `source` (float32) to `out` (half precision), each number rounded at random to one of its neighbours.

    Law: x between neighbours a < b becomes b with probability (x - a) / (b - a), to 2^-32; a number of the type
    stays; what is beyond the largest stays as rounding to nearest leaves it. With `start` the index of the first
    element, rounding piece by piece is rounding the whole, bit for bit: element i draws word i mod 4 of Philox block
    i div 4 (see `philox`), whatever the device. Shapes: both alike; `out` may have any strides.
    """
    flat, rounded = source.reshape(-1), torch.empty(source.numel(), dtype=out.dtype, device=out.device)
    starts = range(0, flat.numel(), _CHUNK)
    for at in starts[:1] if is_fake(out) else starts:  # of a fake one no other needs more memory than the first
        piece = flat[at : at + _CHUNK]
        rounded[at : at + _CHUNK] = _rounded(piece, out.dtype, key.seed, start + at)
    return out.copy_(rounded.reshape(out.shape))


def _rounded(piece: Tensor, dtype: torch.dtype, seed: int, start: int) -> Tensor:
    information = torch.finfo(dtype)
    exact = piece.double()  # every step from here on is exact
    # The exponent of the number as frexp gives it, or of the least normal one: below it the spacing is constant.
    exponent = torch.frexp(exact).exponent.clamp_(min=round(math.log2(information.smallest_normal)) + 1).long()
    # 2^exponent times half an epsilon, from its bits: a vectorised power of 2 need not be exact.
    spacing = ((exponent + (1022 + round(math.log2(information.eps)))) << 52).view(torch.float64)
    steps = exact / spacing
    below = steps.floor()
    up = _uniform(seed, start, piece) < steps - below
    rounded = (below + up) * spacing
    return torch.where(exact.abs() <= information.max, rounded, exact).to(dtype)


def _uniform(seed: int, start: int, piece: Tensor) -> Tensor:
    """Numbers in [0, 1), multiples of 2^-32, one for each of a piece: those of the indices from `start` on."""
    first, last = start // 4, (start + piece.numel() - 1) // 4
    if is_fake(piece):  # whose numbers nobody asks for: those that `arange` makes, fake tensors would compute with
        counter = torch.empty(last + 1 - first, dtype=torch.int64, device=piece.device)
    else:
        counter = torch.arange(first, last + 1, dtype=torch.int64, device=piece.device)
    words = torch.stack(philox_at(counter, seed), dim=1).reshape(-1)
    offset = start - 4 * first
    return words[offset : offset + piece.numel()].double() * 2.0**-32
