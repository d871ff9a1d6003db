"""The blocks of a model: what it repeats, one after the other."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

Block = tuple[nn.Module, ...]


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks of a model in the order of its modules, outermost first.

    A `ModuleList` of two modules or more of one class is a chain of blocks (so every transformers model's
    layers are found). A `Sequential` with two trainable children or more is one too: a block is a child that
    holds parameters together with the parameterless ones after it. Anything else is looked into.
    """
    found = _chain(model)
    if found:
        return found
    return [block for child in model.children() for block in find_blocks(child)]


def _chain(module: nn.Module) -> list[Block]:
    children = list(module.children())
    if isinstance(module, nn.ModuleList):
        alike = len({type(child) for child in children}) == 1
        return [(child,) for child in children] if alike and len(children) > 1 else []
    if not isinstance(module, nn.Sequential):
        return []
    starts = [i for i, child in enumerate(children) if any(True for _ in child.parameters())]
    if len(starts) < 2:
        return []
    cuts = [0, *starts[1:], len(children)]
    return [tuple(children[low:high]) for low, high in pairwise(cuts)]
