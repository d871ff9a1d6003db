"""The claims of Rike and Foerland's paper, and what our runs show about each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isfinite, log
from statistics import median

from gradcost.core.units import count
from gradcost.papers.claims import Claim, Evidence, Published
from gradcost.papers.intervals import Between, Measured
from gradcost.papers.rike2022.printed import PRINTED
from gradcost.papers.rike2022.runs import RowResult, is_published_setup, row_results
from gradcost.papers.rike2022.speed import DEFINITIONS, Definition, ratio
from gradcost.papers.rike2022.table import UNCAPPED_SUFFIX, TableRow, counterpart
from gradcost.results.guessing import guessing_loss
from gradcost.results.records import Results, TrialRecord

HALF_A_DIGIT = 0.0005  # half a unit in the last digit of the losses in Table 1
TEN_CLASSES = log(10)  # the loss of guessing in the paper's tasks


def pairs(results: Sequence[RowResult]) -> list[tuple[RowResult, RowResult]]:
    """Return (forward gradient, backprop) for each optimizer.

    Args:
        results: the rows with their runs. The counterpart of each row must be among them.
    """
    by_row = {result.row: result for result in results}
    return [(result, by_row[counterpart(result.row)]) for result in results if result.row.gradient == "forward"]


def paired_runs(forward: RowResult, backprop: RowResult) -> list[tuple[TrialRecord, TrialRecord]]:
    """Return the runs of two rows with equal seeds."""
    others = {run.seed: run for run in backprop.runs}
    return [(run, others[run.seed]) for run in forward.runs if run.seed in others]


def free_runs(records: Results, table: Sequence[TableRow]) -> list[RowResult]:
    """Return the forward rows with runs that have no cap: those of the study without a cap, and rows without one."""
    found = []
    for row in (row for row in table if row.gradient == "forward"):
        (free,) = row_results(records, [row], UNCAPPED_SUFFIX)
        (own,) = row_results(records, [row])
        has_cap = any("Clipped" in run.estimator for run in own.runs)
        found.append(free if free.runs or has_cap else own)
    return [result for result in found if result.runs]


def claims(records: Results, table: Sequence[TableRow], command: str, folder: str) -> list[tuple[Claim, Evidence]]:
    """Return each claim of the paper with the evidence of a results folder.

    Args:
        records: the records of the folder.
        table: the rows of Table 1 to report.
        command: the command that runs the experiments.
        folder: the name of the folder.
    """
    results = row_results(records, table)
    is_reduced, guessing = not is_published_setup(records, table), guessing_loss(records.study.chance)

    def evidence(values: Sequence[Measured], note: str = "", missing: str = "not run") -> Evidence:
        steps = max((run.steps for result in results for run in result.runs), default=0)
        scale = f"{steps:,} steps per run, {len(values)} seed{'' if len(values) == 1 else 's'}"
        return Evidence(tuple(values), command, folder, scale, is_reduced, note, missing)

    def beside_guessing(result: RowResult) -> list[float]:
        return [] if guessing is None else [loss / guessing for loss in _test_losses(result)]

    found = [(_BETTER, evidence(_loss_ratios(results), "Per seed: the least ratio over the optimizers."))]
    found += [(_size_claim(result), evidence(_test_losses(result))) for result in results]
    if table[0].dataset == "mnist":
        found.append((_ZERO, evidence(_largest_losses(results), "Per seed: the largest loss over the optimizers.")))
    else:
        found.append((_FAILS, evidence([loss for result in results[:1] for loss in beside_guessing(result)])))
    for definition in DEFINITIONS:
        ratios = _speed_ratios(results, definition, guessing)
        note = "Per seed: the median over the optimizers. The table below has each ratio and its range."
        if any(isinstance(value, Between) for value in ratios):
            note += " Only bounds are known where a run does not reach the loss, or backprop at its first point."
        left_out = len(_seeds(results)) - len(ratios)
        if ratios and left_out:
            note += f" Left out: {count(left_out, 'seed')}, in which a ratio has no bounds."
        note = (
            note if ratios else "In every seed there is a pair of runs that does not fall by 1% or reach this loss."
        )
        missing = "not reached" if all(result.runs for result in results) else "not run"
        found.append((_speed_claim(definition), evidence(ratios, note, missing)))
    for result in free_runs(records, table):
        note = _printed_without_cap(result.row)
        found.append((_explosion_claim(result.row), evidence(beside_guessing(result), note)))
    return found


_BETTER = Claim(
    "Backprop beats the forward gradient",
    "The test loss of backprop is lower than that of the forward gradient, whatever the optimizer.",
    "section IV and Table 1",
    "ratio of test losses on the whole test set, forward gradient to backprop",
    Published(1.0, inf),
    reference=1.0,
    is_ratio=True,
)
_ZERO = Claim(
    "Backprop reaches a test loss of zero",
    'All networks trained with backprop on MNIST "converge to zero loss".',
    "section IV and Table 1",
    "test loss of backprop on the whole test set, in nats",
    Published(0.0, rounding=HALF_A_DIGIT),
)

_FAILS = Claim(
    "The forward gradient fails on CIFAR-10",
    "On CIFAR-10 the forward gradient fails to learn: its loss explodes after about 40,000 iterations.",
    "sections IV and V, Figure 1",
    "ratio of the final test loss to that of guessing",
    Published(1.0, inf),
    reference=1.0,
    is_ratio=True,
)


def _size_claim(result: RowResult) -> Claim:
    printed = PRINTED[result.row.name]
    return Claim(
        f"Test loss of {result.row.name}",
        f"Table 1 has {result.row.loss:.3f}, a mean over 16 images. The notebook prints 16-image means after every "
        "epoch; the published number here is the mean of the last ten.",
        f"{printed.notebook}, cell {printed.cell}",
        "test loss on the whole test set, in nats",
        Published(printed.mean, error=result.printed_error),
    )


def _speed_claim(definition: Definition) -> Claim:
    return Claim(
        f"Backprop converges 2 to 4 times faster: {definition.name}",
        "Backprop converges 2 to 4 times faster. The paper does not define convergence; here a run has converged at: "
        f"{definition.name}.",
        "section V",
        "ratio of training steps, forward gradient to backprop",
        Published(2.0, 4.0),
        reference=1.0,
        is_ratio=True,
    )


def _explosion_claim(row: TableRow) -> Claim:
    return Claim(
        f"Without a cap, {row.name} explodes",
        'Forward gradients explode without a cap on the slope: "in all our models".',
        "section V",
        "ratio of the final test loss, without a cap, to that of guessing",
        Published(1.0, inf),
        reference=1.0,
        is_ratio=True,
    )


def _printed_without_cap(row: TableRow) -> str:
    """Return what the notebooks printed for the same row without a cap; empty if they have no such run."""
    name = row.name + UNCAPPED_SUFFIX if row.name + UNCAPPED_SUFFIX in PRINTED else row.name
    if name == row.name and row.optimizer != "adam":
        return ""
    printed = PRINTED[name]
    ratios = f"{printed.mean / TEN_CLASSES:.2f}, mean of the last ten epochs; largest {max(printed.losses):.2f} nats"
    return f"The notebook's own run without a cap ({printed.notebook}, cell {printed.cell}) has {ratios}."


def _test_losses(result: RowResult) -> tuple[float, ...]:
    return () if result.test_loss is None else result.test_loss.values


def _by_seed(results: Sequence[RowResult]) -> Iterator[dict[int, float]]:
    """Yield the test loss of each row by seed; nothing if a row has no runs."""
    yield from ({} if result.test_loss is None else result.test_loss.by_seed for result in results)


def _loss_ratios(results: Sequence[RowResult]) -> list[float]:
    """Return the least ratio over the optimizers for each seed with all runs. A pair that diverged has no ratio."""
    ratios: dict[int, list[float | None]] = {}
    compared = pairs(results)
    for forward, backprop in compared:
        (ours,), (theirs,) = _by_seed([forward]), _by_seed([backprop])
        for seed in ours.keys() & theirs.keys():
            ratios.setdefault(seed, []).append(_quotient(ours[seed], theirs[seed]))
    complete = [found for _, found in sorted(ratios.items()) if len(found) == len(compared)]
    known = [[value for value in found if value is not None] for found in complete]
    return [min(found) for found in known if found]


def _quotient(ours: float, theirs: float) -> float | None:
    if isfinite(theirs):
        return ours / theirs
    return 0.0 if isfinite(ours) else None


def _largest_losses(results: Sequence[RowResult]) -> list[float]:
    losses = list(_by_seed([result for result in results if result.row.gradient == "backprop"]))
    seeds = sorted(set.intersection(*(set(found) for found in losses)))
    return [max(found[seed] for found in losses) for seed in seeds]


def _speed_ratios(results: Sequence[RowResult], definition: Definition, guessing: float | None) -> list[Measured]:
    """Return the median over the optimizers for each seed in which all have a ratio."""
    ratios: dict[int, list[Between]] = {}
    compared = pairs(results)
    for forward, backprop in compared:
        for ours, theirs in paired_runs(forward, backprop):
            found = ratio(ours, theirs, definition, guessing)
            if found is not None:
                value = found.value
                ends = value if isinstance(value, Between) else Between(value, value)
                ratios.setdefault(ours.seed, []).append(ends)
    complete = [found for _, found in sorted(ratios.items()) if len(found) == len(compared)]
    medians = [Between(median(low for low, _ in found), median(high for _, high in found)) for found in complete]
    return [ends.low if ends.low == ends.high else ends for ends in medians]


def _seeds(results: Sequence[RowResult]) -> set[int]:
    return {run.seed for result in results for run in result.runs}
