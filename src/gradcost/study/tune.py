"""Which learning rate tuning chose."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from gradcost.study.records import Trial


def chosen(trials: Iterable[Trial], method: str) -> float | None:
    """The learning rate that tuning chose for `method`; None when no tuning run of it finished.

    The best validation accuracy wins, then the lower validation loss, then the smaller learning rate: so
    the choice does not depend on the order in which the runs finished.
    """
    finished = [
        trial
        for trial in trials
        if trial.method == method and trial.phase == "tune" and trial.status == "finished" and trial.validation
    ]
    return max(finished, key=_merit).lr if finished else None


def _merit(trial: Trial) -> tuple[float, float, float]:
    accuracy, loss = (trial.validation.accuracy, trial.validation.loss) if trial.validation else (None, None)
    return (-inf if accuracy is None else accuracy, -inf if loss is None else -loss, -trial.lr)
