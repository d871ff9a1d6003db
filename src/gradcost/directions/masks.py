"""Masks: directions restricted to weights chosen by size, at random, or by name."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions.confined import confined
from gradcost.directions.direction import Directions, StatefulDirections
from gradcost.directions.independent import Gaussian, Rademacher
from gradcost.directions.sphere import Sphere
from gradcost.noise import philox
from gradcost.noise.add import add_noise


class Mask(ABC):
    """A choice of the weights that an estimate perturbs and updates. All other weights are constant."""

    unbiased: bool  # whether E[z z'] = I for the masked directions z and a random key

    @abstractmethod
    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        """Return the masked directions of one estimate, at the objective's current weights.

        Args:
            directions: the directions to mask.
            objective: the objective of the estimate.
            key: the key of the estimate.
        Returns:
            Directions that are zero on all weights that are not chosen.
        """


@value
class Smallest(Mask):
    """The weights with the smallest |w| in each leaf: round(share * size) of its `size` weights, at least one.

    The mask is |w| <= threshold, with one threshold per leaf. All weights that equal the threshold are chosen, so the
    number can be larger: in a leaf of equal weights, all are chosen. No mask is stored. The threshold is computed at
    every estimate; the paper computes it once, before training.

    Args:
        share: fraction of each leaf's weights that are chosen, above 0 and at most 1.
    Raises:
        BadInput: the share is out of range; or a gradient is used after the weights changed.
    Source: Liu et al., "Sparse MeZO", arXiv 2402.15751 (2024), algorithm 1.
    """

    share: float
    unbiased = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        thresholds = _thresholds(objective, lambda size: _chosen_count(self.share, size))
        return _SharedMask(directions, functools.partial(_at_most, thresholds))


@value
class Largest(Mask):
    """The weights with the largest |w| in each leaf: |w| >= threshold. Otherwise as `Smallest`.

    Args:
        share: fraction of each leaf's weights that are chosen, above 0 and at most 1.
    Raises:
        BadInput: the share is out of range; or a gradient is used after the weights changed.
    """

    share: float
    unbiased = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        thresholds = _thresholds(objective, lambda size: size + 1 - _chosen_count(self.share, size))
        return _SharedMask(directions, functools.partial(_at_least, thresholds))


@value
class Fixed(Mask):
    """A random choice of weights, the same at every estimate.

    Law: E[z z'] = diag(mask) if the unmasked directions have E[u u'] = I.

    Args:
        share: the probability that a weight is chosen, above 0 and at most 1.
        seed: determines which weights are chosen.
    Raises:
        BadInput: the share is out of range, or the seed does not fit 64 bits.
    """

    share: float
    seed: int = 0
    unbiased = False

    def __post_init__(self) -> None:
        _check_share(self.share)
        Key(self.seed)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        return _SharedMask(directions, functools.partial(_random_mask, Key(self.seed), self.share))


@value
class Random(Mask):
    """A new random choice of weights for each probe; z is scaled by 1 / sqrt(share).

    Law: E[z z'] = I and E|z|^2 = d. For Gaussian directions and n probes, the estimate g of the gradient grad has
    E|g|^2 = (1 + (d - 2 + 3 / share) / n) |grad|^2, at least as much as without a mask. In half precision, a sum of
    several probes is rounded after each probe.

    Args:
        share: the probability that a weight is chosen, above 0 and at most 1.
    Raises:
        BadInput: the share is out of range.
    """

    share: float
    unbiased = True

    def __post_init__(self) -> None:
        _check_share(self.share)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        return _MaskPerSeed(directions, self.share, key.fold("mask"))


@value
class Named(Mask):
    """All weights of the parameters whose name matches a pattern, the same at every estimate.

    Cost: other parameters are neither copied for a finite difference nor given a tangent in forward mode.

    Args:
        pattern: an `fnmatch` pattern, such as "*.attention.*" or "head.?".
    Raises:
        BadInput: no trainable parameter has a matching name. The estimate raises it.
    """

    pattern: str
    unbiased = False

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        leaves = [leaf for leaf in objective.leaves if fnmatchcase(leaf.name, self.pattern)]
        if not leaves:
            raise BadInput(
                f"no trainable parameter matches {self.pattern!r}. Match one of "
                f"{', '.join(leaf.name for leaf in objective.leaves)}."
            )
        return confined(directions, leaves)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise BadInput(f"share, the fraction of weights that a mask chooses, must be in (0, 1], not {share!r}.")


def _chosen_count(share: float, size: int) -> int:
    return max(1, round(share * size))


# ---- functions that recompute a leaf's mask when it is needed: storing it would need memory of the leaf's size


class _Threshold(NamedTuple):
    magnitude: Tensor  # |w| at the threshold. Not a float: that would force a device synchronisation
    version: int  # the parameter's version counter when the threshold was computed


def _thresholds(objective: Objective, rank: Callable[[int], int]) -> dict[str, _Threshold]:
    """Return the rank(size)-th smallest |w| of each leaf, with `size` its number of weights and ranks from 1."""
    return {
        leaf.name: _Threshold(_kth_smallest(_magnitudes(leaf).flatten(), rank), _version(leaf))
        for leaf in objective.leaves
    }


def _kth_smallest(magnitudes: Tensor, rank: Callable[[int], int]) -> Tensor:
    return magnitudes.kthvalue(rank(len(magnitudes))).values if len(magnitudes) else magnitudes.sum()


def _magnitudes(leaf: Leaf) -> Tensor:
    return leaf.parameter.detach().abs()


def _version(leaf: Leaf) -> int:
    return leaf.parameter._version


def _at_most(thresholds: Mapping[str, _Threshold], leaf: Leaf) -> Tensor:
    return _magnitudes(leaf).le(_checked_threshold(thresholds, leaf))


def _at_least(thresholds: Mapping[str, _Threshold], leaf: Leaf) -> Tensor:
    return _magnitudes(leaf).ge(_checked_threshold(thresholds, leaf))


def _checked_threshold(thresholds: Mapping[str, _Threshold], leaf: Leaf) -> Tensor:
    """Return the leaf's threshold. Raise BadInput if the leaf has changed since the threshold was computed."""
    magnitude, version = thresholds[leaf.name]
    if _version(leaf) != version:
        raise BadInput(
            f"`{leaf.name}` was changed after its mask was computed, so the gradient can no longer be replayed. Use "
            "write() or stream before the weights change, or estimate again."
        )
    return magnitude


def _random_mask(key: Key, share: float, leaf: Leaf) -> Tensor:
    """Choose each weight with probability `share`: its normal number is below the normal quantile of `share`."""
    zero = torch.zeros_like(
        leaf.parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format
    )
    normal = add_noise(philox.Normals(), [key.seed], [1.0], leaf.start, zero, in_place=True)
    return normal.lt(NormalDist().inv_cdf(share) if share < 1 else math.inf)


# ---- the directions of one estimate


@dataclass(frozen=True, eq=False)
class _SharedMask(Directions):
    """One mask for all seeds: z = mask * u."""

    directions: Directions
    mask: Callable[[Leaf], Tensor] = field(repr=False)
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, probes, dimension)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        mask = self.mask(leaf)
        unmasked = self.directions.add(base, leaf, seeds, scales)
        return torch.where(mask, unmasked, base.detach(), out=base if in_place else unmasked)


@dataclass(frozen=True, eq=False)
class _MaskPerSeed(Directions):
    """One mask per seed: z = mask * u / sqrt(share)."""

    directions: Directions
    share: float
    key: Key
    unbiased = True

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, probes, dimension)

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        out = base if in_place else base.detach().clone(memory_format=torch.contiguous_format)
        for seed, scale in zip(seeds, scales, strict=True):
            # Seeds can recur: those of `Coordinates` are weight indices. The estimate's key makes their masks differ.
            mask = _random_mask(self.key.fold("probe", seed), self.share, leaf)
            unmasked = self.directions.add(out, leaf, [seed], [scale / math.sqrt(self.share)])
            torch.where(mask, unmasked, out, out=out)
            del mask, unmasked  # frees their memory before the next probe
        return out


@value
class Masked(StatefulDirections):
    """z = mask * u, with u from `directions`: only the chosen weights (mask = 1) are perturbed and updated.

    Law: if E[u u'] = I, then E[z z'] = diag(mask), so the mean estimate is the gradient on the chosen weights and
    zero on all others. With a mask per probe (`Random`), E[z z'] = I, and z is also scaled by 1 / sqrt(share).
    Weights that are not chosen stay bitwise the same. A mask by size depends on the unperturbed weights. No mask is
    stored.

    A gradient is stored as seeds and regenerated when it is used. If its mask depends on the weights, it must be used
    before they change in place. A change through `parameter.data` is not detected: do not use it.

    Args:
        mask: the choice of weights.
        directions: the distribution of u.
    Raises:
        BadInput: a gradient is used after the weights changed, and its mask depends on the weights.
    Source: Liu et al., "Sparse MeZO", arXiv 2402.15751 (2024), algorithm 1; see also each mask.
    """

    mask: Mask
    directions: Directions = Gaussian()

    def __post_init__(self) -> None:
        object.__setattr__(self, "unbiased", self.mask.unbiased and self.directions.unbiased)
        # Only a mask that is drawn for each probe (`Random`) is unbiased. Sign flips and permutations of the entries
        # of z then do not change the law of z, if they do not change that of u. Coordinates and Orthogonal are
        # symmetric because they are orthogonal, which masked ones are not.
        is_invariant = isinstance(self.directions, Gaussian | Rademacher | Sphere)
        object.__setattr__(self, "symmetric", self.mask.unbiased and is_invariant)

    def init(self, objective: Objective) -> None:
        return None

    def resolve(self, objective: Objective, key: Key, state: None) -> tuple[Directions, None]:
        return self.mask.over(self.directions, objective, key), None

    def update(self, state: None, gradient: Iterator[tuple[str, Tensor]]) -> None:
        return None
