"""The comparison: every method tuned alike on validation, run on fresh seeds, tested once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.value import digest, value
from gradcost.estimators.estimator import Estimator
from gradcost.results import ledger
from gradcost.results.records import read
from gradcost.studies.costs import Methods
from gradcost.studies.environment import describe, fingerprint
from gradcost.studies.phases import phases
from gradcost.studies.study import Study
from gradcost.studies.trial import Trial
from gradcost.training.optimizers import SGD


@value
class Comparison:
    """What is compared, and how: the whole protocol.

    methods: (label, estimator) pairs. rates: the learning rates that every method is tuned over first, on one seed
    that no other run uses. more: how many points each method may spend after those, beyond the edge of the grid
    where its winner lies on it, else beside the winner. confirm: on how many fresh seeds the best three are run
    again, whose mean decides; 0 trusts the tuning. seeds: of the final runs, fresh ones again, whose end alone sees
    the test split. memory: the budget of a step beyond the weights, in bytes, or None.
    """

    task: Any
    methods: tuple[tuple[str, Estimator], ...]
    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]
    target: float
    memory: int | None = None
    more: int = 0
    confirm: int = 0
    user_file: str | None = None  # where the task comes from, if not from this package

    def __post_init__(self) -> None:
        labels = [label for label, _ in self.methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise BadInput(f"{', '.join(twice)} is given twice: name each method once.")
        if not labels:
            raise BadInput("there is no method to compare: name one or more.")
        if self.steps < 1 or not self.seeds or not self.rates:
            raise BadInput("a comparison needs at least 1 step, 1 seed and 1 learning rate.")

    @property
    def steppers(self) -> Methods:
        """Each method with the optimizer that uses its gradient, at a rate that moves nothing far."""
        return {label: (estimator, SGD(1e-9)) for label, estimator in self.methods}

    @property
    def code(self) -> str:
        return fingerprint(self.user_file)

    @property
    def name(self) -> str:
        """A hash of what is compared and by which code: two folders under one name hold the same figures."""
        return digest((self, self.code))

    def study(self, labels: Collection[str]) -> Study:
        """The study of these methods: tuned on validation, confirmed on fresh seeds, run on fresh seeds again."""
        names = [label for label, _ in self.methods if label in labels]
        rates = dict.fromkeys(names, self.rates)
        return Study(
            f"Which of {', '.join(names)} is best for {self.task}?",
            lambda: phases(rates, self._trial, more=self.more, confirm=self.confirm, seeds=self.seeds),
        )

    @property
    def runs(self) -> int:
        """How many trials each method is given, at most."""
        points = len(self.rates) + self.more
        return points + min(3, points) * self.confirm + len(self.seeds)

    def _trial(self, label: str, lr: float, phase: str, seed: int) -> Trial:
        return Trial(self.task, label, dict(self.methods)[label], SGD(lr), self.steps, phase, seed, self.target)


def open_folder(folder: Path, comparison: Comparison, task_name: str, model_name: str) -> None:
    """Make the folder of a comparison, or take up the one that is there.

    Raises: ValueError when it holds another comparison; OSError when it cannot be written.
    """
    objective = comparison.task.objective(Key(0))
    document = {
        "schema": 1,
        "comparison": comparison.name,
        "task": repr(comparison.task),
        "task_name": task_name,
        "model_name": model_name,
        "weights": objective.dimension,
        "weights_bytes": sum(leaf.parameter.nbytes for leaf in objective.leaves),
        "methods": [label for label, _ in comparison.methods],
        "seeds": list(comparison.seeds),
        "points": len(comparison.rates) + comparison.more,
        "confirm": comparison.confirm,
        "steps": comparison.steps,
        "batch": getattr(comparison.task, "batch", None),
        "target": comparison.target,
        "memory": comparison.memory,
        "optimizer": "SGD",
        "chance": 1 / comparison.task.classes,
    }
    if (folder / "study.json").exists():
        if read(folder).study.comparison != document["comparison"]:
            raise BadInput(
                f"{folder} holds another comparison, or the same one made by other code. Give another folder with -o."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    ledger.write_document(folder / "environment.json", dict(describe(torch.get_num_threads(), comparison.code)))
    (folder / "records.jsonl").touch()
    ledger.write_document(folder / "study.json", document)  # last: a folder without it is not taken up
