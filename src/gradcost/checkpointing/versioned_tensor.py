"""A tensor that a rerun reads again, with a check that it was not changed in place meanwhile."""

from __future__ import annotations

from torch import Tensor

from gradcost.core.errors import Unsupported
from gradcost.core.evaluation.saved_state import version_of


class RecomputationError(Unsupported, RuntimeError):
    """A block cannot be recomputed in the backward pass."""


class VersionedTensor:
    """A tensor and its version counter at construction."""

    def __init__(self, tensor: Tensor) -> None:
        # Detach: the tensor's graph may refer to this object, which would be a reference cycle.
        self.requires_grad = tensor.requires_grad
        self.tensor = tensor.detach() if self.requires_grad else tensor
        self.version = version_of(tensor)

    def read(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RecomputationError(
                f"a tensor of shape {tuple(self.tensor.shape)} was changed in place before the backward pass. A "
                "block takes it as input or saved it, so the block cannot be recomputed. Use Everything(), which "
                "recomputes nothing."
            )
        return self.tensor

    def leaf(self) -> Tensor:
        """Return the tensor as an autograd leaf that requires a gradient if the original tensor did."""
        return self.read().detach().requires_grad_() if self.requires_grad else self.read()
