"""Check a task before the first run: its data, that it is a function of its key, and that its loss uses its model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.pytree import tensors
from gradcost.core.units import count
from gradcost.tasks.contract import PARTS, first_not_finite
from gradcost.tasks.task import Split


def check_contract(task: Any) -> None:
    """Check what a comparison assumes about a task. Cost: three models, two batches and two forward passes.

    - The splits are complete (`check_splits`).
    - Each call of `objective` returns a new model, on a device that stores numbers.
    - Equal keys give equal weights and batches. Otherwise seeds could not be paired, and a study could not resume.
    - The loss depends on the weights of the model.
    - A `Note` is issued if different keys give equal weights, as pretrained models do.

    Args:
        task: has `objective` and `batch_at`; also its own `check`, if it has one, is called.
    Raises:
        BadInput: the task violates one of these; the message says what to change.
    """
    name, key = type(task).__name__, Key(0)
    check_splits(task)
    if hasattr(task, "check"):
        task.check()
    first, again, other = task.objective(key), task.objective(key), task.objective(Key(1))
    _check_new(first, again, name)
    if not _are_equal(_state(first), _state(again)):
        raise BadInput(
            f"two models of {name}.objective with one key have different weights, so its seeds mean nothing. Make "
            "the model inside `with gradcost.core.isolation.seeded_generators(key)`, and use no generator of its own."
        )
    batch = task.batch_at(key, 0)
    if not _are_equal(tensors(batch), tensors(task.batch_at(key, 0))):
        raise BadInput(
            f"{name}.batch_at returned two different batches for one key and step: draw the batch from the key, and "
            "use no other generator."
        )
    if _are_equal(_state(first), _state(other)):
        warnings.warn(
            f"every seed of {name} starts from the same weights, so seeds differ only in the order of the data and "
            "the noise. This is right for a pretrained model.",
            Note,
            stacklevel=2,
        )
        return
    with loss_errors(first):
        losses = [objective.evaluate(batch, key) for objective in (first, other)]
    if torch.equal(*losses) and torch.isfinite(losses[0]):
        raise BadInput(
            f"the loss of {name} is {float(losses[0]):g} for two models with different weights: it does not use the "
            "model that it receives. Use the first argument of loss(model, batch)."
        )


def check_splits(task: Any) -> None:
    """Check each `Split(x, y)` of a task: as many targets as inputs, at least one, and no NaN or infinity.

    Data of another type are the task's own affair.

    Args:
        task: has `splits`.
    Raises:
        BadInput: the message names the split and the first example at fault.
    """
    splits = task.splits()
    for part in PARTS:
        split = getattr(splits, part, None)
        if not isinstance(split, Split):
            continue
        name = f"the {part} split of {type(task).__name__}"
        inputs, targets = len(split.x), len(split.y)
        if inputs != targets:
            raise BadInput(f"{name} has {count(inputs, 'input')} and {count(targets, 'target')}: give one for each.")
        if not inputs:
            raise BadInput(f"{name} is empty: give at least one example.")
        for what, tensor in (("input", split.x), ("target", split.y)):
            example = first_not_finite(tensor)
            if example is not None:
                raise BadInput(
                    f"{name} has a NaN or an infinity in {what} {example}, counted from 0, which makes the loss "
                    "useless at any learning rate: remove or replace it."
                )


def _check_new(first: Objective, second: Objective, name: str) -> None:
    for leaf in first.leaves:
        if leaf.parameter.is_meta:
            raise BadInput(
                f"`{leaf.name}` of the model of {name} is on the meta device, which stores no numbers: make the "
                "model on the CPU, or load its weights."
            )
    if {id(leaf.parameter) for leaf in first.leaves} & {id(leaf.parameter) for leaf in second.leaves}:
        raise BadInput(
            f"{name}.objective returned the same model twice, and each run changes its weights: make a new model at "
            "each call."
        )


def _state(objective: Objective) -> list[Tensor]:
    return [*objective.model.parameters(), *objective.model.buffers()]


def _are_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal, bit for bit; NaN is equal to NaN."""
    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in zip(first, second, strict=True)
    )
