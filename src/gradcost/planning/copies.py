"""Copies of a model with few of its equal blocks, and whether they predict a forward pass of the whole model."""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.checkpointing.replay import not_recomputed
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import BadInput
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size, tree_map
from gradcost.instruments.cuda_allocator import round_up
from gradcost.instruments.flops import Counts
from gradcost.planning.batch import three_parts
from gradcost.planning.depth import SMALL, extrapolated_counts, extrapolated_memory
from gradcost.planning.forecast import Evaluation, device_type, evaluation, rounding
from gradcost.planning.repeated_blocks import Repeated, find_repeated, with_fewer
from gradcost.planning.segments import Irregular
from gradcost.training.leafwise import update_groups

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
        self._read: bool | None = None  # whether the loss reads values of the batch; None: not known yet
        self.predict_steps: bool | None = None  # whether they predict a step of backprop; None until one was compared

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

    @cached_property
    def shares_updates(self) -> bool:
        """Whether the optimizer moves small leaves of several units at once (`leafwise.update_groups`).

        The number of these groups is no affine function of the number of blocks.
        """
        groups = update_groups(self._objective) if self.parts else []
        places = [[part.unit(name) for part in self.parts for name in group] for group in groups]
        return any(len({place[0] for place in each if place is not None}) > 1 for each in places)

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
        key = size_of(batch, micro_batches), None
        if self.is_regular(batch, micro_batches) and key not in self._forward:
            three, four = (self.forward_of(blocks, batch, micro_batches) for blocks in SMALL[:2])
            parts = [self.of(blocks)[1] for blocks in SMALL[:2]]
            with suppress(Irregular):  # the whole model, then
                self._forward[key] = extrapolated_counts(three, four, parts, self.parts[0].count)
        if key not in self._forward:
            self._evaluated(None, batch, micro_batches)
        return self._forward[key]

    def forward_of(self, blocks: int, batch: Any, micro_batches: int = 1) -> Counts:
        """Return the counts of one forward pass of the copy with `blocks` blocks."""
        key = size_of(batch, micro_batches), blocks
        if key not in self._forward:
            self._evaluated(blocks, batch, micro_batches)
        return self._forward[key]

    def is_regular(self, batch: Any, micro_batches: int = 1) -> bool:
        """Return whether the copies predict the counts and the memory of a forward pass of the whole model."""
        if not self.parts:
            return False
        if self._is_regular is None:
            whole = self._evaluated(None, batch, micro_batches)
            self._is_regular = self._are_predicted(whole, batch, micro_batches)
        return self._is_regular

    def three_parts(self, batch: Any, parts: int, own_parts: int = 1) -> Any | None:
        """Return a batch of 3 micro-batches instead of `parts`, as `batch.three_parts`; None if the costs differ.

        They can differ if the loss reads values of the batch, for example to cut its examples to the longest one.
        """
        three = three_parts(batch, parts, own_parts)
        if three is None or not self._reads_values(batch):
            return three
        is_alike = 3 * self.forward(batch, parts).flops == parts * self.forward(three, 3).flops
        return three if is_alike else None

    def _reads_values(self, batch: Any) -> bool:
        """Return whether the loss fails on a batch whose tensors have shapes but no values."""
        if self._read is None:
            objective = self.of(SMALL[0])[0] if self.parts else self._objective
            try:
                evaluation(objective, tree_map(_without_values, batch), self._device)
                self._read = False
            except Exception as error:  # of many types, by what the loss does with the value
                raise_interrupt(error)
                self._read = True
        return self._read

    def _evaluated(self, blocks: int | None, batch: Any, micro_batches: int) -> Evaluation:
        """Evaluate the copy with `blocks` blocks (None: the whole model), and remember the counts."""
        objective = (
            self._objective.in_micro_batches(micro_batches) if blocks is None else self.of(blocks, micro_batches)[0]
        )
        result = evaluation(objective, batch, self._device)
        self._forward[size_of(batch, micro_batches), blocks] = result.counts
        return result

    def _are_predicted(self, whole: Evaluation, batch: Any, micro_batches: int) -> bool:
        parts, count = [self.of(blocks)[1] for blocks in SMALL], self.parts[0].count
        evaluated = functools.cache(lambda blocks: self._evaluated(blocks, batch, micro_batches))
        try:
            memory = extrapolated_memory(evaluated, parts, count)
            counts = extrapolated_counts(evaluated(3).counts, evaluated(4).counts, parts, count)
        except Irregular:
            return False
        except Exception as error:  # in a copy: the whole model gives the result or the right message
            raise_interrupt(error)
            return False
        return (counts, memory) == (whole.counts, replace(whole.memory, timeline=()))


def _without_values(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and leaf.layout == torch.strided else leaf


def size_of(batch: Any, micro_batches: int) -> Size:
    """Return the size of a batch in micro-batches."""
    try:
        return Size(micro_batches, batch_size(batch))
    except BadInput:
        return Size(micro_batches, None)
