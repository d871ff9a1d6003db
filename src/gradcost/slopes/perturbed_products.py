"""Linear layers and embeddings at perturbed weights, without a perturbed copy of a large weight.

With weight W + step Z, the columns a .. b of a linear layer's output are x (W[a:b] + step Z[a:b])', computed a block
of rows at a time. An embedding of few tokens needs the rows of these tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.core.evaluation.autograd_use import ORDINARY, known_use
from gradcost.core.evaluation.gradient_mode import in_constant_part
from gradcost.core.fake import is_fake
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions
from gradcost.slopes.duals import rows_of
from gradcost.slopes.low_rank_linear import only_linear_reads
from gradcost.slopes.rules import Rule

_LEAST_BLOCK = 1 << 18  # elements; smaller matrix products are slower
_ROW_COST = 5_000  # perturbing one row alone takes as long as perturbing so many elements of a large tensor


def perturbs_products(objective: Objective, directions: Directions) -> bool:
    """Return whether `PerturbedProducts` serves this loss and these directions.

    The loss must not need gradients, and a direction must be defined by the positions of its elements alone.
    """
    return directions.elementwise and not (known_use(objective) or ORDINARY).needs_gradients


def only_products_read(module: nn.Module, name: str) -> bool:
    """Return True if the module reads this parameter only as the weight of F.linear or F.embedding.

    Args:
        module: a module of the model.
        name: the name of its parameter.
    """
    if type(module) is nn.Embedding and name == "weight" and "forward" not in vars(module):
        return module.padding_idx is None
    return only_linear_reads(module, name)


def block_rows(weight: Tensor, inputs: int) -> int:
    """Return how many rows of a linear layer's weight are perturbed at once.

    Args:
        weight: the weight, shape (outputs, inputs of the layer).
        inputs: number of rows that the layer is applied to.
    """
    rows, columns = weight.shape
    size = max(_LEAST_BLOCK, inputs * (rows + columns)) // columns
    return max(1, min(rows, size - size % 16))


def few_rows(tokens: Tensor, weight: Tensor) -> bool:
    """Return whether drawing the embedding's rows of these tokens takes less time than drawing all rows."""
    return tokens.numel() * _ROW_COST < weight.numel()


def token_rows(out: Tensor, tokens: Tensor, leaf: Leaf) -> Iterator[tuple[Tensor, int]]:
    """Yield each row of an embedding's output, and the position of its elements among those of all leaves.

    A fake output is yielded as a whole: one call costs a forecast less time than one per row.

    Args:
        out: the output, or a tensor of its shape.
        tokens: the input of the embedding.
        leaf: its weight.
    """
    if is_fake(out):
        yield out, leaf.start
        return
    columns = leaf.parameter.shape[1]
    for row, number in zip(out.view(-1, columns), tokens.reshape(-1).tolist(), strict=True):
        yield row, leaf.start + int(number) * columns


def is_plain_embedding(padding_idx: int | None, max_norm: float | None, scale_grad_by_freq: bool) -> bool:
    """Return whether F.embedding with these arguments only selects rows."""
    return padding_idx is None and max_norm is None and not scale_grad_by_freq


class PerturbedProducts:
    """F.linear and F.embedding with a leaf as weight, computed at W + step Z: rules `of_leaves` for `substituted`.

    F.linear is computed in blocks of rows of W. A block has 2^18 elements, or as many as the layer's input and output
    together if these are more, so it never dominates the memory of an evaluation.

    Law: the result is that with the perturbed weight; bitwise for F.embedding and for one block, else up to the order
    in which matrix products of other widths add.

    Args:
        objective: the model and its leaves.
        directions: the distribution of the direction.
        seed: the seed of the direction.
        step: the factor of the direction.
    """

    def __init__(self, objective: Objective, directions: Directions, seed: int, step: float) -> None:
        self.leaves = {id(leaf.parameter): leaf for leaf in objective.leaves}
        self.directions, self.seed, self.step = directions, seed, step

    def rules(self) -> dict[Any, Rule]:
        """Return the rules; each returns NotImplemented for a call that it does not serve."""
        return {F.linear: self._linear, F.embedding: self._embedding}

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        leaf = self.leaves.get(id(weight))
        is_plain = is_plain_embedding(padding_idx, max_norm, scale_grad_by_freq)
        if leaf is None or not few_rows(input, weight) or not is_plain or not _is_plain(input, weight):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            out = F.embedding(input, leaf.parameter.detach())
            for row, start in token_rows(out, input, leaf):
                part = Leaf(leaf.name, leaf.parameter, start, leaf.dimension)
                self.directions.add(row, part, [self.seed], [self.step], in_place=True)
            return out

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self.leaves.get(id(weight))
        if leaf is None or not _is_plain(input, weight) or input.dtype != weight.dtype or id(bias) in self.leaves:
            return NotImplemented
        with torch._C.DisableTorchFunction():
            return self._in_blocks(rows_of(input), leaf, bias).view(*input.shape[:-1], weight.shape[0])

    def _in_blocks(self, input: Tensor, leaf: Leaf, bias: Tensor | None) -> Tensor:
        weight = leaf.parameter.detach()
        rows, columns = weight.shape
        size = block_rows(weight, len(input))
        if size == rows:
            return F.linear(input, self.directions.add(weight, leaf, [self.seed], [self.step]), bias)
        out = input.new_empty(len(input), rows)
        for start in range(0, rows, size):
            part = Leaf(leaf.name, leaf.parameter, leaf.start + start * columns, leaf.dimension)
            block = self.directions.add(weight[start : start + size], part, [self.seed], [self.step])
            target = out[:, start : start + size]
            if bias is None:
                torch.mm(input, block.t(), out=target)
            else:
                torch.addmm(bias[start : start + size], input, block.t(), out=target)
            del block  # before the next one is allocated
        return out


def _is_plain(input: Tensor, weight: Tensor) -> bool:
    """Return whether input and weight are ordinary tensors, with no transform, cast or gradient."""
    return (
        (type(input) is Tensor or is_fake(input))
        and not in_constant_part()
        and input.device == weight.device
        and weight.ndim == 2
        and weight.layout == torch.strided
        and not weight.is_complex()
        and input.numel() > 0
        and functorch.maybe_current_level() is None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(input.device.type)
    )
