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
    """Train `task` with `estimator` and `optimizer` for `steps`, with all randomness from `seed`.

    method: the name under which runs are gathered. phase: "tune" and "confirm" runs are scored on the validation
    split; "final" ones on the test split too, once, at their end. The phases never share a key, so a tuned rate
    meets fresh weights, order and noise. Methods under one phase and seed share theirs, so their differences are
    paired. target: the validation accuracy whose first step is noted. Raises: ValueError where a part prints its
    address in memory, for a trial's name hangs on its text.
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
                    f"{type(part).__name__} prints as {part!r}, another text in every process, so that its runs "
                    "could not be told from others'. Make it a frozen dataclass, as tasks are."
                )

    @property
    def key(self) -> Key:
        return Key(self.seed).fold(self.phase)

    def name(self, code: str) -> str:
        """The trial's id: a hash of its text and of the fingerprint of the code that it runs."""
        return digest((self, code))
