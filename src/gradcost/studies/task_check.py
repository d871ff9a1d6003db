"""Check a task before the first run: its data, that it is a function of its key, and that its loss uses its model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.fake import is_fake
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.pytree import tensors
from gradcost.core.units import count
from gradcost.tasks.contract import PARTS
from gradcost.tasks.metrics import IGNORED
from gradcost.tasks.placed import Placed
from gradcost.tasks.task import Split, Task

AT_ONCE = 1 << 22  # numbers of a split that are checked at once
_CHECKED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


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
        if torch.equal(*losses):  # adapters add nothing at the start, whatever the key: their second factor is zero
            with torch.no_grad():
                for leaf in other.leaves:
                    weight = leaf.parameter
                    weight.add_(torch.linspace(0.0, 0.1, weight.numel(), device=weight.device).view_as(weight))
            losses[1] = other.evaluate(batch, key)
    if torch.equal(*losses) and torch.isfinite(losses[0]):
        raise BadInput(
            f"the loss of {name} is {float(losses[0]):g} for two models with different weights: it does not use the "
            "model that it receives. Use the first argument of loss(model, batch)."
        )


def check_splits(task: Any) -> None:
    """Check each `Split(x, y)` of a task whose x and y are dense tensors; other data are the task's own affair.

    There are as many targets as inputs, and at least one. If x or y has a NaN or an infinity, the loss of its first
    example is computed: masks and missing labels may have such values. A `Note` is issued if two splits
    begin with the same example in memory, so that they share it.

    Args:
        task: has `splits`, `objective` and `score`.
    Raises:
        BadInput: the message names the split, and the first example at fault.
    """
    splits, seen = task.splits(), dict[tuple[int, int], str]()
    for part in PARTS:
        split = getattr(splits, part, None)
        if not isinstance(split, Split) or not all(is_dense(tensor) for tensor in split):
            continue
        first = seen.setdefault((split.x.data_ptr(), split.y.data_ptr()), part)
        if first != part and len(split.x):
            warnings.warn(
                f"the {first} and the {part} split of {type(task).__name__} share examples, so the scores say less "
                "about new data: give each split examples of its own.",
                Note,
                stacklevel=2,
            )
        name = f"the {part} split of {type(task).__name__}"
        inputs, targets = len(split.x), len(split.y)
        if inputs != targets:
            raise BadInput(f"{name} has {count(inputs, 'input')} and {count(targets, 'target')}: give one for each.")
        if not inputs:
            raise BadInput(f"{name} has no examples: it needs one or more.")
        _check_labels(task, split, name)
        for what, tensor in zip(("input", "target"), split, strict=True):
            example = first_not_finite(tensor)
            if example is not None and _has_no_loss(task, Split(*(each[example : example + 1] for each in split))):
                raise BadInput(
                    f"{name} has a NaN or an infinity in {what} {example}, counted from 0, and the loss of this "
                    "example is not finite: remove or replace it."
                )


def _check_labels(task: Any, split: Split, name: str) -> None:
    """Raise BadInput if the loss and score of `Task` would meet a target that is no class of the task."""
    if has_own_score(task) or split.y.is_floating_point() or split.y.is_complex():
        return
    wrong = ((split.y < 0) | (split.y >= task.classes)) & (split.y != IGNORED)
    if wrong.any():
        example = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])
        label = int(split.y[wrong][0])
        raise BadInput(
            f"{name} has the target {label} in example {example}, counted from 0, and the task has {task.classes} "
            f"classes: targets are 0 to {task.classes - 1}, or {IGNORED} for one that does not count."
        )


def has_own_score(task: Any) -> bool:
    """Return whether a task scores otherwise than `Task`, whose accuracy is that of its targets as classes."""
    whole = task.task if isinstance(task, Placed) else task
    return getattr(type(whole), "score", None) is not Task.score


def is_dense(tensor: Any) -> bool:
    """Return whether an object is a tensor with all of its numbers in memory, and has one dimension or more."""
    is_plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested
    return is_plain and tensor.dim() > 0 and not tensor.is_meta and not is_fake(tensor)


def first_not_finite(tensor: Tensor) -> int | None:
    """Return the first index along dimension 0 with a NaN or an infinity in a dense tensor; None if there is none."""
    if tensor.dtype not in _CHECKED or not tensor.numel():
        return None
    rows, start = max(1, AT_ONCE * len(tensor) // tensor.numel()), 0
    for part in tensor.split(rows):
        finite = part.isfinite()
        if not finite.all():
            return start + int((~finite.reshape(len(part), -1).all(1)).nonzero()[0])
        start += len(part)
    return None


def _has_no_loss(task: Any, split: Split) -> bool:
    """Return whether the loss of a split at initial weights is not finite; False if it cannot be computed."""
    try:
        score = task.score(task.objective(Key(0)).model, split)
        return not isfinite(score["loss"] if isinstance(score, Mapping) else score.loss)
    except Exception:  # the task may not score single examples
        return False


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
