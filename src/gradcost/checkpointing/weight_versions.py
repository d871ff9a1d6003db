"""The versions of a block's parameters and tensor attributes, which its recomputation reads again."""

from __future__ import annotations

from torch import Tensor, nn

from gradcost.checkpointing.call_state import BlockModules, reads_buffers
from gradcost.checkpointing.containers import tensors_in
from gradcost.checkpointing.versioned_tensor import RecomputationError
from gradcost.core.evaluation.saved_state import version_of

_INTERNALS = frozenset(vars(nn.Module())) | {"forward"}
_NO_TENSORS = frozenset((bool, int, float, str, type(None)))


class WeightVersions:
    """The version counters before a call of a block. Buffers are not among them: `CallState` restores their values.

    Args:
        block: the modules of the block.
    """

    __slots__ = ("_block", "_tensors")

    def __init__(self, block: BlockModules) -> None:
        self._block = block
        changing = {(id(module), name) for module, names in block.changing for name in names}
        self._tensors = [
            (tensor, version_of(tensor))
            for module in block.modules
            for name, tensor in _tensors_of(module)
            if not changing or (id(module), name) not in changing
        ]

    def forget_changed(self) -> None:
        """Forget the tensors that changed since: the block's own forward writes them."""
        self._tensors = [(tensor, version) for tensor, version in self._tensors if version_of(tensor) == version]

    def check(self) -> None:
        """Raise RecomputationError if a tensor was changed in place since."""
        for tensor, version in self._tensors:
            if version_of(tensor) != version:
                raise RecomputationError(
                    f"{self._name(tensor)} was changed in place between the forward pass and its backward pass. The "
                    "block reads it again, so the block cannot be recomputed. Change it after the backward pass, or "
                    "use Everything()."
                )

    def _name(self, tensor: Tensor) -> str:
        owner = self._block.owner
        assert owner is not None
        paths = (
            f"{path}.{name}" if path else name
            for path, module in owner.named_modules()
            for name, found in _tensors_of(module)
            if found is tensor
        )
        name = next(paths, None)
        return f"a tensor of a {type(owner).__name__}" if name is None else f"`{name}` of a {type(owner).__name__}"


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of what a forward reads: parameters, attributes, running statistics in eval mode."""
    attributes = module.__dict__
    found = [item for item in attributes["_parameters"].items() if item[1] is not None]
    if attributes["_buffers"] and not attributes["training"] and not reads_buffers(module):
        found += [item for item in attributes["_buffers"].items() if item[1] is not None]
    for name in attributes.keys() - _INTERNALS:
        value = attributes[name]
        if type(value) in _NO_TENSORS:  # quicker than the next line
            continue
        if isinstance(value, Tensor):
            found.append((name, value))
        elif value and type(value) in (list, tuple, dict):
            found += [(name, tensor) for tensor in tensors_in(value)]
    return found
