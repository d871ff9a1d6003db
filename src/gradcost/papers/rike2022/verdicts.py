"""What became of the rows of Rike and Foerland's Table 1: a pure function of records and the table.

The rules. A row's runs give two metrics, the mean loss over the whole test set and the paper's, the mean over the
last batch of a shuffled pass. For each:

- Direction: on every seed of both, backprop's loss is below that of the forward gradient with the same optimizer. A
  run that diverged has an infinite loss.
- Size: the published number lies within the metric's interval, or nearer to it than half of its last printed digit.
  The interval of the paper's metric goes from the 5% to the 95% quantile over shuffles, that of the whole test set
  1.96 standard errors to either side; with several seeds from the least of these to the greatest.

"direction and size" needs both, "direction only" the first; all else is "not reproduced". There is no verdict where a
row or its rival was not run, or not for as long as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from statistics import median

from gradcost.papers.rike2022.table import DIGITS, STEPS_PER_EPOCH, Row
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import finals

HALF_A_DIGIT = 0.5 * 10**-DIGITS
NORMAL = 1.96  # two-sided 95%


class Verdict(Enum):
    BOTH = "direction and size"
    DIRECTION = "direction only"
    NOT = "not reproduced"
    NONE = "none"


@dataclass(frozen=True)
class Metric:
    """One metric of one row: a value a seed, and [low, high] over all of them; inf where a run diverged.

    seeds: those of the values; 1, 2, ... where none are given.
    """

    values: tuple[float, ...]
    low: float
    high: float
    seeds: tuple[int, ...] = ()

    @property
    def by_seed(self) -> dict[int, float]:
        return dict(zip(self.seeds or range(1, len(self.values) + 1), self.values, strict=True))

    @property
    def middle(self) -> float:
        return median(self.values)

    def holds(self, published: float) -> bool:
        """Whether the published number could be one of these, to the digits that it is printed with."""
        return self.low - HALF_A_DIGIT <= published <= self.high + HALF_A_DIGIT


@dataclass(frozen=True)
class Cell:
    """One row and its final runs, one a seed, in the order of the seeds. `runs` may be empty."""

    row: Row
    runs: tuple[TrialRecord, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def whole(self) -> Metric | None:
        """The mean loss over the whole test set."""
        if not self.runs:
            return None
        values = [_test(run, "loss") for run in self.runs]
        ends = [_test(run, "error") * NORMAL for run in self.runs]
        pairs = list(zip(values, ends, strict=True))
        low, high = min(_less(v, e) for v, e in pairs), max(v + e for v, e in pairs)
        return Metric(tuple(values), low, high, self.seeds)

    @property
    def last(self) -> Metric | None:
        """The paper's metric: the mean loss over the last batch of a shuffled pass."""
        if not self.runs:
            return None
        lows, highs = ([_test(run, end) for run in self.runs] for end in ("last_low", "last_high"))
        return Metric(tuple(_test(run, "last") for run in self.runs), min(lows), max(highs), self.seeds)

    @property
    def accuracy(self) -> float | None:
        """The median over the seeds, a run that diverged counting as 0."""
        scores = [run.test.accuracy or 0.0 if run.test is not None else 0.0 for run in self.runs]
        return median(scores) if scores else None

    @property
    def zero(self) -> float | None:
        """In what share of shuffles the paper's metric prints as 0.000: the mean over the seeds."""
        shares = [(run.test.further.get("zero") or 0.0) if run.test is not None else 0.0 for run in self.runs]
        return sum(shares) / len(shares) if shares else None


def _test(run: TrialRecord, name: str) -> float:
    if run.test is None:
        return inf
    found = run.test.loss if name == "loss" else run.test.further.get(name)
    return inf if found is None else found


def _less(value: float, error: float) -> float:
    return inf if value == inf else value - error


def cells(results: Results, table: Sequence[Row], suffix: str = "") -> tuple[Cell, ...]:
    """A cell for each row, from the final runs under its name (with `suffix` after it) that came to an end."""
    return tuple(Cell(row, _finals(results, row.name + suffix)) for row in table)


def _finals(results: Results, name: str) -> tuple[TrialRecord, ...]:
    return tuple(run for run in finals(results.trials, name) if run.status in ("finished", "diverged"))


def as_published(results: Results, table: Sequence[Row]) -> bool:
    """Whether the runs are of MNIST and of the published length; a run that diverged has stopped before its end."""
    lengths = {run.steps for cell in cells(results, table) for run in cell.runs if run.status == "finished"}
    return "Mnist(" in results.study.task and lengths <= {row.epochs * STEPS_PER_EPOCH for row in table}


def verdict(row: Row, mine: Metric | None, rivals: Metric | None, published: bool = True) -> Verdict:
    """The verdict on a row, from one metric of it and the same of its rival; None where one was not run.

    published: whether the runs are as published. The rules stand at the head of this file.
    """
    if mine is None or rivals is None or not published:
        return Verdict.NONE
    forward, backward = (mine, rivals) if row.gradient == "forward" else (rivals, mine)
    shared = forward.by_seed.keys() & backward.by_seed.keys()
    if not shared or not all(backward.by_seed[seed] < forward.by_seed[seed] for seed in shared):
        return Verdict.NOT
    return Verdict.BOTH if mine.holds(row.loss) else Verdict.DIRECTION


def times_faster(forward: Cell, backward: Cell) -> tuple[float, bool] | None:
    """By what factor backprop is earlier at the training loss with which the forward gradient ends; None where either
    did not finish, or it never is. The median over the seeds, and whether it is a lower bound: there already at the
    first point of the curve."""
    found, rivals = [], {run.seed: run for run in backward.runs}
    for f, b in ((run, rivals[run.seed]) for run in forward.runs if run.seed in rivals):
        losses = [loss for loss in f.curve.loss if loss is not None]
        if f.status != "finished" or not losses:
            return None
        points = zip(b.curve.step, b.curve.loss, strict=True)
        at = next((step for step, loss in points if loss is not None and loss <= losses[-1]), None)
        if at is None:
            return None
        found.append((f.curve.step[-1] / at, at == b.curve.step[0]))
    return sorted(found)[len(found) // 2] if found else None
