"""Check a task, and return what a study records about it: names, number of weights, accuracy of guessing."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import Tensor

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.metric import ACCURACY, Metric
from gradcost.core.objective import Objective
from gradcost.studies.task_check import has_own_score, is_dense
from gradcost.tasks.metrics import IGNORED

REQUIRED = ("objective", "batch_at", "splits", "score")  # every subclass of gradcost.tasks.Task has them


def check_task(task: Any, name: str | None = None) -> None:
    """Check that a study can use an object as its task.

    Raises:
        BadInput: a method is missing, and the message names it; or it is a class.
    """
    if isinstance(task, type):
        raise BadInput(f"{name or task.__name__} is a class: write {task.__name__}(), which makes a task.")
    for method in REQUIRED:
        if not hasattr(task, method):
            kind = f"an object of type {type(task).__name__}"
            raise BadInput(
                f"{name or kind} is not a task: it has no `{method}`. Subclass gradcost.tasks.Task, or write "
                "gradcost.tasks.from_loaders(make_model, loss, train=..., validation=..., test=...)."
            )


def task_name(task: Any) -> str:
    """Return the name of a task for reports and folders: its `name`, or the name of its class in lower case."""
    return getattr(task, "name", type(task).__name__.lower())


def device_of(task: Any) -> str | None:
    """Return the device that a task was placed on; None for that of its own model."""
    return getattr(task, "device", None)


def task_metric(task: Any) -> Metric:
    """Return what ranks the runs of a task: its `metric`, or the accuracy."""
    return getattr(task, "metric", ACCURACY)


def model_name(task: Any) -> str:
    """Return the name of a task's model for reports: its key in `task.models`, else its repr."""
    model = getattr(task, "model", None)
    names = getattr(task, "models", {})
    return next((name for name, entry in names.items() if entry == model), repr(model) if model else "its own model")


def weights(task: Any) -> dict[str, int]:
    """Return the number and the bytes of the trainable weights, as fields of `study.json`."""
    objective = task.objective(Key(0))
    nbytes = sum(leaf.parameter.nbytes for leaf in objective.leaves)
    return {"weights": objective.dimension, "weights_bytes": nbytes}


def chance(task: Any) -> float | None:
    """Return the accuracy of guessing, 1 / classes; None if the task has no `classes`."""
    classes = getattr(task, "classes", None)
    return None if classes is None else 1 / classes


def majority(task: Any) -> float | None:
    """Return the share of the most frequent right answer in the test split.

    The answers are those of `gold_answers`, for a task that has this method, else the targets. None: the targets are
    not one class each.
    """
    test = task.splits().test
    labels = task.gold_answers(test) if hasattr(task, "gold_answers") else _classes(test)
    if labels is None:
        return None
    answers = labels.tolist() if isinstance(labels, Tensor) else labels
    return max(Counter(answers).values()) / len(answers)


def constant_loss(task: Any) -> float | None:
    """Return the mean cross-entropy on the validation split of the best answer that ignores the input.

    It gives each class the probability of its share in the training split. None: the targets are not one class each,
    or the validation split has a class that the training split lacks.
    """
    splits = task.splits()
    train, validation = _classes(splits.train), _classes(splits.validation)
    if train is None or validation is None:
        return None
    classes = 1 + int(max(train.max(), validation.max()))
    shares = train.bincount(minlength=classes).double() / len(train)
    loss = -shares.log()[validation].mean().item()
    return loss if math.isfinite(loss) else None


def _classes(split: Any) -> Tensor | None:
    """Return the targets of a split, without those that are ignored; None if they are not one class each."""
    labels: Any = getattr(split, "y", None)
    if not is_dense(labels) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        return None
    labels = labels[labels != IGNORED]
    return labels if len(labels) else None


def guessing_fields(task: Any) -> dict[str, float | None]:
    """Return what guessing reaches as fields of `study.json`: `chance`, and `majority` if it is more than that."""
    even = chance(task)
    is_own = has_own_score(task) and not hasattr(task, "gold_answers")
    is_known = even is not None and task_metric(task).is_accuracy and not is_own
    share = majority(task) if is_known else None
    return {"chance": even} if even is None or share is None or share <= even else {"chance": even, "majority": share}


def metric_fields(task: Any) -> dict[str, Any]:
    """Return the metric of a task as fields of `study.json`; none for the accuracy, which is the default."""
    metric = task_metric(task)
    return {} if metric.is_accuracy else {"metric": metric.name, "lower_is_better": metric.lower_is_better}


def first_step(task: Any) -> tuple[Objective, Any]:
    """Return the objective and the batch that the forecast, timing and quality check of every method use."""
    return task.objective(Key(0).fold("survey")), task.batch_at(Key(0).fold("survey"), 0)
