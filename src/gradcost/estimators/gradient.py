"""A gradient is anything that can be replayed leaf by leaf."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.objective import Objective
from gradcost.directions import Directions
from gradcost.directions.direction import combination


class Gradient(ABC):
    """A vector with one tensor for each leaf of an objective."""

    objective: Objective

    @abstractmethod
    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        """The name and the gradient of each leaf, in the objective's order, with the leaf's shape and dtype.

        The caller owns the tensor: it may be changed in place.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that this gradient keeps, and that a message with it would carry."""

    def write(self) -> None:
        """Fill `p.grad` of every leaf, for any torch optimizer. Needs as many bytes as the leaves."""
        parameters = {leaf.name: leaf.parameter for leaf in self.objective.leaves}
        for name, gradient in self.leaves():
            parameters[name].grad = gradient

    def norm(self) -> float:
        """The Euclidean norm over all leaves, summed in float64."""
        return float(sum(g.double().square().sum() for _, g in self.leaves())) ** 0.5


@dataclass(frozen=True, eq=False)
class Dense(Gradient):
    """A gradient that replays what it stored: one tensor a leaf."""

    objective: Objective
    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Dense({len(self.tensors)} leaves, {self.nbytes:,} bytes)"

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.objective.leaves:
            yield leaf.name, self.tensors[leaf.name].clone()

    def write(self) -> None:
        for leaf in self.objective.leaves:
            leaf.parameter.grad = self.tensors[leaf.name]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class Seeded(Gradient):
    """sum_k coefficients[k] * z_k, where z_k is the direction regenerated from seeds[k]: 16 bytes a probe.

    Law: a replay has at most one leaf alive beside the parameters, and is the same bits wherever it runs.
    """

    objective: Objective
    directions: Directions
    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]

    def __repr__(self) -> str:
        return f"Seeded({self.directions}, {len(self.seeds)} probes, {self.nbytes} bytes)"

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.objective.leaves:
            yield leaf.name, combination(self.directions, leaf, self.seeds, self.coefficients)

    @property
    def nbytes(self) -> int:
        return 16 * len(self.seeds)

    def scaled(self, factors: Sequence[float]) -> Seeded:
        """The gradient with each probe's coefficient multiplied by its factor."""
        coefficients = tuple(c * f for c, f in zip(self.coefficients, factors, strict=True))
        return Seeded(self.objective, self.directions, self.seeds, coefficients)

    def to_bytes(self) -> bytes:
        """The message: seed (unsigned 64 bit) and coefficient (float64) of each probe, little-endian."""
        entries = np.empty(len(self.seeds), dtype=_ENTRY)
        # Said, not guessed: numpy makes float64 of Python numbers on both sides of 2^63, which drops seed bits.
        entries["seed"] = np.array(self.seeds, dtype=np.uint64)
        entries["coefficient"] = self.coefficients
        return entries.tobytes()

    @classmethod
    def from_bytes(cls, message: bytes, objective: Objective, directions: Directions) -> Seeded:
        """The gradient that `to_bytes` wrote, on this objective's copy of the model."""
        entries = np.frombuffer(message, dtype=_ENTRY)
        return cls(objective, directions, tuple(entries["seed"].tolist()), tuple(entries["coefficient"].tolist()))


@dataclass(frozen=True, eq=False)
class Signed(Gradient):
    """The sign of each entry of another gradient: -1, 0 or +1."""

    of: Gradient

    @property
    def objective(self) -> Objective:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.objective

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        for name, gradient in self.of.leaves():
            yield name, gradient.sign_()

    @property
    def nbytes(self) -> int:
        return self.of.nbytes


@dataclass(frozen=True, eq=False)
class Sum(Gradient):
    """sum_i weights[i] * terms[i], added leaf by leaf: at most two leaves are alive beside what the terms keep."""

    objective: Objective
    terms: tuple[Gradient, ...]
    weights: tuple[float, ...]

    def __repr__(self) -> str:
        return " + ".join(f"{weight} * {term}" for weight, term in zip(self.weights, self.terms, strict=True))

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        replays = [term.leaves() for term in self.terms]
        for leaf in self.objective.leaves:
            total = None
            for replay, weight in zip(replays, self.weights, strict=True):
                _, gradient = next(replay)
                gradient = gradient if weight == 1.0 else gradient.mul_(weight)
                total = gradient if total is None else total.add_(gradient)
                del gradient  # before the next one is made
            assert total is not None
            yield leaf.name, total

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, eq=False)
class Concatenated(Gradient):
    """Gradients in disjoint sets of an objective's leaves, which together are all of them."""

    objective: Objective
    pieces: tuple[Gradient, ...]

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        owner = {leaf.name: number for number, piece in enumerate(self.pieces) for leaf in piece.objective.leaves}
        replays = [piece.leaves() for piece in self.pieces]
        for leaf in self.objective.leaves:
            yield next(replays[owner[leaf.name]])

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Streamed(Gradient):
    """A gradient that was handed out leaf by leaf while it was made, and of which nothing was kept.

    message: the bytes that the gradient would have kept, and that a message with it would have carried.
    """

    objective: Objective
    message: int

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        """Raises: ValueError, for there is nothing left to replay."""
        raise BadInput("this gradient was handed out leaf by leaf by `stream`; `estimate` gives one that stays.")

    @property
    def nbytes(self) -> int:
        return 0


_ENTRY = np.dtype([("seed", "<u8"), ("coefficient", "<f8")])
