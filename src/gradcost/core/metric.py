"""The metric by which the runs of a study are ranked: a name and a direction."""

from __future__ import annotations

from math import isfinite

from gradcost.core.units import number
from gradcost.core.value import value


@value
class Metric:
    """The name of a metric, and whether smaller values are better.

    Records contain the *score* of a run, which is the metric if greater values are better, and minus the metric if
    smaller values are better. So a greater score is always better.

    Args:
        name: such as "accuracy", "loss" or "mean absolute error".
        lower_is_better: whether smaller values of the metric are better.
    """

    name: str = "accuracy"
    lower_is_better: bool = False

    @property
    def is_accuracy(self) -> bool:
        """Whether it is the fraction of correct predictions, which is written in percent."""
        return self.name == "accuracy"

    def score(self, x: float) -> float:
        """Return the score of a value of the metric. It is its own inverse."""
        return -x if self.lower_is_better else x

    def text(self, score: float) -> str:
        """Write the value of the metric for a score: 97.1%, 0.0312, or "diverged"."""
        if not isfinite(score):
            return "diverged"
        return f"{100 * score:.1f}%" if self.is_accuracy else number(self.score(score) + 0.0, 4)


ACCURACY = Metric()
