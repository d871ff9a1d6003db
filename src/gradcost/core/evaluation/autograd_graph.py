"""The nodes of an autograd graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield each node of the autograd graph of a tensor once, breadth-first from its `grad_fn`."""
    nodes: list[Any] = [] if tensor.grad_fn is None else [tensor.grad_fn]
    seen = set(nodes)
    for node in nodes:  # the list grows
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
