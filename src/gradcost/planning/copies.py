"""Copies of a model with few of its equal blocks, and whether they predict a forward pass of the whole model."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

from gradcost.checkpointing.replay import not_recomputed
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.instruments.cuda_allocator import round_up
from gradcost.instruments.flops import Counts
from gradcost.planning.depth import SMALL, extrapolated_counts
from gradcost.planning.forecast import device_type, forward_counts, rounding
from gradcost.planning.repeated_blocks import Repeated, find_repeated, with_fewer
from gradcost.planning.segments import Irregular

_LEAST_BLOCKS = 16  # a model with fewer blocks is simulated as it is


class Size(NamedTuple):
    """The size of a batch. examples: None if their number is undefined."""

    micro_batches: int
    examples: int | None


class Copies:
    """Copies of an objective's model that share its parameters and have few of its equal blocks.

    Args:
        objective: the objective. Its batches differ in nothing but the number of examples.
        device: where a step would run; None for the device of the model.

    parts: the repeated parts of the model; none if it has fewer than 16 equal blocks.
    """

    def __init__(self, objective: Objective, device: str | None) -> None:
        self._objective, self._device = objective, device
        self._copies: dict[int, tuple[Objective, tuple[Repeated, ...]]] = {}
        self._forward: dict[tuple[Size, int | None], Counts] = {}  # blocks (None: all) -> counts
        self._is_regular: bool | None = None

    @cached_property
    def parts(self) -> tuple[Repeated, ...]:
        parts = find_repeated(self._objective)
        if not parts or parts[0].count < _LEAST_BLOCKS or not_recomputed(self._objective):
            return ()
        return parts

    @cached_property
    def chain(self) -> Repeated | None:
        """The repeated part if its units are the blocks of schedules; None if they are not."""
        if len(self.parts) != 1 or self.parts[0].period != 1:
            return None
        part, names = self.parts[0], {module: name for name, module in self._objective.model.named_modules()}
        blocks = [[names.get(module) for module in block] for block in find_blocks(self._objective.model)]
        return part if blocks == [[part.module(unit, "0")] for unit in range(part.count)] else None

    @cached_property
    def parameter_bytes(self) -> int:
        """The bytes of the parameters of the whole model; tied ones count once."""
        block = rounding(device_type(self._objective, self._device))
        storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in self._objective.model.parameters()}
        return sum(round_up(storage.nbytes(), block) for storage in storages.values())

    def of(self, blocks: int, micro_batches: int = 1) -> tuple[Objective, tuple[Repeated, ...]]:
        """Return the objective of the copy with `blocks` units of each repeated part, and these parts in the copy."""
        if blocks not in self._copies:
            self._copies[blocks] = with_fewer(self._objective, self.parts, blocks)
        objective, parts = self._copies[blocks]
        return objective.in_micro_batches(micro_batches), parts

    def forward(self, batch: Any, micro_batches: int = 1) -> Counts:
        """Return the counts of one forward pass of the whole model. Errors: as `forecast`.

        The whole model evaluates the first batch. If the copies predict these counts, they predict those of other
        batches too.
        """
        size = size_of(batch, micro_batches)
        if (size, None) not in self._forward:
            found = self._predicted(batch, micro_batches) if self._is_regular else None
            if found is None:
                found = forward_counts(self._objective.in_micro_batches(micro_batches), batch, self._device)
            self._forward[size, None] = found
        return self._forward[size, None]

    def forward_of(self, blocks: int, batch: Any, micro_batches: int = 1) -> Counts:
        """Return the counts of one forward pass of the copy with `blocks` blocks."""
        key = size_of(batch, micro_batches), blocks
        if key not in self._forward:
            self._forward[key] = forward_counts(self.of(blocks, micro_batches)[0], batch, self._device)
        return self._forward[key]

    def is_regular(self, batch: Any, micro_batches: int = 1) -> bool:
        """Return whether the copies with 3 and 4 blocks predict the counts of a forward pass of the whole model."""
        if not self.parts:
            return False
        if self._is_regular is None:
            whole = self.forward(batch, micro_batches)
            self._is_regular = whole == self._predicted(batch, micro_batches)
        return self._is_regular

    def _predicted(self, batch: Any, micro_batches: int) -> Counts | None:
        """Return the counts of a forward pass that copies with 3 and 4 blocks predict; None if they do not."""
        try:
            three, four = (self.forward_of(blocks, batch, micro_batches) for blocks in SMALL[:2])
            return extrapolated_counts(three, four, [self.of(n)[1] for n in SMALL[:2]], self.parts[0].count)
        except Irregular:
            return None
        except Exception as error:  # in a copy: the whole model gives the result or the right message
            raise_interrupt(error)
            return None


def size_of(batch: Any, micro_batches: int) -> Size:
    """Return the size of a batch in micro-batches."""
    try:
        return Size(micro_batches, batch_size(batch))
    except BadInput:
        return Size(micro_batches, None)
