"""The runs of each row of Table 1: test losses on the whole test set and by the paper's metric, over seeds.

The paper's metric is the mean loss over the last batch of a shuffled pass. Intervals of one run:

- whole test set: the mean loss, minus and plus 1.96 standard errors;
- the paper's metric: from the 5% to the 95% quantile over 1,000 shuffles.

The interval over several seeds goes from the smallest low end to the largest high end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import fmean, median, stdev

from gradcost.papers.claims import STANDARD_ERRORS
from gradcost.papers.rike2022.printed import LAST, PRINTED
from gradcost.papers.rike2022.protocols import protocol_of
from gradcost.papers.rike2022.table import TableRow
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import completed_finals

LAST_IMAGES = 16  # of the 10,000 test images: those in the last batch of 64
TASKS = {"mnist": "Mnist", "cifar10": "Cifar10"}  # the class of the task of a dataset


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
    def printed_error(self) -> float:
        """The standard error of the mean of the ten printed losses.

        It is the larger one of two estimates: from the spread of the ten, and from the spread of our losses over the
        test images, for a mean over 160 images. The first one alone would be 0 where all ten are printed as 0.
        """
        images = LAST * LAST_IMAGES
        spreads = [
            _test_score(run, "error") * sqrt(run.test.targets or 1) for run in self.runs if run.test is not None
        ]
        ours = [spread / sqrt(images) for spread in spreads if isfinite(spread)]
        return max(PRINTED[self.row.name].error, *ours, 0.0)

    @property
    def z(self) -> float | None:
        """Our mean test loss less that of the ten printed losses, in standard errors; None without runs.

        With several seeds, the error contains the spread between seeds once more, for the one seed of the paper.
        """
        if self.test_loss is None:
            return None
        values, printed = self.test_loss.values, PRINTED[self.row.name]
        if not all(map(isfinite, values)):
            return inf
        spread = stdev(values) * sqrt(1 + 1 / len(values)) if len(values) > 1 else None
        error = _test_score(self.runs[0], "error") if spread is None else spread
        return (fmean(values) - printed.mean) / sqrt(self.printed_error**2 + error**2)

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
    return tuple(RowResult(row, tuple(completed_finals(results.trials, row.name + suffix))) for row in table)


def is_published_setup(results: Results, table: Sequence[TableRow]) -> bool:
    """Return whether the study trains on the dataset of the rows, for the published number of epochs."""
    own = all(re.search(rf"\b{TASKS[row.dataset]}\(", results.study.task) for row in table)
    lengths = {run.steps for result in row_results(results, table) for run in result.runs if run.status == "finished"}
    return own and lengths <= {protocol_of(results).steps(row) for row in table}
