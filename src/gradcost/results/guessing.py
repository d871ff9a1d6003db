"""What a model that learned nothing reaches: the accuracy and the loss of guessing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from gradcost.core.value import value
from gradcost.results.records import StudyRecord, TrialRecord
from gradcost.results.wording import percent


@value
class Guess:
    """The best accuracy of an answer that ignores the input: always the same one, or any class at random.

    Args:
        accuracy: its accuracy.
        is_most_frequent: whether it is that of the most frequent answer. False: that of equally frequent classes.
    """

    accuracy: float
    is_most_frequent: bool = False

    def limit(self, targets: int | None = None) -> float:
        """Return the accuracy up to which a result may come from guessing: `accuracy` plus the larger of two margins.

        - 5% of the distance from `accuracy` to 1.
        - If `targets` is known: three standard deviations of the accuracy of guessing that many labels.
        """
        spread = 3 * math.sqrt(self.accuracy * (1 - self.accuracy) / targets) if targets else 0.0
        return self.accuracy + max(0.05 * (1 - self.accuracy), spread)

    @property
    def text(self) -> str:
        """Say what guessing reaches: `guessing gives 10.0%`."""
        what = "always giving the most frequent answer" if self.is_most_frequent else "guessing"
        return f"{what} gives {percent(self.accuracy)}"


def guess_of(study: StudyRecord) -> Guess | None:
    """Return what guessing reaches on the task of a study; None if the number of classes is not known."""
    if study.chance is None:
        return None
    if study.majority is None or study.majority <= study.chance:
        return Guess(study.chance)
    return Guess(study.majority, is_most_frequent=True)


def targets_of(runs: Iterable[TrialRecord], part: Literal["validation", "test"]) -> int | None:
    """Return the number of examples or tokens over which accuracies on a split are averaged; None if not known."""
    found = (getattr(run, part) for run in runs)
    return next((scores.targets for scores in found if scores is not None and scores.targets is not None), None)


def guessing_loss(chance: float | None) -> float | None:
    """Return the loss of guessing, in nats: that of equal probabilities for all classes.

    Args:
        chance: the accuracy of guessing among equally frequent classes, 1 / classes. None: not known.
    Returns:
        log(classes); None if it is not known.
    """
    return math.log(1 / chance) if chance is not None and 0 < chance < 1 else None
