"""Optimizers for half-precision weights whose updates are not lost to rounding.

The distance between neighbouring bfloat16 numbers is 1/256 to 1/128 of their size. A fine-tuning step has updates of
RMS 1e-5 on weights of RMS 0.02. Only 12% of these updates change a bfloat16 weight at all, and 61% a float16 weight.
Both optimizers here compute the step and store the optimizer state in float32. `Master` also stores the weights in
float32. `StochasticallyRounded` rounds the weights at random instead. Float32 parameters move exactly as with the
wrapped optimizer, bit for bit.
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

_CHUNK = 1 << 16  # elements rounded at once; bounds the memory of temporary tensors


class _InFloat32(Optimizer):
    """Wraps another optimizer; `lr`, `usual_rates` and `decay` are those of the wrapped one."""

    optimizer: Optimizer

    @property
    def lr(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.lr

    @property
    def usual_rates(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.usual_rates

    @property
    def decay(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.optimizer.decay


@value
class Master(_InFloat32):
    """Apply `optimizer` to a float32 master copy of each half-precision parameter, then round the copy to nearest.

    Memory: 4 bytes per half-precision weight, in addition to the optimizer state. The copies are made when the
    optimizer is built. If other code changes a half-precision parameter later, the next step discards that change.

    Args:
        optimizer: the optimizer that moves the float32 copies, and float32 parameters directly.
    Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.1.
    """

    optimizer: Optimizer

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return _MasterCopies(self.optimizer, leaves) if _half_leaves(leaves) else self.optimizer.build(leaves)


@value
class StochasticallyRounded(_InFloat32):
    """Apply `optimizer` in float32, then round each half-precision weight at random to one of its two neighbours.

    Law: E[rounded weight] = the float32 weight, for every weight within the range of the half-precision type. Updates
    far smaller than the distance between neighbours therefore have their full effect on average. No float32 copy is
    stored between steps. The random bits depend only on (key, step, index of the weight).

    Args:
        optimizer: the optimizer that moves the weights in float32.
        key: the source of randomness for rounding.
    Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.1; Zamirai et al. 2020 (arXiv 2010.06192) for bfloat16.
    """

    optimizer: Optimizer
    key: Key = Key(0)

    def build(self, leaves: Sequence[Leaf]) -> LeafOptimizer:
        return (
            _RandomRounding(self.optimizer, leaves, self.key)
            if _half_leaves(leaves)
            else self.optimizer.build(leaves)
        )


def _half_leaves(leaves: Sequence[Leaf]) -> list[Leaf]:
    return [leaf for leaf in leaves if leaf.parameter.dtype in HALVES]


class _StandIns(ABC):
    """Runs an optimizer on a float32 stand-in for each half-precision leaf, and on the other leaves directly."""

    def __init__(self, optimizer: Optimizer, leaves: Sequence[Leaf]) -> None:
        self.pairs = [(leaf, nn.Parameter(leaf.parameter.detach().float())) for leaf in _half_leaves(leaves)]
        stand_ins = {leaf.name: leaf._replace(parameter=stand_in) for leaf, stand_in in self.pairs}
        self.inner = optimizer.build([stand_ins.get(leaf.name, leaf) for leaf in leaves])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self) -> None:
        with torch.no_grad():
            for leaf, stand_in in self.pairs:
                self.fill_stand_in(leaf, stand_in)
                stand_in.grad = None if leaf.parameter.grad is None else leaf.parameter.grad.float()
            self.inner.step()
            for leaf, stand_in in self.pairs:
                stand_in.grad = None
                self.round_into_leaf(leaf, stand_in)
            self.end_step()

    @abstractmethod
    def fill_stand_in(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        """Give the stand-in its float32 weights for the coming step."""

    @abstractmethod
    def round_into_leaf(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        """Round the stepped stand-in into the half-precision leaf."""

    @abstractmethod
    def end_step(self) -> None:
        """Count the step if the rounding depends on the step number."""


class _MasterCopies(_StandIns):
    def fill_stand_in(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        pass

    def round_into_leaf(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
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
            _free_values(stand_in)

    def fill_stand_in(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        stand_in.data = leaf.parameter.detach().float()

    def round_into_leaf(self, leaf: Leaf, stand_in: nn.Parameter) -> None:
        rounded_into(leaf.parameter.detach(), stand_in.detach(), self.key.fold("rounding", self.taken), leaf.start)
        _free_values(stand_in)

    def end_step(self) -> None:
        self.taken += 1

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.inner.state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.inner.load_state_dict(state_dict["optimizer"])
        self.taken = state_dict["taken"]


def _free_values(stand_in: nn.Parameter) -> None:
    """Free the stand-in's values. The empty Parameter stays, because it is the key of its optimizer state."""
    stand_in.data = stand_in.data.new_empty(0)


def rounded_into(out: Tensor, source: Tensor, key: Key, start: int = 0) -> Tensor:
    """Write `source` to `out`, each number rounded at random to one of its two neighbours in the type of `out`.

    Law: x between neighbours a < b becomes b with probability (x - a) / (b - a), to within 2^-32.
    - A number that the type of `out` represents exactly is unchanged.
    - A number beyond the largest finite number of the type is rounded to nearest.
    - Element i uses word i mod 4 of Philox block i div 4, on every device. Rounding a tensor in pieces therefore
      gives the same bits as rounding it at once.

    Args:
        out: the output tensor, half precision, with any strides.
        source: float32, with the shape of `out`.
        key: the source of randomness.
        start: the index i of the first element, for the law above.
    Returns:
        `out`.
    """
    flat, rounded = source.reshape(-1), torch.empty(source.numel(), dtype=out.dtype, device=out.device)
    starts = range(0, flat.numel(), _CHUNK)
    for at in starts[:1] if is_fake(out) else starts:  # fake tensors only measure memory: one chunk is enough
        piece = flat[at : at + _CHUNK]
        rounded[at : at + _CHUNK] = _rounded_at_random(piece, out.dtype, key.seed, start + at)
    return out.copy_(rounded.reshape(out.shape))


def _rounded_at_random(piece: Tensor, dtype: torch.dtype, seed: int, start: int) -> Tensor:
    """Return a piece rounded at random to `dtype`; its first element has index `start`."""
    finfo = torch.finfo(dtype)
    exact = piece.double()  # every operation below is exact
    # The clamp: all subnormal numbers have the same spacing as the smallest normal number.
    exponent = torch.frexp(exact).exponent.clamp_(min=round(math.log2(finfo.smallest_normal)) + 1).long()
    # 2^exponent * eps / 2, built from its float64 bits, because a vectorised power of 2 need not be exact.
    spacing = ((exponent + (1022 + round(math.log2(finfo.eps)))) << 52).view(torch.float64)
    steps = exact / spacing
    below = steps.floor()
    up = _uniform(seed, start, piece) < steps - below
    rounded = (below + up) * spacing
    return torch.where(exact.abs() <= finfo.max, rounded, exact).to(dtype)


def _uniform(seed: int, start: int, piece: Tensor) -> Tensor:
    """Return one multiple of 2^-32 in [0, 1) per element of `piece`, for indices start, start + 1, ..."""
    first, last = start // 4, (start + piece.numel() - 1) // 4
    if is_fake(piece):  # not arange: the fake of a small integer tensor would store real values
        counter = torch.empty(last + 1 - first, dtype=torch.int64, device=piece.device)
    else:
        counter = torch.arange(first, last + 1, dtype=torch.int64, device=piece.device)
    words = torch.stack(philox_at(counter, seed), dim=1).reshape(-1)
    offset = start - 4 * first
    return words[offset : offset + piece.numel()].double() * 2.0**-32
