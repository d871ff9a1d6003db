"""Metrics over the batches of a loader: the loss, its exponential, the accuracy, or a function of the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradcost.core.batching.denominators import Observed, observed
from gradcost.core.errors import BadInput
from gradcost.core.pytree import batch_size

NAMED = {"loss": True, "perplexity": True, "accuracy": False}  # whether smaller values are better
_OWN_METRIC = (  # a remedy
    "metric(model, batch) and lower_is_better=False (on the command line: --metric FILE.py:FUNCTION "
    "--higher-is-better)."
)
_ROUNDING = 0.01  # of a loss in half precision
IGNORED = -100  # a target that is padding or part of a prompt: torch's cross-entropy and transformers ignore it
NO_TARGETS = "all targets are -100, which are ignored, so there is no score: give at least one other target."


class Measure:
    """The mean loss and metric over batches.

    - The loss is a mean over examples. If a target is -100, it is a mean over what the loss averages over, such as
      the targets that are not -100: padding and the division into batches do not change it.
    - The accuracy is a mean over the targets that are not -100. A function of the user is a mean over examples.
    - A batch without a target other than -100 is left out: its mean loss is 0 / 0.

    The targets are the whole-number y of a batch (x, y), or "labels" in a mapping.

    Args:
        name: the name of the metric.
        function: metric(model, batch); None for a metric in `NAMED`.
        loss: loss(model, batch).
    """

    def __init__(self, name: str, function: Callable[..., Any] | None, loss: Callable[..., Any]) -> None:
        self.name, self.function, self.loss = name, function, loss
        self._examples = self._left_out = 0
        self._loss = self._metric = 0.0
        self._right = self._targets = 0
        self._has_ignored = False
        self._counted_loss = self._counted = 0.0  # the loss times what it averages over, and the latter

    def add(self, model: nn.Module, batch: Any) -> None:
        """Add a batch. Call it in evaluation mode, without gradient."""
        evaluated, count, counted = observed(lambda: self.loss(model, batch)), _examples(batch), None
        if (targets := _targets(batch)) is not None:
            kept = int((targets != IGNORED).sum())
            self._has_ignored |= kept < targets.numel()
            counted = _denominator(evaluated, kept) if kept else 0.0
            if not counted:
                self._left_out += 1
                return
        loss = float(evaluated.loss)
        self._examples += count
        self._loss += count * loss
        self._counted += count if counted is None else counted
        self._counted_loss += (count if counted is None else counted) * loss
        if self.function is not None:
            self._metric += count * _scalar(self.function(model, batch), self.name)
        elif self.name == "accuracy":
            right, targets = correct(model, batch)
            self._right, self._targets = self._right + right, self._targets + targets

    def result(self) -> dict[str, float]:
        """Return {"loss": ..., name: ...}; for an accuracy also "targets" and "of", the number of targets.

        Raises:
            BadInput: no batch was added, or all targets are -100.
        """
        if not self._examples:
            raise BadInput(NO_TARGETS if self._left_out else "an empty split has no score: give at least one batch.")
        loss = self._counted_loss / self._counted if self._has_ignored else self._loss / self._examples
        if self.function is not None:
            return {"loss": loss, self.name: self._metric / self._examples}
        if self.name == "accuracy":
            accuracy = self._right / max(self._targets, 1)
            return {"loss": loss, "accuracy": accuracy, "targets": self._targets, "of": self._targets}
        return {"loss": loss} | ({"perplexity": _exp(loss)} if self.name == "perplexity" else {})


def _targets(batch: Any) -> Tensor | None:
    """Return the whole-number targets of a batch (x, y) or of a mapping with "labels"; None if it has none."""
    if isinstance(batch, Mapping):
        targets = batch.get("labels")
    else:
        targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        return None
    return targets if targets.dtype.is_signed and targets.numel() else None  # bool and uint8 have no -100


def _denominator(evaluated: Observed, targets: int) -> float:
    """Return what a loss divided by, such as its number of targets; `targets` if no division gave the loss."""
    division = next((each for each in evaluated.denominators if each.is_loss), None)
    value = None if division is None else division.value()
    return targets if value is None or not math.isfinite(value) or value < 0 else value


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _examples(batch: Any) -> int:
    try:
        return batch_size(batch)
    except BadInput:
        return 1


def _scalar(x: Any, name: str) -> float:
    if isinstance(x, Tensor) and x.numel() != 1:
        raise BadInput(
            f"{name} returned a tensor of shape {tuple(x.shape)}: return one number, the mean over examples."
        )
    try:
        return float(x)
    except (TypeError, ValueError):
        raise BadInput(f"{name} returned {type(x).__name__}: return one number, the mean over examples.") from None


def correct(model: nn.Module, batch: Any) -> tuple[int, int]:
    """Return the number of correct predictions and of targets. Targets of -100 are ignored.

    The logits of a causal language model of transformers predict the label of the next position, those of other
    models the label of their own. Which one it is, the loss in the model's output tells.

    Args:
        model: maps x to logits of shape (..., classes); or a model of transformers, whose output has `logits`.
        batch: (x, y), or a mapping with "labels". y and labels: whole numbers of shape (...).
    Raises:
        BadInput: the batch or the output has another form.
    """
    output = None
    if isinstance(batch, Mapping) and "labels" in batch:
        output = model(**batch)
        logits, targets = getattr(output, "logits", output), batch["labels"]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        logits, targets = model(batch[0]), batch[1]
    else:
        raise BadInput(
            'the accuracy is known for batches (x, y) and for dictionaries with "labels". For another batch give a '
            f"function {_OWN_METRIC}"
        )
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape or targets.is_floating_point():
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise BadInput(
            f"the accuracy needs logits of shape (..., classes) and whole-number targets of shape (...), not {shape} "
            f"and {tuple(targets.shape)} of {targets.dtype}. Use the metric loss, or give a function {_OWN_METRIC}"
        )
    loss = getattr(output, "loss", None)
    if logits.dim() == 3 and loss is not None:
        logits, targets = _aligned(logits, targets, float(loss), type(model).__name__)
    counted = targets != IGNORED
    return int(((logits.argmax(-1) == targets) & counted).sum()), int(counted.sum())


def _aligned(logits: Tensor, targets: Tensor, loss: float, name: str) -> tuple[Tensor, Tensor]:
    """Return the logits and the targets whose mean cross-entropy is the loss: of equal positions, or one apart."""
    if not (targets != IGNORED).any():
        return logits, targets
    pairs = [(logits, targets), (logits[:, :-1], targets[:, 1:])]
    losses = [float(F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), ignore_index=IGNORED)) for x, y in pairs]
    apart = [abs(each - loss) if math.isfinite(each) else math.inf for each in losses]
    if not min(apart) <= _ROUNDING * (1 + abs(loss)):
        raise BadInput(
            f"the loss of {name}, {loss:.4g}, is the cross-entropy of its logits neither with the labels, "
            f"{losses[0]:.4g}, nor with those of the next position, {losses[1]:.4g}, so it is not known which labels "
            f"they predict: use the metric loss, or give a function {_OWN_METRIC}"
        )
    return pairs[apart.index(min(apart))]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return `model(**batch).loss` for a mapping, and the mean cross-entropy of `model(x)` for (x, y) with classes.

    Args:
        model: a model of transformers, or one that returns logits of shape (..., classes).
        batch: a mapping with all arguments of the model, or (x, y) with whole-number targets.
    Raises:
        BadInput: the loss of such a batch is not known.
    """
    if isinstance(batch, Mapping):
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise BadInput(f"the output of {type(model).__name__} has no `loss`. Add labels to the batch.")
        return loss
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        x, y = batch
        if not y.is_floating_point():
            return F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    raise BadInput(
        "no loss is known for this batch: it is neither a dictionary nor (x, y) with whole-number targets. "
        f"{OWN_LOSS}"
    )


OWN_LOSS = "Give your own loss: end the function that makes the model with `return model, loss`."
