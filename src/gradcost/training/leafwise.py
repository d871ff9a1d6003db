"""Move the parameters of a model leaf by leaf, so that the whole gradient need not exist."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from gradcost.core.blocks import find_blocks
from gradcost.core.fake import stands_for
from gradcost.core.objective import Leaf, Objective
from gradcost.training.optimizers import SGD, Optimizer

SMALL = 1 << 16  # bytes; leaves below this size are grouped, with one optimizer call per group


class Leafwise:
    """One torch optimizer per group of leaves, so that each gradient can be freed before the next one is computed.

    A large leaf forms a group alone. Small leaves (below 64 KiB) are grouped, because an optimizer call per small
    leaf would cost more time than grouping costs memory. A block with a large leaf has groups of its own.

    Law: a step equals the step of one optimizer over all leaves after `gradient.write()`, bit for bit, because the
    update rules are elementwise. Memory: the gradient of one large leaf, plus the gradients of one group of small
    leaves.

    Args:
        optimizer: the configuration that every group uses.
        objective: the objective whose leaves are moved.
        at_once: whether all leaves form one group, as in a loop of `loss.backward(); optimizer.step()`, which holds
            all gradients. For forecasts of such a loop.
    """

    def __init__(self, optimizer: Optimizer, objective: Objective, at_once: bool = False) -> None:
        self.optimizer, self.at_once = optimizer, at_once
        self.step = 0
        self.rate: float | None = None  # the learning rate of the next step; None: that of the optimizer
        self.parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
        groups = [tuple(self.parameters)] if at_once else update_groups(objective)
        self.groups = {name: group for group in groups for name in group}
        leaves = {leaf.name: leaf for leaf in objective.leaves}
        self.parts = {group: optimizer.build([leaves[name] for name in group]) for group in self.groups.values()}
        if at_once and stands_for() == "cuda":
            for group in (group for part in self.parts.values() for group in part.param_groups):
                group["foreach"] = True  # torch's choice for parameters on CUDA
        # Per group: the gradients that have arrived; None for a leaf without one, or that pieces have moved. They
        # become `.grad` when the last one is there, because an estimator may set `.grad` aside and restore it.
        self.waiting: dict[tuple[str, ...], dict[str, Tensor | None]] = {group: {} for group in self.parts}
        self.skipped: set[str] = set()  # the leaves that had no gradient in their latest step

    def use(self, name: str, gradient: Tensor) -> None:
        """Accept the gradient of one leaf. Once every leaf of its group was used or skipped, move the group.

        Call `use` or `skip` once per leaf and step, in any order. `.grad` of the leaves has the same value before and
        after.

        Args:
            name: the name of the leaf.
            gradient: the leaf's gradient, with the shape and dtype of the leaf.
        """
        if gradient.is_sparse and not _accepts_sparse(self.optimizer):
            gradient = gradient.to_dense()
        self.skipped.discard(name)
        self._arrived(name, gradient)

    def skip(self, name: str) -> None:
        """Accept that one leaf has no gradient in this step. Its weights and its state stay, as in torch.optim.

        Args:
            name: the name of the leaf.
        """
        self.skipped.add(name)
        self._arrived(name, None)

    def __call__(self, name: str, gradient: Tensor) -> None:
        """Call `use`."""
        self.use(name, gradient)

    @property
    def takes_pieces(self) -> bool:
        """Whether `use_piece` may be called: for plain SGD, which needs no other elements and no state."""
        optimizer = self.optimizer
        return not self.at_once and type(optimizer) is SGD and not optimizer.momentum and not optimizer.weight_decay

    def use_piece(self, name: str, start: int, gradient: Tensor) -> None:
        """Move some elements of one leaf, by the operation of torch's SGD. The last piece ends the leaf's step.

        Args:
            name: the name of the leaf.
            start: the first element, in row-major order.
            gradient: the gradient of this element and the following ones, a vector.
        """
        flat, end = self.parameters[name].detach().view(-1), start + gradient.numel()
        flat[start:end].add_(gradient, alpha=-self._rate())
        if end == flat.numel():
            self._arrived(name, None)

    def _arrived(self, name: str, gradient: Tensor | None) -> None:
        """Note the gradient of a leaf, or that there is nothing left to move; move the group after its last leaf."""
        group = self.groups[name]
        waiting, part = self.waiting[group], self.parts[group]
        waiting[name] = gradient
        if len(waiting) < len(group):
            return
        previous = {member: self.parameters[member].grad for member in group}
        has_any = any(waiting[member] is not None for member in group)
        for member in group:
            self.parameters[member].grad = waiting.pop(member)
        if has_any:
            if self.optimizer.decay or self.rate is not None:
                part.param_groups[0]["lr"] = self._rate()
            part.step()
        for member, grad in previous.items():
            self.parameters[member].grad = grad

    def _rate(self) -> float:
        return self.rate if self.rate is not None else self.present_rate

    @property
    def present_rate(self) -> float:
        """The learning rate of the optimizer at this step."""
        return self.optimizer.lr * math.exp(-self.optimizer.decay * self.step)

    def advance(self) -> None:
        """End the step: the next one uses the next decayed learning rate."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken and the torch state of each group, in the order of `parts`."""
        return {"step": self.step, "parts": [part.state_dict() for part in self.parts.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned for the same optimizer and leaves."""
        self.step = state["step"]
        for part, part_state in zip(self.parts.values(), state["parts"], strict=True):
            part.load_state_dict(part_state)


def _accepts_sparse(optimizer: Optimizer) -> bool:
    """Whether torch's optimizer accepts the sparse gradient of an embedding."""
    return isinstance(optimizer, SGD) and not optimizer.momentum and not optimizer.weight_decay


def update_groups(objective: Objective) -> list[tuple[str, ...]]:
    """Return the names of the leaves in each group: one large leaf, or small ones of up to about `SMALL` bytes.

    The small leaves of a block with a large leaf are in no group with other leaves. So all such blocks have equal
    groups, and the gradients of a group are complete at the end of the block's backward pass.
    """
    blocks = {
        id(parameter): number
        for number, block in enumerate(find_blocks(objective.model))
        for module in block
        for parameter in module.parameters()
    }
    large = [leaf for leaf in objective.leaves if leaf.parameter.nbytes >= SMALL]
    separate = {blocks[id(leaf.parameter)] for leaf in large if id(leaf.parameter) in blocks}
    groups: list[tuple[str, ...]] = [(leaf.name,) for leaf in large]
    small: list[Leaf] = []
    previous: int | None = None
    for leaf in objective.leaves:
        if leaf.parameter.nbytes < SMALL:
            block = blocks.get(id(leaf.parameter))
            if small and block != previous and {block, previous} & separate:
                groups.append(tuple(member.name for member in small))
                small = []
            previous = block
            small.append(leaf)
            if sum(member.parameter.nbytes for member in small) >= SMALL:
                groups.append(tuple(member.name for member in small))
                small = []
    return [*groups, tuple(leaf.name for leaf in small)] if small else groups
