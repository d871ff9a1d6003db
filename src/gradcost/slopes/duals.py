"""Dual tensors taken apart: the rules of forward mode compute on ordinary tensors, one direction after the other.

Under `torch.func.vmap` a tangent has a hidden dimension for the directions. Rules of functorch's own often expand the
primal to all directions, or take several passes. A rule that sees primal and tangents as ordinary tensors calls one
kernel per direction, or writes a matrix product into the place where it is needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.core.errors import Unsupported
from gradcost.core.fake import is_fake


class Dual(NamedTuple):
    """A tensor and its tangents.

    Args:
        primal: an ordinary tensor.
        tangents: an ordinary tensor, shape (directions, *primal.shape). None: zero.
    """

    primal: Tensor
    tangents: Tensor | None

    @property
    def directions(self) -> int:
        """The number of directions; 0 without tangents."""
        return 0 if self.tangents is None else len(self.tangents)


class Apart(NamedTuple):
    """The arguments of a rule as ordinary tensors.

    Args:
        duals: one per argument; None for an argument that is None.
        directions: number of directions; 0 if no argument has a tangent.
        level: the level of `torch.func.vmap`. None: there is one direction, without vmap.
    """

    duals: list[Dual | None]
    directions: int
    level: int | None

    def joined(self, primal: Tensor, tangents: Tensor) -> Tensor:
        """Return a dual tensor.

        Args:
            primal: an ordinary tensor.
            tangents: an ordinary tensor, shape (directions, *primal.shape).
        """
        return forward_ad.make_dual(primal, with_directions(tangents, self.level))


def with_directions(stack: Tensor, level: int | None) -> Tensor:
    """Return tangents for `forward_ad.make_dual`: the first dimension, of the directions, hidden from all operations.

    Args:
        stack: an ordinary tensor, shape (directions, ...).
        level: the level of `torch.func.vmap`. None: there is one direction, without vmap.
    """
    return stack.squeeze(0) if level is None else functorch._add_batch_dim(stack, 0, level)


def with_tangent(name: str, primal: Tensor, tangent: Tensor) -> Tensor:
    """Return `primal` as a dual tensor.

    Args:
        name: the name of the tensor, for the error message.
        primal: the value of the tensor.
        tangent: the tangent, of the shape of `primal`.
    Returns:
        The dual tensor.
    Raises:
        Unsupported: forward mode is off, as inside a custom autograd.Function, so the tangent would be lost.
    """
    if not torch._C._is_fwd_grad_enabled():
        raise Unsupported(
            f"`{name}` is used inside a custom autograd.Function (reentrant checkpointing is one). Forward mode is "
            "off there and its tangent would be lost. Use use_reentrant=False, call the operation outside the "
            "function, or use mezo(), which needs no derivative."
        )
    return forward_ad.make_dual(primal, tangent)


def rows_of(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix with the last dimension as columns; it may have no elements."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def ordinary() -> AbstractContextManager[Any]:
    """Return a context in which new tensors are ordinary ones, also inside a functorch transform."""
    return nullcontext() if functorch.maybe_current_level() is None else torch._C._DisableFuncTorch()


def apart(*arguments: Tensor | None) -> Apart | None:
    """Take the arguments of a rule apart.

    Returns:
        None where a rule on ordinary tensors would not compute what torch does: under autocast, with gradients, for
        tensors of several dtypes, of no dense layout or of a subclass, and where a primal depends on the direction.
    """
    given = [argument for argument in arguments if argument is not None]
    needs_gradient = torch.is_grad_enabled() and any(argument.requires_grad for argument in given)
    if needs_gradient or torch.is_autocast_enabled(given[0].device.type):
        return None
    unpacked = [forward_ad.unpack_dual(argument) for argument in given]
    primals = [_unwrapped(primal) for primal, _ in unpacked]
    if not all(level is None and _is_dense(primal, primals[0][0].dtype) for primal, level in primals):
        return None
    tangents = [None if tangent is None else _unwrapped(tangent) for _, tangent in unpacked]
    level = next((tangent[1] for tangent in tangents if tangent is not None and tangent[1] is not None), None)
    with ordinary():
        stacks = [_stacked(tangent) for tangent in tangents]
        directions = max((len(stack) for stack in stacks if stack is not None), default=0)
        found = [
            Dual(primal, None if stack is None else stack.expand(directions, *primal.shape))
            for (primal, _), stack in zip(primals, stacks, strict=True)
        ]
    remaining = iter(found)
    return Apart([None if argument is None else next(remaining) for argument in arguments], directions, level)


def _unwrapped(tensor: Tensor) -> tuple[Tensor, int | None]:
    """Return the ordinary tensor inside functorch's wrappers, and the level of its dimension of directions.

    That dimension comes first. Level None: there is no such dimension.
    """
    level = None
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            level, dimension = functorch.maybe_get_level(tensor), functorch.maybe_get_bdim(tensor)
            tensor = functorch.get_unwrapped(tensor)
            with torch._C._DisableFuncTorch():
                tensor = tensor.movedim(dimension, 0)
        else:
            tensor = functorch.get_unwrapped(tensor)
    return tensor, level


def _stacked(tangent: tuple[Tensor, int | None] | None) -> Tensor | None:
    """Return tangents with a first dimension of directions; of size 1 if the result of `_unwrapped` has none."""
    if tangent is None:
        return None
    tensor, level = tangent
    return tensor.unsqueeze(0) if level is None else tensor


def _is_dense(tensor: Tensor, dtype: torch.dtype) -> bool:
    is_ordinary = type(tensor) in (Tensor, nn.Parameter) or is_fake(tensor)
    return is_ordinary and tensor.dtype == dtype and tensor.layout == torch.strided
