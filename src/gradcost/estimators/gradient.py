"""Gradients: vectors in parameter space, read as one tensor per parameter."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcost.core.complex_numbers import as_real
from gradcost.core.errors import BadInput
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions


class Gradient(ABC):
    """One tensor for each trainable parameter of an objective, stored or regenerated at each reading."""

    objective: Objective

    @abstractmethod
    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the gradient of each parameter, in the objective's order.

        Each tensor is strided and has the parameter's shape and dtype. The caller owns it and may change it in place.
        It has zeros for a parameter in `unused`.
        """

    @property
    def unused(self) -> frozenset[str]:
        """Names of the parameters that the loss of this batch does not use, if the gradient is exact.

        As in torch they have no gradient: `write` sets their `.grad` to None, and optimizers skip them. The set is
        empty for other gradients: a random direction moves every parameter.
        """
        return frozenset()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory that this gradient occupies."""

    @property
    def message_nbytes(self) -> int:
        """Bytes needed to send this gradient: `nbytes`, or for `Streamed` the bytes before it was passed on."""
        return self.nbytes

    def write(self, *, accumulate: bool = False, scale: float = 1.0) -> None:
        """Fill `.grad` of every trainable parameter, for any torch optimizer. `.grad` takes the parameters' bytes.

        A parameter in `unused` gets None, or with `accumulate` keeps its `.grad`.

        Law: `write(accumulate=True, scale=s)` adds s * gradient to `.grad`, with the bits of `(s * loss).backward()`
        in torch. So k calls with scale 1/k give the mean over k micro-batches.

        Args:
            accumulate: add to the values that `.grad` has. False replaces them.
            scale: the factor of the gradient.
        Raises:
            BadInput: scale is not finite.
        """
        parameters = {leaf.name: leaf.parameter for leaf in self.objective.leaves}
        unused = self.unused
        for name, gradient in self.leaves():
            _put(parameters[name], None if name in unused else gradient, accumulate, scale)

    def norm(self) -> float:
        """Return the Euclidean norm over all parameters, computed in float64."""
        return float(sum(as_real(g).double().square().sum() for _, g in self.leaves())) ** 0.5


@dataclass(frozen=True, eq=False)
class Dense(Gradient):
    """A gradient that stores one tensor per parameter.

    Args:
        objective: the objective with this gradient.
        tensors: the gradient of each parameter, by name. Parameters without one are `unused`.
    """

    objective: Objective
    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"Dense({len(self.tensors)} parameters, {self.nbytes:,} bytes)"

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.objective.leaves:
            tensor = self.tensors.get(leaf.name)
            if tensor is None:
                yield leaf.name, torch.zeros_like(leaf.parameter, requires_grad=False)
            else:
                yield leaf.name, tensor.to_dense() if tensor.is_sparse else tensor.clone()

    @property
    def unused(self) -> frozenset[str]:
        return frozenset(leaf.name for leaf in self.objective.leaves if leaf.name not in self.tensors)

    def write(self, *, accumulate: bool = False, scale: float = 1.0) -> None:
        """As in `Gradient`, with copies. The gradient of a sparse embedding stays sparse."""
        for leaf in self.objective.leaves:
            tensor = self.tensors.get(leaf.name)
            _put(leaf.parameter, None if tensor is None else tensor.clone(), accumulate, scale)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(tensor) for tensor in self.tensors.values())


def _put(parameter: Tensor, gradient: Tensor | None, accumulate: bool, scale: float) -> None:
    """Set `.grad` to scale * gradient, or add it to `.grad` as torch's backward pass does. None adds nothing."""
    if not math.isfinite(scale):
        raise BadInput(f"scale is the factor of the gradient, a finite number, not {scale!r}.")
    present = parameter.grad if accumulate else None
    if gradient is None:
        parameter.grad = present
        return
    gradient = gradient if scale == 1.0 else gradient.mul_(scale)
    if present is None:
        parameter.grad = gradient
    elif present.is_sparse and not gradient.is_sparse:
        parameter.grad = gradient.add_(present)
    else:
        present.add_(gradient)


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the elements; for a sparse tensor, those of indices and values."""
    return tensor._indices().nbytes + tensor._values().nbytes if tensor.is_sparse else tensor.nbytes


@dataclass(frozen=True, eq=False)
class Seeded(Gradient):
    """sum_k coefficients[k] * z_k, where direction z_k is regenerated from seeds[k]: 16 bytes per probe.

    Law: `leaves` needs memory for one parameter's tensor at a time and yields the same bits on every device.

    Args:
        objective: the objective with this gradient.
        directions: the distribution that turns a seed into a direction.
        seeds: one unsigned 64-bit seed per probe.
        coefficients: one coefficient per probe.
    """

    objective: Objective
    directions: Directions
    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]

    def __repr__(self) -> str:
        return f"Seeded({self.directions}, {len(self.seeds)} probes, {self.nbytes} bytes)"

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        for leaf in self.objective.leaves:
            yield leaf.name, self.directions.draw(leaf, self.seeds, self.coefficients)

    @property
    def has_pieces(self) -> bool:
        """Whether `pieces` serves these directions and parameters."""
        leaves = self.objective.leaves
        return self.directions.elementwise and all(
            leaf.parameter.is_contiguous() and not leaf.parameter.is_complex() for leaf in leaves
        )

    def pieces(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (name, start, piece): elements of a parameter from `start` on, 2^18 or a quarter of it at a time.

        Law: together the pieces are the bits of `leaves`.
        """
        for leaf in self.objective.leaves:
            flat = leaf.parameter.detach().view(-1)
            size = max(_PIECE, -(-flat.numel() // 4))  # a forecast simulates every piece
            for start in range(0, flat.numel(), size):
                part = Leaf(leaf.name, flat[start : start + size], leaf.start + start, leaf.dimension)  # type: ignore[arg-type]
                yield leaf.name, start, self.directions.draw(part, self.seeds, self.coefficients)

    @property
    def nbytes(self) -> int:
        return 16 * len(self.seeds)

    def scaled(self, factors: Sequence[float]) -> Seeded:
        """Return the gradient with each probe's coefficient multiplied by its factor.

        Args:
            factors: one number per probe.
        """
        coefficients = tuple(c * f for c, f in zip(self.coefficients, factors, strict=True))
        return Seeded(self.objective, self.directions, self.seeds, coefficients)

    def to_bytes(self) -> bytes:
        """Return the gradient as bytes: seed (uint64) and coefficient (float64) of each probe, little-endian."""
        entries = np.empty(len(self.seeds), dtype=_ENTRY)
        # An explicit dtype: numpy turns Python integers on both sides of 2^63 into float64, which drops bits.
        entries["seed"] = np.array(self.seeds, dtype=np.uint64)
        entries["coefficient"] = self.coefficients
        return entries.tobytes()

    @classmethod
    def from_bytes(cls, message: bytes, objective: Objective, directions: Directions) -> Seeded:
        """Return the gradient that `to_bytes` converted to bytes.

        Args:
            message: the result of `to_bytes`.
            objective: this process's copy of the model and the loss.
            directions: the `directions` of the original gradient.
        """
        entries = np.frombuffer(message, dtype=_ENTRY)
        return cls(objective, directions, tuple(entries["seed"].tolist()), tuple(entries["coefficient"].tolist()))


@dataclass(frozen=True, eq=False)
class Signed(Gradient):
    """The sign of each entry of another gradient: -1, 0 or +1.

    Args:
        of: the gradient whose signs are taken.
    """

    of: Gradient

    @property
    def objective(self) -> Objective:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.of.objective

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        for name, gradient in self.of.leaves():
            as_real(gradient).sign_()  # of real and imaginary parts separately
            yield name, gradient

    @property
    def nbytes(self) -> int:
        return self.of.nbytes


@dataclass(frozen=True, eq=False)
class Sum(Gradient):
    """sum_i weights[i] * terms[i].

    `leaves` needs memory for at most two tensors of one parameter, in addition to the memory of the terms.

    Args:
        objective: the objective with this gradient.
        terms: gradients of that objective.
        weights: one number per term.
    """

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
                del gradient  # before the next one is allocated
            assert total is not None
            yield leaf.name, total

    @property
    def unused(self) -> frozenset[str]:
        return frozenset.intersection(*(term.unused for term in self.terms))

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.terms)


@dataclass(frozen=True, eq=False)
class Concatenated(Gradient):
    """A gradient in pieces, each for a part of the parameters; every parameter belongs to one piece.

    Args:
        objective: the objective with this gradient.
        pieces: gradients of objectives that `Objective.only` restricts to some parameters.
    """

    objective: Objective
    pieces: tuple[Gradient, ...]

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        owner = {leaf.name: number for number, piece in enumerate(self.pieces) for leaf in piece.objective.leaves}
        replays = [piece.leaves() for piece in self.pieces]
        for leaf in self.objective.leaves:
            yield next(replays[owner[leaf.name]])

    @property
    def unused(self) -> frozenset[str]:
        return frozenset().union(*(piece.unused for piece in self.pieces))

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Streamed(Gradient):
    """A gradient that `Estimator.stream` has passed on, one parameter at a time. It stores no tensors.

    Args:
        objective: the objective with this gradient.
        message: bytes needed to send the gradient.
    """

    objective: Objective
    message: int

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        raise BadInput("`stream` has already passed this gradient on; use `estimate` for one that can be replayed.")

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def message_nbytes(self) -> int:
        return self.message


_PIECE = 1 << 18  # elements
_ENTRY = np.dtype([("seed", "<u8"), ("coefficient", "<f8")])
