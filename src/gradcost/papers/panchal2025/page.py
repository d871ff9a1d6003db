"""The Markdown page on Panchal et al. 2025: the headline claims, and what every method reached, from the records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from statistics import median

from gradcost.core.units import count, number
from gradcost.papers.claims import Evidence, Glance, claims_page, format_interval, markdown_table
from gradcost.papers.panchal2025.headline import (
    ACCURACY,
    CHECKPOINTED,
    COMPUTATIONS,
    CONVERGENCE,
    FORWARD_ONLY,
    values,
)
from gradcost.papers.panchal2025.methods import TITLE
from gradcost.papers.panchal2025.study import AS_CODED, Length, Reproduction
from gradcost.results.records import Cost, Results, TrialRecord
from gradcost.results.targets import Target
from gradcost.results.tuning import final_rate, finals
from gradcost.results.wording import DASH, percent, size

HEADERS = (
    "method",
    "forwards per step",
    "steps",
    "learning rate",
    "test accuracy",
    "step at target",
    "FLOPs",
    "memory",
)


def page(results: Results, reproduction: Reproduction, lengths: Sequence[Length], command: str, folder: str) -> str:
    """Return the page as Markdown.

    Args:
        results: the records of a results folder.
        reproduction: the settings of the study.
        lengths: the cost of a step of every method (`Reproduction.lengths`).
        command: the command that writes the page.
        folder: the name of the results folder, or a link to it.
    """
    forwards = {each.name: each.forwards for each in lengths}
    found = values(results.trials, forwards)
    scale = f"{reproduction.forwards:g} forward passes per run, {count(len(found[ACCURACY.name]), 'seed')}"
    missing = f"{CHECKPOINTED} did not reach the target" if found[ACCURACY.name] else "not run"
    shown = [
        (claim, Evidence(found[claim.name], command, folder, scale, is_reduced=True, note=note, missing=missing))
        for claim, note in ((ACCURACY, _ACCURACY), (CONVERGENCE, _CONVERGENCE), (COMPUTATIONS, _COMPUTATIONS))
    ]
    title = "Panchal et al. 2025: what the headline claims are worth here"
    return claims_page(title, _glance(results, reproduction), shown, list(_sections(results, reproduction, lengths)))


def table_rows(results: Results, lengths: Sequence[Length]) -> list[list[str]]:
    """Return the cells of the table whose columns are HEADERS.

    Args:
        results: the records of a results folder.
        lengths: the cost of a step of every method.
    """
    forwards = {each.name: each.forwards for each in lengths}
    base = {run.seed: run for run in finals(results.trials, CHECKPOINTED)}
    costs = {cost.method: cost for cost in results.costs}
    rows = []
    for each in lengths:
        runs = finals(results.trials, each.name)
        rows.append(
            [each.name, f"{each.forwards:.2f}", f"{each.steps:,}", final_rate(results, each.name)]
            + [_accuracy(runs), _steps(runs), _flops(runs, base, each, forwards.get(CHECKPOINTED))]
            + [_memory(costs.get(each.name))]
        )
    return rows


def _glance(results: Results, reproduction: Reproduction) -> Glance:
    scope = (
        f"*{TITLE}*. {count(len(reproduction.methods), 'method')} on `{reproduction.task!r}`. Each run has the FLOPs "
        f"of {reproduction.forwards:g} forward passes. Every method has "
        f"{count(len(reproduction.rates) + reproduction.more, 'learning rate')}, chosen on the validation split. The "
        "paper's models and data sets are larger, and were not run."
    )
    hours = sum(run.seconds or 0.0 for run in results.trials) / 3600
    environment = ", ".join(f"{name} {version}" for name, version in results.environment.items() if name != "command")
    return Glance(scope, environment, hours)


def _sections(results: Results, reproduction: Reproduction, lengths: Sequence[Length]) -> Iterator[str]:
    """Yield the parts of the page after its claims."""
    yield "## Method by method"
    yield markdown_table(HEADERS, table_rows(results, lengths))
    yield "\n".join(
        (
            f"- The target is a validation accuracy of {percent(reproduction.target)}. A run reaches it at its first "
            "evaluation with at least this accuracy.",
            "- Step at target: the Kaplan-Meier median over seeds. A run that does not reach the target needs more "
            "than its steps.",
            f"- FLOPs: those until the target, as a ratio to {CHECKPOINTED}, paired by seed.",
            "- Memory: the most bytes of one step at once, beyond the weights and the batch.",
            "- A learning rate with an asterisk is an edge of the grid: a better rate may lie beyond it.",
        )
    )
    yield from _common_loss_section(results, lengths)
    coded = [method for method in reproduction.named() if method.as_coded is not None]
    if coded:
        yield "## What the public code computes"
        yield f"A name that ends in `{AS_CODED}` is the estimate of the paper's public code, where it differs:"
        yield "\n".join(f"- {method.name}: {method.difference}" for method in coded)
    yield "## What this scale cannot tell"
    tried = [
        run for each in lengths if each.name.startswith(FORWARD_ONLY) for run in finals(results.trials, each.name)
    ]
    if tried and all(run.reached is None for run in tried):
        yield (
            f"No run without backprop reached the target within {reproduction.forwards:g} forward passes. So, at the "
            "learning rates tried, the ratios are lower bounds, and how many more computations the target would take "
            f"is not known. {_from_start_to_end(tried)}"
        )
    yield (
        "The paper trains models of 110 million to 13 billion weights with 64 to 512 tokens per example. Memory and "
        "FLOPs of such models follow from their shapes (`gradcost plan`). Accuracy and steps to a target do not: the "
        "variance of a forward gradient and of a finite difference grows with the number of trained weights, so "
        "these results do not transfer to larger adapters or to full fine-tuning."
    )


def _from_start_to_end(runs: Sequence[TrialRecord]) -> str:
    """Return the ranges of the first and the last validation accuracy of some runs, as a sentence."""
    curves = [zip(run.curve.validation_step, run.curve.validation_accuracy, strict=False) for run in runs]
    scored = [[(step, score) for step, score in curve if score is not None] for curve in curves]
    ends = [(curve[0], curve[-1]) for curve in scored if curve]
    if not ends:
        return ""
    after = count(max(step for (step, _), _ in ends), "step")
    first, last = _between([score for (_, score), _ in ends]), _between([score for _, (_, score) in ends])
    return f"Their validation accuracy is {first} after {after} and {last} at the end."


def _between(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


def common_loss(results: Results) -> float | None:
    """Return the least validation loss that every final run reaches; None without final runs of two methods."""
    methods = [
        runs for name in dict.fromkeys(run.method for run in results.trials) if (runs := finals(results.trials, name))
    ]
    lows = [[loss for loss in run.curve.validation_loss if loss is not None] for runs in methods for run in runs]
    return max(map(min, lows)) if len(methods) > 1 and all(lows) else None


def common_loss_rows(results: Results, lengths: Sequence[Length]) -> list[list[str]]:
    """Return (method, step, FLOPs as a ratio to CHECKPOINTED) at the common loss.

    Empty if there is none, or if a run without backprop has it after one step.
    """
    loss = common_loss(results)
    if loss is None:
        return []
    target = Target("loss", loss)
    steps = {each.name: {run.seed: target.step(run) for run in finals(results.trials, each.name)} for each in lengths}
    forwards = {each.name: each.forwards for each in lengths}
    base = {seed: step * forwards[CHECKPOINTED] for seed, step in steps.get(CHECKPOINTED, {}).items()}
    if any(step <= 1 for name, found in steps.items() if name.startswith(FORWARD_ONLY) for step in found.values()):
        return []  # no fall: the loss of the start
    rows = []
    for name, found in steps.items():
        if found:
            ratios = [step * forwards[name] / base[seed] for seed, step in found.items() if base.get(seed)]
            rows.append(
                [name, f"{median(found.values()):g}", format_interval(ratios, is_ratio=True) if ratios else DASH]
            )
    return rows


def _common_loss_section(results: Results, lengths: Sequence[Length]) -> Iterator[str]:
    rows = common_loss_rows(results, lengths)
    if rows:
        yield "## To a loss that every run reaches"
        yield (
            f"A validation loss of {common_loss(results):.3g}, the least one that every final run reaches. *Step*: "
            f"the first evaluated one, the median over seeds. *FLOPs*: as a ratio to {CHECKPOINTED}, paired by seed. "
            "A step is known to one step or to a quarter of it, whichever is more."
        )
        yield markdown_table(("method", "step", "FLOPs"), rows)


def _accuracy(runs: Sequence[TrialRecord]) -> str:
    scores = [_test_accuracy(run) for run in runs]
    return format_interval([100 * score for score in scores], missing=DASH, bounds=(0.0, 100.0))


def _test_accuracy(run: TrialRecord) -> float:
    return (run.test.accuracy or 0.0) if run.test is not None else 0.0


def _steps(runs: Sequence[TrialRecord]) -> str:
    if not runs:
        return DASH
    steps = sorted(inf if run.reached is None else run.reached for run in runs)
    middle = steps[(len(steps) - 1) // 2]
    reached = sum(map(isfinite, steps))
    return f"{middle:,.0f}" if isfinite(middle) else f"not reached ({reached} of {len(steps)})"


def _flops(runs: Sequence[TrialRecord], base: Mapping[int, TrialRecord], each: Length, unit: float | None) -> str:
    pairs = [(run.reached, base[run.seed].reached) for run in runs if run.seed in base]
    if unit is None or not pairs or any(other is None for _, other in pairs):
        return DASH
    ratios = [inf if own is None else own * each.forwards / (other * unit) for own, other in pairs if other]
    known = [ratio for ratio in ratios if isfinite(ratio)]
    if len(known) < len(ratios):
        least = each.steps * each.forwards / max(other * unit for _, other in pairs if other)
        return f"above {number(least, 2)} ({len(ratios) - len(known)} of {len(ratios)} runs)"
    return format_interval(ratios, is_ratio=True)


def _memory(cost: Cost | None) -> str:
    return DASH if cost is None or cost.peak_bytes is None else size(cost.peak_bytes)


_ACCURACY = "The interval is over seeds; each value is the largest difference over methods for one seed."
_CONVERGENCE = "100% means that a method did not reach the target within its FLOPs."
_COMPUTATIONS = (
    "Infinite: a method did not reach the target within its FLOPs. The table has the ratio that it exceeds."
)
