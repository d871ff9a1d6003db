"""Which weights are moved: by their size, by chance, or by the leaf that they are in."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Leaf, Objective
from gradcost.core.value import value
from gradcost.directions.direction import Directions, SparseDirections, StatefulDirections
from gradcost.directions.independent import Gaussian
from gradcost.noise import philox
from gradcost.noise.add import add_noise


class Mask(ABC):
    """A way of choosing the weights that an estimate moves. The others are as if they were frozen."""

    unbiased: bool  # whether directions with E[z z'] = I have it behind the mask too, over the draw of a key

    @abstractmethod
    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        """The directions of one estimate, zero off the mask that is found at the objective's present weights."""


@value
class Smallest(Mask):
    """Of each leaf the `share` of its weights with the smallest |w|: round(share * size) of them, at least one.

    What is kept is |w| <= threshold, one number a leaf, so weights of one size are kept together: ties at the
    threshold keep more than the share (all of a leaf of equal weights). No mask is stored. The threshold is found
    at every estimate anew, where the source finds it once, before training.

    Source: Liu et al., "Sparse MeZO", arXiv 2402.15751 (2024), algorithm 1.
    Raises: ValueError when the share is not above 0 and at most 1; at a replay after the weights were changed.
    """

    share: float
    unbiased = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        found = _thresholds(objective, lambda size: _kept(self.share, size))
        return _Standing(directions, functools.partial(_at_most, found))


@value
class Largest(Mask):
    """As `Smallest`, but those with the largest |w|: |w| >= threshold is kept, and so are ties at it."""

    share: float
    unbiased = False

    def __post_init__(self) -> None:
        _check_share(self.share)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        found = _thresholds(objective, lambda size: size + 1 - _kept(self.share, size))
        return _Standing(directions, functools.partial(_at_least, found))


@value
class Fixed(Mask):
    """Each weight with probability `share`, the same ones at every estimate: E[z z'] = diag(mask).

    Raises: ValueError when the share is not above 0 and at most 1, or the seed is no 64-bit one.
    """

    share: float
    seed: int = 0
    unbiased = False

    def __post_init__(self) -> None:
        _check_share(self.share)
        Key(self.seed)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        return _Standing(directions, functools.partial(_drawn, Key(self.seed), self.share))


@value
class Random(Mask):
    """Each weight with probability `share`, drawn anew for each probe; z is scaled by 1 / sqrt(share).

    Law: E[z z'] = I. Over Gaussian directions E|g|^2 = (1 + (d - 2 + 3 / share) / n) |grad|^2, so it scatters no
    less than they do: |z|^2 = d on average, whatever the share. In half precision each probe is rounded by itself.

    Raises: ValueError when the share is not above 0 and at most 1.
    """

    share: float
    unbiased = True

    def __post_init__(self) -> None:
        _check_share(self.share)

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        return _Anew(directions, self.share, key.fold("mask"))


@value
class Named(Mask):
    """The leaves whose name matches the pattern, whole (`fnmatch`: "*.attention.*", "head.?"); the same always.

    A leaf of another name is not copied for a difference, and has no tangent in forward mode.
    Raises: ValueError, at the estimate, when no leaf's name matches.
    """

    pattern: str
    unbiased = False

    def over(self, directions: Directions, objective: Objective, key: Key) -> Directions:
        names = frozenset(leaf.name for leaf in objective.leaves if fnmatchcase(leaf.name, self.pattern))
        if not names:
            raise BadInput(
                f"no leaf has a name like {self.pattern!r}, so nothing would move. The leaves are "
                f"{', '.join(leaf.name for leaf in objective.leaves)}: match one of them."
            )
        return _Within(directions, names)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise BadInput(f"the share of the weights that a mask keeps is above 0 and at most 1, not {share!r}.")


def _kept(share: float, size: int) -> int:
    return max(1, round(share * size))


# ---- how a leaf's mask is made again, whenever it is wanted, from less than a leaf


class _Threshold(NamedTuple):
    size: Tensor  # a scalar of the leaf's dtype, where the leaf is: reading it would wait for the device
    version: int  # of the parameter, when it was found


def _thresholds(objective: Objective, rank: Callable[[int], int]) -> dict[str, _Threshold]:
    """The `rank(size)`-th smallest |w| of each leaf, counted from 1."""
    return {leaf.name: _Threshold(_ranked(_sizes(leaf).flatten(), rank), _version(leaf)) for leaf in objective.leaves}


def _ranked(sizes: Tensor, rank: Callable[[int], int]) -> Tensor:
    return sizes.kthvalue(rank(len(sizes))).values if len(sizes) else sizes.sum()


def _sizes(leaf: Leaf) -> Tensor:
    return leaf.parameter.detach().abs()


def _version(leaf: Leaf) -> int:
    return leaf.parameter._version


def _at_most(found: Mapping[str, _Threshold], leaf: Leaf) -> Tensor:
    return _sizes(leaf).le(_standing(found, leaf))


def _at_least(found: Mapping[str, _Threshold], leaf: Leaf) -> Tensor:
    return _sizes(leaf).ge(_standing(found, leaf))


def _standing(found: Mapping[str, _Threshold], leaf: Leaf) -> Tensor:
    """The leaf's threshold, while its weights are those that it was found at."""
    size, version = found[leaf.name]
    if _version(leaf) != version:
        raise BadInput(
            f"`{leaf.name}` was changed after its mask was found, and its weights now have another mask. Use a "
            "gradient (write() it, or stream) before the weights move, or estimate again."
        )
    return size


def _drawn(key: Key, share: float, leaf: Leaf) -> Tensor:
    """True with probability `share`, for each weight by itself: whether a normal number is below its quantile."""
    zero = torch.zeros_like(
        leaf.parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format
    )
    normal = add_noise(philox.Normals(), [key.seed], [1.0], leaf.start, zero, in_place=True)
    return normal.lt(NormalDist().inv_cdf(share) if share < 1 else math.inf)


# ---- the directions of one estimate


@dataclass(frozen=True, eq=False)
class _Standing(Directions):
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
        moved = self.directions.add(base, leaf, seeds, scales)
        return torch.where(mask, moved, base.detach(), out=base if in_place else moved)


@dataclass(frozen=True, eq=False)
class _Anew(Directions):
    """A mask for each seed: z = mask * u / sqrt(share)."""

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
            # Of the estimate's key as well: a seed of coordinates is one of few, and would have one mask for ever.
            mask = _drawn(self.key.fold("probe", seed), self.share, leaf)
            moved = self.directions.add(out, leaf, [seed], [scale / math.sqrt(self.share)])
            torch.where(mask, moved, out, out=out)
            del mask, moved  # before the next ones are made
        return out


@dataclass(frozen=True, eq=False)
class _Within(SparseDirections):
    """Zero but in the leaves with these names."""

    directions: Directions
    names: frozenset[str]
    unbiased = False

    def seeds(self, key: Key, probes: int, dimension: int) -> tuple[int, ...]:
        return self.directions.seeds(key, probes, dimension)

    def touches(self, leaf: Leaf, seeds: Sequence[int]) -> bool:
        return leaf.name in self.names

    def add(
        self, base: Tensor, leaf: Leaf, seeds: Sequence[int], scales: Sequence[float], in_place: bool = False
    ) -> Tensor:
        return self.directions.add(base, leaf, seeds, scales, in_place) if self.touches(leaf, seeds) else base


@value
class Masked(StatefulDirections):
    """z = mask * u, with u of `directions`: the weights off the mask are neither perturbed nor updated.

    Law: E[z z'] = diag(mask), the exact gradient of the weights within the mask and zero for the others; with a
    mask drawn anew for each probe (`Random`) the identity. On the mask the numbers are those of u, up to
    `Random`'s factor, and a weight off it stays as it is, bit for bit. The mask is that of the weights as they
    stand, never of perturbed ones, and nothing as large as a leaf is kept of it.

    A gradient whose mask depends on the weights can be replayed until they change in place; afterwards a replay
    raises ValueError (`parameter.data` changes them unseen: do not use it).

    Sources: Liu et al., "Sparse MeZO", arXiv 2402.15751 (2024), algorithm 1; and see the masks.
    """

    mask: Mask
    directions: Directions = Gaussian()

    def __post_init__(self) -> None:
        object.__setattr__(self, "unbiased", self.mask.unbiased and self.directions.unbiased)

    def init(self, objective: Objective) -> None:
        return None

    def resolve(self, objective: Objective, key: Key, state: Any) -> Directions:
        return self.mask.over(self.directions, objective, key)

    def update(self, state: Any, gradient: Iterator[tuple[str, Tensor]]) -> None:
        return None
