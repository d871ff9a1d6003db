"""The leaves of an objective, in groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

from gradcost.core.blocks import find_blocks
from gradcost.core.objective import Objective
from gradcost.core.value import value


class Grouping(ABC):
    """A way of putting each leaf into one of several groups."""

    @abstractmethod
    def groups(self, objective: Objective) -> dict[str, int]:
        """The number of each leaf's group, from 0; no group is empty."""


@value
class EachLeaf(Grouping):
    """Every leaf by itself."""

    def groups(self, objective: Objective) -> dict[str, int]:
        return {leaf.name: number for number, leaf in enumerate(objective.leaves)}


@value
class EachModule(Grouping):
    """The leaves that one module owns: a layer's weight with its bias. A tied leaf is with the first of its names."""

    def groups(self, objective: Objective) -> dict[str, int]:
        return _numbered({leaf.name: leaf.name.rpartition(".")[0] for leaf in objective.leaves})


@value
class EachBlock(Grouping):
    """The leaves of one repeated block (`chain.find_blocks`: a transformer's layer); all others are one more group.

    A leaf that several blocks share is with the first. A model without blocks is one group.
    """

    def groups(self, objective: Objective) -> dict[str, int]:
        block_of: dict[int, int] = {}
        for number, block in enumerate(find_blocks(objective.model)):
            for parameter in (parameter for module in block for parameter in module.parameters()):
                block_of.setdefault(id(parameter), number)
        return _numbered({leaf.name: block_of.get(id(leaf.parameter)) for leaf in objective.leaves})


def _numbered(labels: dict[str, str] | dict[str, int | None]) -> dict[str, int]:
    """The same groups, numbered from 0 in the order of their first leaves."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.values()))}
    return {name: numbers[label] for name, label in labels.items()}
