"""One training run of one method, as an immutable value."""

from __future__ import annotations

from math import isfinite
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.printable import printable
from gradcost.core.value import digest, value
from gradcost.estimators.estimator import Estimator
from gradcost.studies.environment import plug_in_code
from gradcost.training.optimizers import Optimizer

PHASES = ("tune", "confirm", "final")
POINTS = 200  # points of the curve of the training loss


@value
class Trial:
    """One training run; all its randomness comes from `phase` and `seed`.

    - Two phases never share a key. So final runs use initial weights, batches and noise that tuning did not use.
    - All methods use the same key for the same phase and seed. So their results can be compared pair by pair.

    Args:
        task: the model, the data and the loss.
        method: label of the method; all runs of a method have the same label.
        estimator: how the gradient is estimated.
        optimizer: how the gradient changes the weights.
        steps: the number of training steps.
        phase: "tune" and "confirm" runs are scored on the validation split. A "final" run is also scored on the
            test split, once, at its end.
        seed: the seed of the run within its phase.
        target: a validation accuracy, or a value of the task's metric. The record contains the first evaluated step
            that reaches it. None: no target.
        points: number of points of the curve of the training loss. Each is the mean loss since the previous point.
    Raises:
        BadInput: the repr of the task, estimator or optimizer contains a memory address. The id of a trial is a
            hash of these reprs, so it would differ between processes. Or a part has the wrong type, a number is out
            of range, there is no such phase, or the label has a character that cannot be shown.
    """

    task: Any
    method: str
    estimator: Estimator
    optimizer: Optimizer
    steps: int
    phase: str = "final"
    seed: int = 1
    target: float | None = 0.9
    points: int = POINTS

    def __post_init__(self) -> None:
        check_label(self.method)
        check_target(self.target)
        if self.steps < 1 or self.points < 1:
            raise BadInput(
                f"a trial of {self.method} has {self.steps} steps and {self.points} points: give 1 or more."
            )
        if self.phase not in PHASES:
            raise BadInput(
                f'the phase of a trial of {self.method} is {self.phase!r}: write "tune", "confirm" or "final".'
            )
        for name, part, kind in (("estimator", self.estimator, Estimator), ("optimizer", self.optimizer, Optimizer)):
            if not isinstance(part, kind):
                raise BadInput(f"the {name} of a trial of {self.method} is {part!r}: give an {kind.__name__}.")
        for part in (self.task, self.estimator, self.optimizer):
            if " at 0x" in repr(part):
                raise BadInput(
                    f"{type(part).__name__} prints as {part!r}, a different text in every process, so its runs "
                    "cannot be identified. Make it a frozen dataclass, as tasks are."
                )

    @property
    def key(self) -> Key:
        return Key(self.seed).fold(self.phase)

    def name(self, code: str) -> str:
        """Return the id of the trial: a hash of its repr, of `code`, and of the code of plug-ins that it uses.

        Args:
            code: the fingerprint of the code that trials run (`environment.fingerprint`).
        Returns:
            Hexadecimal digits.
        """
        return digest((self, code, *plug_in_code(self.task, self.estimator, self.optimizer)))


def check_label(label: str) -> None:
    """Raise BadInput if the label of a method is no text, or has a character that cannot be shown."""
    if not isinstance(label, str):
        raise BadInput(f'the label of a method is a text, such as "backprop", not {label!r}.')
    if printable(label) != label:
        raise BadInput(f"the label {label!r} of a method has a character that cannot be shown: leave it out.")


def check_target(target: float | None) -> None:
    """Raise BadInput if a target is not a finite number or None."""
    if target is not None and not isfinite(target):
        raise BadInput(f"the target is {target}: give a finite number, or None for no target.")
