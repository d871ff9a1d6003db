"""Compare runs with Rike and Foerland's Table 1. The verdicts depend only on the records and the table.

Each row has two metrics: the mean loss over the whole test set, and the paper's metric, which is the mean loss over
the last batch of a shuffled pass. The counterpart of a row has the other gradient and the same optimizer. Rules for
each metric:

- Direction: backprop's loss is below that of the forward gradient with the same optimizer, for every seed that both
  have. The loss of a run that diverged is infinite.
- Size: the published number is in the interval of the metric, after both ends move outwards by half a unit in
  the last printed digit.
- Interval of the paper's metric: from the 5% to the 95% quantile over 1,000 shuffles.
- Interval of the whole test set: the mean loss, minus and plus 1.96 standard errors.
- Interval over several seeds: from the smallest low end to the largest high end.

The verdict is "direction and size" if both rules hold, "direction only" if only the first holds, and "not reproduced"
if the first fails. The verdict is "none" if a row or its counterpart was not run with the published setup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from statistics import median

from gradcost.papers.rike2022.table import DECIMALS, STEPS_PER_EPOCH, TableRow
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import finals

HALF_A_DIGIT = 0.5 * 10**-DECIMALS
STANDARD_ERRORS = 1.96  # half the width of a 95% interval of a normal variable


class Verdict(Enum):
    """Whether a published number was reproduced; the docstring of this module has the rules."""

    DIRECTION_AND_SIZE = "direction and size"
    DIRECTION_ONLY = "direction only"
    NOT_REPRODUCED = "not reproduced"
    NONE = "none"


@dataclass(frozen=True)
class Metric:
    """One metric of one row over its seeds.

    Args:
        values: one value per seed; inf for a run that diverged.
        low: the low end of the interval over all seeds.
        high: the high end of the same interval.
        seeds: the seed of each value. Empty means 1, 2, ...
    """

    values: tuple[float, ...]
    low: float
    high: float
    seeds: tuple[int, ...] = ()

    @property
    def by_seed(self) -> dict[int, float]:
        """The value of each seed."""
        return dict(zip(self.seeds or range(1, len(self.values) + 1), self.values, strict=True))

    @property
    def median(self) -> float:
        return median(self.values)

    def covers(self, published: float) -> bool:
        """Return whether the interval, widened by half a unit in the last printed digit, has the published number."""
        return self.low - HALF_A_DIGIT <= published <= self.high + HALF_A_DIGIT


@dataclass(frozen=True)
class RowResult:
    """One row of Table 1 and its final runs.

    Args:
        row: the row of Table 1.
        runs: one run per seed, sorted by seed; empty if the row was not run.
    """

    row: TableRow
    runs: tuple[TrialRecord, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def test_loss(self) -> Metric | None:
        """The mean loss over the whole test set; None without runs."""
        if not self.runs:
            return None
        values = [_test_score(run, "loss") for run in self.runs]
        margins = [_test_score(run, "error") * STANDARD_ERRORS for run in self.runs]
        pairs = list(zip(values, margins, strict=True))
        low = min(inf if value == inf else value - margin for value, margin in pairs)
        high = max(value + margin for value, margin in pairs)
        return Metric(tuple(values), low, high, self.seeds)

    @property
    def last_batch_loss(self) -> Metric | None:
        """The paper's metric: the mean loss over the last batch of a shuffled pass; None without runs."""
        if not self.runs:
            return None
        lows, highs = ([_test_score(run, end) for run in self.runs] for end in ("last_low", "last_high"))
        return Metric(tuple(_test_score(run, "last") for run in self.runs), min(lows), max(highs), self.seeds)

    @property
    def accuracy(self) -> float | None:
        """The median test accuracy over the seeds; None without runs. A run that diverged has accuracy 0."""
        scores = [run.test.accuracy or 0.0 if run.test is not None else 0.0 for run in self.runs]
        return median(scores) if scores else None

    @property
    def zero_share(self) -> float | None:
        """The fraction of shuffles whose last-batch loss prints as 0.000, averaged over seeds; None without runs."""
        shares = [(run.test.further.get("zero") or 0.0) if run.test is not None else 0.0 for run in self.runs]
        return sum(shares) / len(shares) if shares else None


def _test_score(run: TrialRecord, name: str) -> float:
    """Return a number of the run's test score; inf if it is missing, as for a run that diverged."""
    if run.test is None:
        return inf
    number = run.test.loss if name == "loss" else run.test.further.get(name)
    return inf if number is None else number


def row_results(results: Results, table: Sequence[TableRow], suffix: str = "") -> tuple[RowResult, ...]:
    """Return each row with its final runs that finished or diverged.

    Args:
        results: the records of a results folder.
        table: the rows of Table 1 to return.
        suffix: the method name of the runs is the name of the row plus this suffix.
    """
    return tuple(RowResult(row, _complete_finals(results, row.name + suffix)) for row in table)


def _complete_finals(results: Results, name: str) -> tuple[TrialRecord, ...]:
    """Return the final runs of a method that finished or diverged; failed runs are omitted."""
    return tuple(run for run in finals(results.trials, name) if run.status in ("finished", "diverged"))


def is_published_setup(results: Results, table: Sequence[TableRow]) -> bool:
    """Return whether the study trains on MNIST and each finished run had one of the table's numbers of steps."""
    lengths = {run.steps for result in row_results(results, table) for run in result.runs if run.status == "finished"}
    return "Mnist(" in results.study.task and lengths <= {row.epochs * STEPS_PER_EPOCH for row in table}


def verdict(row: TableRow, metric: Metric | None, other: Metric | None, published: bool = True) -> Verdict:
    """Return the verdict on a row; the docstring of this module has the rules.

    Args:
        row: the row of Table 1.
        metric: one metric of the row; None if the row was not run.
        other: the same metric of the counterpart; None if the counterpart was not run.
        published: whether the runs have the published setup. If False, the verdict is NONE.
    """
    if metric is None or other is None or not published:
        return Verdict.NONE
    forward, backward = (metric, other) if row.gradient == "forward" else (other, metric)
    shared = forward.by_seed.keys() & backward.by_seed.keys()
    if not shared or not all(backward.by_seed[seed] < forward.by_seed[seed] for seed in shared):
        return Verdict.NOT_REPRODUCED
    return Verdict.DIRECTION_AND_SIZE if metric.covers(row.loss) else Verdict.DIRECTION_ONLY


def speedup(forward: RowResult, backward: RowResult) -> tuple[float, bool] | None:
    """Return how many times earlier, in steps, backprop reaches the final training loss of the forward gradient.

    Returns:
        (factor, is_bound). factor: steps of the forward gradient / steps of backprop; with several seeds their upper
        median. is_bound: True if backprop reaches the loss at the first point of its curve, so that the factor is a
        lower bound.

        The result is None, not a pair, if no seed has both runs, a forward-gradient run did not finish, or a backprop
        run does not reach the loss.
    """
    factors, backprop_runs = [], {run.seed: run for run in backward.runs}
    for run in (run for run in forward.runs if run.seed in backprop_runs):
        curve = backprop_runs[run.seed].curve
        losses = [loss for loss in run.curve.loss if loss is not None]
        if run.status != "finished" or not losses:
            return None
        points = zip(curve.step, curve.loss, strict=True)
        reached_at = next((step for step, loss in points if loss is not None and loss <= losses[-1]), None)
        if reached_at is None:
            return None
        factors.append((run.curve.step[-1] / reached_at, reached_at == curve.step[0]))
    return sorted(factors)[len(factors) // 2] if factors else None
