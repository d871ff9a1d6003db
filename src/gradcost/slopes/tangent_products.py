"""Linear layers and embeddings in forward mode, without the tangent of a large weight.

Along a direction Z of the weight W, an output x W' has the tangent dx W' + x Z'. The columns a .. b of x Z' are
x Z[a:b]', computed a block of rows of Z at a time. An embedding of few tokens needs the rows of these tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

from gradcost.core.evaluation.gradient_mode import in_constant_part
from gradcost.core.fake import is_fake
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions
from gradcost.slopes.duals import Dual, apart, ordinary, rows_of, with_directions, with_tangent
from gradcost.slopes.perturbed_products import block_rows, few_rows, is_plain_embedding, token_rows
from gradcost.slopes.rules import Rule


class TangentProducts:
    """F.linear and F.embedding with a leaf as weight: rules `of_leaves` for `substituted`, which draw Z in blocks.

    Law: primal and tangent are those with the whole Z; bitwise for F.embedding and for one block, else up to the
    order in which matrix products of other widths add.

    Args:
        objective: the model and its leaves.
        directions: the distribution of the directions; `elementwise`.
        seeds: one seed per direction.
        level: the level of `torch.func.vmap` over the directions. None: there is one direction, without vmap.
    """

    def __init__(self, objective: Objective, directions: Directions, seeds: Sequence[int], level: int | None) -> None:
        self.leaves = {id(leaf.parameter): leaf for leaf in objective.leaves}
        self.directions, self.seeds, self.level = directions, seeds, level
        self.outside = functorch.maybe_current_level()  # another level: inside a transform of the loss

    def rules(self) -> dict[Any, Rule]:
        """Return the rules; each returns NotImplemented for a call that it does not serve."""
        return {F.linear: self._linear, F.embedding: self._embedding}

    def _is_inside(self) -> bool:
        """Return whether a part without tangents, or a transform of the loss, runs."""
        return in_constant_part() or functorch.maybe_current_level() != self.outside

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        leaf = self.leaves.get(id(weight))
        if leaf is None or leaf.parameter.ndim != 2 or id(bias) in self.leaves or self._is_inside():
            return NotImplemented
        with torch._C.DisableTorchFunction():
            parts = apart(input, leaf.parameter.detach(), bias)
            x, _, b = (None, None, None) if parts is None else parts.duals
            if x is None or not x.primal.numel():
                return NotImplemented
            with ordinary():
                weight = leaf.parameter.detach()
                out = F.linear(x.primal, weight, None if b is None else b.primal)
                tangents = out.new_empty((len(self.seeds), *out.shape))
                self._fill(tangents, x, leaf, None if b is None else b.tangents)
            return with_tangent(leaf.name, out, with_directions(tangents, self.level))

    def _fill(self, tangents: Tensor, x: Dual, leaf: Leaf, along_bias: Tensor | None) -> None:
        """Fill `tangents`, shape (directions, ..., outputs), with x Z' + db + dx W'."""
        weight, rows = leaf.parameter.detach(), rows_of(x.primal)
        outputs, columns = weight.shape
        by_direction = tangents.view(len(tangents), len(rows), outputs)
        size = block_rows(weight, len(rows))
        for start in range(0, outputs, size):
            part = Leaf(leaf.name, weight[start : start + size], leaf.start + start * columns, leaf.dimension)  # type: ignore[arg-type]
            for number, seed in enumerate(self.seeds):
                z = tag("tangents", self.directions.draw(part, [seed], [1.0]))
                target = by_direction[number][:, start : start + size]
                if along_bias is None:
                    torch.mm(rows, z.t(), out=target)
                else:
                    torch.addmm(
                        along_bias[number if len(along_bias) > 1 else 0][start : start + size],
                        rows,
                        z.t(),
                        out=target,
                    )
                del z  # before the next one is allocated
        if x.tangents is not None:
            flat = rows_of(tangents)
            torch.addmm(flat, rows_of(x.tangents), weight.t(), out=flat)

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
        if leaf is None or self._is_inside() or not is_plain_embedding(padding_idx, max_norm, scale_grad_by_freq):
            return NotImplemented
        if not few_rows(input, leaf.parameter) or torch.is_autocast_enabled(input.device.type):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            if apart(leaf.parameter.detach()) is None or (type(input) is not Tensor and not is_fake(input)):
                return NotImplemented
            with ordinary():
                out = F.embedding(input, leaf.parameter.detach())
                tangents = tag("tangents", out.new_empty((len(self.seeds), *out.shape)))
                for stack, seed in zip(tangents, self.seeds, strict=True):
                    for row, start in token_rows(stack, input, leaf):
                        part = Leaf(leaf.name, row, start, leaf.dimension)  # type: ignore[arg-type]
                        self.directions.draw(part, [seed], [1.0], row)
            return with_tangent(leaf.name, out, with_directions(tangents, self.level))
