"""Partitions of an objective's leaves into groups."""

from __future__ import annotations

from abc import ABC, abstractmethod

from gradcost.core.blocks import find_blocks
from gradcost.core.objective import Objective
from gradcost.core.value import value


class Grouping(ABC):
    """A partition of the leaves of an objective."""

    @abstractmethod
    def groups(self, objective: Objective) -> dict[str, int]:
        """Return the group number of each leaf.

        Args:
            objective: the objective.
        Returns:
            Leaf name -> group number, from 0 to G - 1. No group is empty.
        """


@value
class EachLeaf(Grouping):
    """One group per leaf."""

    def groups(self, objective: Objective) -> dict[str, int]:
        return {leaf.name: number for number, leaf in enumerate(objective.leaves)}


@value
class Whole(Grouping):
    """One group with all leaves."""

    def groups(self, objective: Objective) -> dict[str, int]:
        return {leaf.name: 0 for leaf in objective.leaves}


@value
class EachModule(Grouping):
    """One group per module (the weight and bias of a layer). A tied leaf belongs to the module of its first name."""

    def groups(self, objective: Objective) -> dict[str, int]:
        return _numbered({leaf.name: leaf.name.rpartition(".")[0] for leaf in objective.leaves})


@value
class EachBlock(Grouping):
    """One group per repeated block of the model, such as a transformer's layer, and one for all other leaves.

    `find_blocks` defines the blocks. A leaf in several blocks belongs to the group of the first. A model without
    blocks has one group.
    """

    def groups(self, objective: Objective) -> dict[str, int]:
        block_of: dict[int, int] = {}
        for number, block in enumerate(find_blocks(objective.model)):
            for parameter in (parameter for module in block for parameter in module.parameters()):
                block_of.setdefault(id(parameter), number)
        return _numbered({leaf.name: block_of.get(id(leaf.parameter)) for leaf in objective.leaves})


def _numbered(labels: dict[str, str] | dict[str, int | None]) -> dict[str, int]:
    """Number the groups from 0 in the order of their first leaves."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels.values()))}
    return {name: numbers[label] for name, label in labels.items()}
