"""One run of one method, as a value."""

from __future__ import annotations

from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.value import digest, value
from gradcost.estimators.estimator import Estimator
from gradcost.training.optimizers import Optimizer


@value
class Trial:
    """One training run; all its randomness comes from `phase` and `seed`.

    - Two phases never share a key, so a tuned learning rate meets new weights, batches and noise.
    - Methods share the key of a phase and a seed, so their differences are paired.

    Args:
        task: what is trained, and its data.
        method: the name under which the runs of one method are collected.
        estimator: how the gradient is estimated.
        optimizer: what uses the gradient.
        steps: the number of training steps.
        phase: "tune" and "confirm" runs are scored on the validation split. A "final" run is also scored on the
            test split, once, at its end.
        seed: numbers the runs of a phase.
        target: the validation accuracy whose first step is recorded.
    Raises:
        BadInput: a part prints its address in memory. The name of a trial is a hash of its text.
    """

    task: Any
    method: str
    estimator: Estimator
    optimizer: Optimizer
    steps: int
    phase: str = "final"
    seed: int = 1
    target: float = 0.9

    def __post_init__(self) -> None:
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
        """Return the id of the trial: a hash of its text and of the fingerprint of the code that it runs.

        Args:
            code: the fingerprint.
        Returns:
            Hexadecimal digits.
        """
        return digest((self, code))
