"""The claims of Baydin et al. (2022) with the evidence of recorded runs and paired times.

Time to a common loss, per seed: both runs of a seed start at the same weights and see the same batches. The common
loss is the higher one of their lowest validation losses, so both reach it. Each reaches it at its first evaluation
with that loss or a lower one. The ratio of the steps, times the paired ratio of the times of a step, is the ratio of
the times. A run that diverged, or whose loss is never below that of guessing, never reaches it. A seed for which this
is true of both runs shows nothing about the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from statistics import fmean

from gradcost.papers.baydin2022.speed import StepTimes
from gradcost.papers.baydin2022.table import (
    ABSTRACT,
    BACKPROP,
    FORWARD,
    Experiment,
    experiments,
    tuned_method,
)
from gradcost.papers.claims import Claim, Evidence, Published
from gradcost.results.guessing import guessing_loss
from gradcost.results.records import Results, TrialRecord
from gradcost.results.tuning import completed_finals

TIME = "ratio of the times to a common validation loss, forward gradient / backprop"
STEP = "ratio of the times of a training step, forward gradient / backprop, in turn in one process"
GAP = "final validation loss of the forward gradient minus that of backprop, in nats"

Pair = tuple[TrialRecord, TrialRecord]  # forward gradient, backprop


def pairs(results: Results, forward: str, backprop: str) -> dict[int, Pair]:
    """Return the final runs that finished or diverged, of two methods, for the seeds that both have."""
    one, other = (_by_seed(results, method) for method in (forward, backprop))
    return {seed: (one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())}


def _by_seed(results: Results, method: str) -> dict[int, TrialRecord]:
    return {run.seed: run for run in completed_finals(results.trials, method)}


def step_ratio(pair: Pair, guessing: float | None) -> float | None:
    """Return the steps of the forward gradient to the common loss, divided by those of backprop.

    Args:
        pair: the runs of one seed.
        guessing: the loss of guessing. None: not known, so every run that did not diverge learned.
    Returns:
        The ratio. inf if only backprop learned, 0 if only the forward gradient did, None if neither did. A run
        learned if it did not diverge and its validation loss was below that of guessing at least once.
    """
    limit = inf if guessing is None else guessing
    learned = [run.status == "finished" and any(loss < limit for _, loss in _losses(run)) for run in pair]
    if not all(learned):
        return (0.0 if learned[0] else inf) if any(learned) else None
    common = max(min(loss for _, loss in _losses(run)) for run in pair)
    forward, backprop = (next(step for step, loss in _losses(run) if loss <= common) for run in pair)
    return forward / backprop


def _losses(run: TrialRecord) -> list[tuple[int, float]]:
    """The evaluated steps with their validation losses, without the initial weights."""
    points = zip(run.curve.validation_step, run.curve.validation_loss, strict=True)
    return [(step, loss) for step, loss in points if loss is not None and step > 0]


def loss_gap(pair: Pair) -> float | None:
    """Return the final validation loss of the forward gradient minus that of backprop.

    Returns:
        The difference; infinite if one run diverged, None if both did.
    """
    forward, backprop = (
        run.validation.loss if run.validation is not None and run.status == "finished" else None for run in pair
    )
    if forward is None:
        return None if backprop is None else inf
    return -inf if backprop is None else forward - backprop


def claims(
    results: Results, times: Mapping[int, StepTimes], rows: str, command: str, records: str
) -> Iterator[tuple[Claim, Evidence]]:
    """Yield each claim about one model with its evidence.

    Args:
        results: the records of the study.
        times: the paired times by seed.
        rows: the model.
        command: the command that ran the study.
        records: the folder of the records, or a link to it.
    """
    task, published_steps = results.study.task, experiments(rows)[0].steps
    is_mnist = "Mnist(" in task and "FashionMnist(" not in task

    def evidence(found: Mapping[int, Pair], values: Sequence[float], note: str = "") -> Evidence:
        length = max((run.steps for pair in found.values() for run in pair), default=0)
        is_reduced = not is_mnist or length < published_steps
        scale = f"{length:,} of {published_steps:,} steps, `{task}`"
        return Evidence(tuple(values), command, records, scale, is_reduced, note)

    def measured(found: Mapping[int, Pair]) -> tuple[list[float], str]:
        """The ratio of the times to the common loss for the seeds with paired times, and a note on the others."""
        steps = {seed: step_ratio(pair, guessing_loss(results.study.chance)) for seed, pair in found.items()}
        known = {seed: ratio for seed, ratio in steps.items() if ratio is not None}
        neither = [seed for seed in steps if seed not in known]
        values = [ratio * times[seed].ratio for seed, ratio in known.items() if seed in times]
        return values, _left_out(neither, "neither run learned")

    for experiment in experiments(rows):
        found = pairs(results, experiment.method(FORWARD), experiment.method(BACKPROP))
        yield _time_claim(experiment), evidence(found, *measured(found))
        if experiment.gap is not None:
            gaps = {seed: loss_gap(pair) for seed, pair in found.items()}
            note = _left_out([seed for seed, gap in gaps.items() if gap is None], "both runs diverged")
            known = [gap for gap in gaps.values() if gap is not None]
            yield _gap_claim(experiment, experiment.gap), evidence(found, known, note)
    ratios = tuple(each.ratio for each in times.values())
    scale = f"{sum(each.rounds for each in times.values())} paired steps, `{task}`"
    yield _cost_claim(rows), Evidence(ratios, command, records, scale, not is_mnist, _cost_note(times))
    found = pairs(results, tuned_method(FORWARD, rows), tuned_method(BACKPROP, rows))
    ratios, note = measured(found)
    yield _tuned_claim(rows), evidence(found, ratios, f"{_tuned_rates(found)} {note}".strip())


def _left_out(seeds: Sequence[int], reason: str) -> str:
    return f"Not counted, because {reason}: seed {', '.join(map(str, seeds))}." if seeds else ""


def _time_claim(experiment: Experiment) -> Claim:
    if experiment.times is None:
        words = "With one learning rate for both, forward gradients train up to twice as fast as backprop."
        published, location = Published(*ABSTRACT), "abstract"
    else:
        forward, backprop = experiment.times
        words = (
            f"With the learning rate {experiment.lr:g} for both, the forward gradient needs {forward:g} s and "
            f"backprop {backprop:g} s to a common validation loss."
        )
        published, location = Published(round(forward / backprop, 3), rounding=0.0005), _figure(experiment)
    return Claim(f"{experiment.name}: time to a common loss", words, location, TIME, published, 1.0, is_ratio=True)


def _figure(experiment: Experiment) -> str:
    if experiment.rows == "logistic":
        return "figure of logistic regression"
    return f"Figure 4, learning rate {experiment.lr:g}"


def _gap_claim(experiment: Experiment, gap: float) -> Claim:
    outcome = "fall alike" if gap == 0 else "differ, and that of the forward gradient falls faster"
    return Claim(
        f"{experiment.name}: loss",
        f"With the learning rate {experiment.lr:g} for both, the losses by step {outcome}.",
        _figure(experiment),
        GAP,
        Published(gap, rounding=experiment.precision),
        None if gap == 0 else 0.0,
    )


def _cost_claim(rows: str) -> Claim:
    name, words = (
        f"{rows}: time of a step",
        "A step with the forward gradient takes less time than one with backprop.",
    )
    costs = [each.costs for each in experiments(rows) if each.costs is not None]
    if not costs:
        return Claim(name, words, "abstract", STEP, Published(*ABSTRACT), 1.0, is_ratio=True)
    ratios = [ratio for _, _, ratio in costs]
    location = "Figure 4: " + "; ".join(f"R_f = {forward:g}, R_b = {backprop:g}" for forward, backprop, _ in costs)
    return Claim(
        name, words, location, STEP, Published(min(ratios), max(ratios), rounding=0.0005), 1.0, is_ratio=True
    )


def _cost_note(times: Mapping[int, StepTimes]) -> str:
    if not times:
        return ""
    forward, backprop = (fmean(column) for column in zip(*(each.costs for each in times.values()), strict=True))
    return f"Here R_f = {forward:.2f} and R_b = {backprop:.2f}, means over seeds."


def _tuned_claim(rows: str) -> Claim:
    return Claim(
        f"{rows}: time to a common loss, each tuned",
        "Forward gradients train up to twice as fast as backprop. Here each gradient has its own learning rate, from "
        "a tuning with equal effort; the paper does not tune.",
        "abstract",
        TIME,
        Published(*ABSTRACT),
        1.0,
        is_ratio=True,
    )


def _tuned_rates(found: Mapping[int, Pair]) -> str:
    if not found:
        return ""
    forward, backprop = next(iter(found.values()))
    return f"Tuned learning rates: forward gradient {forward.lr:g}, backprop {backprop.lr:g}."
