"""The arguments of a call of an embedding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]

# The names and positions of the arguments that `EmbeddingCall` reads, and the padding index that means none.
_ARGUMENTS: Any = {
    F.embedding: ({"input": 0, "weight": 1, "padding_idx": 2, "scale_grad_by_freq": 5}, None),
    torch.embedding: ({"indices": 1, "weight": 0, "padding_idx": 2, "scale_grad_by_freq": 3}, -1),
    F.embedding_bag: ({"weight": 1, "scale_grad_by_freq": 5}, None),
    torch.embedding_bag: ({"weight": 0, "scale_grad_by_freq": 3}, None),
}
LOOKUPS = {F.embedding, torch.embedding}
EMBEDDINGS = set(_ARGUMENTS)


class EmbeddingCall(NamedTuple):
    """A call of a torch function of `EMBEDDINGS`.

    Args:
        weight: the weight.
        tokens: the indices of rows; None for a bag.
        padding: the row of the weight that gets no gradient; None if there is none. Bags do not read that row.
        scales: whether the gradient is divided by the frequencies of tokens.
    """

    weight: Any
    tokens: Any
    padding: int | None
    scales: bool

    @classmethod
    def of(cls, function: Any, args: Any, kwargs: Any) -> EmbeddingCall:
        """Return the arguments of the call function(*args, **kwargs)."""
        positions, none = _ARGUMENTS[function]
        given = {
            name: args[position] if len(args) > position else kwargs.get(name) for name, position in positions.items()
        }
        weight, padding = given["weight"], given.get("padding_idx", none)
        padding = None if padding in (None, none) else padding % weight.shape[0]
        tokens = given.get("input", given.get("indices"))
        return cls(weight, tokens, padding, bool(given["scale_grad_by_freq"]))

    @property
    def pads_computed(self) -> bool:
        """Whether there is a padding row, in a weight that was computed from parameters or by a transform."""
        is_computed = self.weight.requires_grad and not self.weight.is_leaf
        return self.padding is not None and (is_computed or functorch.is_functorch_wrapped_tensor(self.weight))

    def padded(self, out: Tensor, weight: Tensor) -> Tensor:
        """Return the output with the padding row of `weight` for padding tokens."""
        return torch.where((self.tokens == self.padding).unsqueeze(-1), weight[self.padding], out)
