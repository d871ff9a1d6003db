"""The repeated blocks of a model, such as a transformer's layers."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

Block = tuple[nn.Module, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """Return the repeated blocks of a model, in the order of its modules. A block is not searched for inner blocks.

    Rules:
      - A `ModuleList` of at least two modules of one class: each module is a block. This finds the layers of every
        transformers model.
      - A `Sequential` with at least two children that have parameters: each of these children starts a block. The
        block includes the parameterless children that follow. The first block also includes those before it.
      - Any other module: its children are searched recursively.

    Args:
        model: any module. In the rules, frozen parameters count as parameters.
    Returns:
        One tuple of modules per block; an empty list if there are no blocks.
    """
    blocks = _repeated_children(model)
    if blocks:
        return blocks
    return [block for child in model.children() for block in find_blocks(child)]


def _repeated_children(module: nn.Module) -> list[Block]:
    children = list(module.children())
    if isinstance(module, nn.ModuleList):
        same_class = len({type(child) for child in children}) == 1
        return [(child,) for child in children] if same_class and len(children) > 1 else []
    if not isinstance(module, nn.Sequential):
        return []
    starts = [i for i, child in enumerate(children) if any(True for _ in child.parameters())]
    if len(starts) < 2:
        return []
    bounds = [0, *starts[1:], len(children)]
    return [tuple(children[low:high]) for low, high in pairwise(bounds)]
