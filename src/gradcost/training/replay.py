"""Rebuild the weights of a training run from its step log."""

from __future__ import annotations

from pathlib import Path

import torch

from gradcost.core.errors import BadInput
from gradcost.core.objective import Objective
from gradcost.directions import Directions
from gradcost.estimators.estimator import Estimate, Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import replayed
from gradcost.estimators.structure import find
from gradcost.training.leafwise import Leafwise
from gradcost.training.optimizers import Optimizer
from gradcost.training.step_log import Logged, LoggedStep, LogWriter, read_log, require_same, weights_digest


def replay(
    path: Path, objective: Objective, directions: Directions, optimizer: Optimizer, to: int | None = None
) -> int:
    """Rebuild the weights after a step from the initial weights and the log.

    Law: the weights have the bits of the training run, on the same kind of device (directions have the same bits on
    every device, the arithmetic of the optimizer may not). No loss is evaluated.

    Args:
        path: the file of a `StepLog`.
        objective: the model with the weights before step 0; changed in place. Its loss is not used.
        directions: the directions of the estimator, such as `Gaussian()`.
        optimizer: the optimizer of the run.
        to: the number of steps to take. None: all.
    Returns:
        The number of steps taken.
    Raises:
        BadInput: the log is damaged, is of another model, optimizer, directions or initial weights, has fewer steps,
            or the weights differ from an audit.
    """
    logged = read_log(path)
    require_same(path, logged, objective, optimizer)
    count = len(logged.steps) if to is None else to
    if not 0 <= count <= len(logged.steps):
        raise BadInput(f"{path} has {len(logged.steps)} steps: those after {to} steps cannot be rebuilt.")
    if weights_digest(objective) != logged.audits[0]:
        raise BadInput(f"the weights are not those before step 0 of {path}: give the initial weights of that run.")
    leafwise = Leafwise(optimizer, objective)
    for step in logged.steps[:count]:
        apply(path, logged, step, objective, leafwise, directions)
    return count


def apply(
    path: Path,
    logged: Logged,
    step: LoggedStep,
    objective: Objective,
    leafwise: Leafwise,
    directions: Directions | None,
) -> None:
    """Take one logged step, and compare the weights with the audit after it, if there is one.

    Args:
        path: the file, for messages.
        logged: the content of the log.
        step: the step to take.
        objective: the objective whose parameters move.
        leafwise: its optimizer, after the earlier steps.
        directions: the directions of the log; not needed for a skipped step.
    Raises:
        BadInput: the log has other directions, or the weights differ from the audit.
    """
    if step.message:
        if directions is None or step.directions != repr(directions):
            raise BadInput(f"step {step.number} of {path} is along {step.directions}, not along {directions!r}.")
        gradient = Seeded.from_bytes(step.message, objective, directions)
        leafwise.rate = step.lr
        replayed(Estimate(torch.zeros(()), gradient), leafwise)
    leafwise.advance()
    audit = logged.audits.get(step.number + 1)
    if audit is not None and audit != weights_digest(objective):
        raise BadInput(
            f"after step {step.number} the weights are not those that {path} recorded. Gaussian directions need the "
            "kind of device of the training run; the log, torch or gradcost may have changed."
        )


def catch_up(writer: LogWriter, leafwise: Leafwise, estimator: Estimator, taken: int) -> int:
    """Take the steps of an existing log that follow the first `taken`; return the number of steps taken in total.

    Args:
        writer: the open log.
        leafwise: the optimizer of the writer's objective, after `taken` steps.
        estimator: the estimator of the run, which has the directions of the log.
        taken: the number of steps that the weights contain.
    Raises:
        BadInput: the log has fewer than `taken` steps, or `replay` would raise it.
    """
    path, logged, objective = writer.log.path, writer.earlier, writer.objective
    count = 0 if logged is None else len(logged.steps)
    if count < taken:
        raise BadInput(f"{path} has {count} steps, but {taken} are taken already: give the log of the same run.")
    if logged is None:
        return 0
    if taken == 0 and weights_digest(objective) != logged.audits[0]:
        raise BadInput(
            f"the initial weights are not those of {path}: use the task and key of that run, or delete it."
        )
    for step in logged.steps[taken:]:
        apply(path, logged, step, objective, leafwise, _directions_of(path, estimator, step.directions))
    leafwise.rate = None
    if count not in logged.audits:
        writer.moved(count)  # the process may have been killed before it wrote the audit of its last step
    return count


def _directions_of(path: Path, estimator: Estimator, text: str) -> Directions | None:
    """Return the part of the estimator that has this repr; None for the steps before the first direction."""
    if not text:
        return None
    found = next((part for part in find(estimator, Directions) if repr(part) == text), None)
    if found is None:
        raise BadInput(f"{path} is the log of a run along {text}, but {estimator} has other directions.")
    return found
