"""The Markdown page on Panchal et al. 2025: the headline claims, and what every method reached, from the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from statistics import median

from gradcost.core.units import count
from gradcost.papers.claims import LEAST_SEEDS, Claim, Evidence, Glance, claims_page, markdown_table
from gradcost.papers.intervals import Between, format_interval, measured_interval
from gradcost.papers.panchal2025.headline import (
    ACCURACY,
    CHECKPOINTED,
    COMPUTATIONS,
    CONVERGENCE,
    VANILLA,
    Found,
    compared,
    flops_ratio,
    is_compared,
)
from gradcost.papers.panchal2025.methods import TITLE
from gradcost.papers.panchal2025.study import AS_CODED, Length, Reproduction
from gradcost.results.records import Cost, Results, TrialRecord
from gradcost.results.targets import Target, evaluations
from gradcost.results.tuning import chosen, completed_finals, final_rate, scores
from gradcost.results.wording import DASH, percent, size
from gradcost.studies.task_info import constant_loss, majority
from gradcost.tasks.pretrained import Encoder
from gradcost.tasks.task import Task

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
    found = compared(results.trials, lengths)
    seeds = len(found[ACCURACY.name].values)
    scale = f"{reproduction.forwards:g} forward passes per run, {count(seeds, 'seed')}"
    missing = f"{CHECKPOINTED} did not reach the target" if seeds else "not run"
    shown = [
        (claim, Evidence(each.values, command, folder, scale, True, _note(claim, each), missing))
        for claim in (ACCURACY, CONVERGENCE, COMPUTATIONS)
        for each in [found[claim.name]]
    ]
    title = (
        f"Panchal et al. 2025: the headline claims on {type(reproduction.task).__name__}, "
        f"{reproduction.forwards:,g} forward passes per run"
    )
    return claims_page(title, _glance(results, reproduction), shown, list(_sections(results, reproduction, lengths)))


def table_rows(results: Results, lengths: Sequence[Length]) -> list[list[str]]:
    """Return the cells of the table whose columns are HEADERS.

    Args:
        results: the records of a results folder.
        lengths: the cost of a step of every method.
    """
    own = next((each for each in lengths if each.name == CHECKPOINTED), None)
    base = {run.seed: run for run in completed_finals(results.trials, CHECKPOINTED)}
    costs = {cost.method: cost for cost in results.costs}
    rows = []
    for each in lengths:
        runs = completed_finals(results.trials, each.name)
        rows.append(
            [each.name, f"{each.forwards:.2f}", f"{each.steps:,}", final_rate(results, each.name)]
            + [_accuracy(runs), _steps(runs), _flops(runs, base, each, own)]
            + [_memory(costs.get(each.name))]
        )
    return rows


def _glance(results: Results, reproduction: Reproduction) -> Glance:
    scope = (
        f"*{TITLE}*. {count(len(reproduction.methods), 'method')} on `{reproduction.task!r}`. Each run has the FLOPs "
        f"of {reproduction.forwards:g} forward passes. Every method has AdamW, no cap on its slopes, and "
        f"{_rates(results)}, constant during a run; the best accuracy on the validation split chose. The paper's "
        "models and data sets are larger, and were not run. Its abstract gives three maxima over its tasks "
        '"at comparable memory usage", and no definitions. The quantities below are our reading: percentage points, '
        "and steps and FLOPs to a target. Memory is in a table, and was not made equal."
    )
    return Glance.of(scope, results)


def _rates(results: Results) -> str:
    """Return how many learning rates the methods with final runs have tried, in words."""
    tried: dict[str, set[float]] = {run.method: set() for run in results.trials if run.phase == "final"}
    for run in results.trials:
        if run.phase == "tune" and run.method in tried:
            tried[run.method].add(run.lr)
    numbers = sorted(map(len, tried.values())) or [0]
    least, most = numbers[0], numbers[-1]
    return count(most, "learning rate") if least == most else f"{least} to {most} learning rates"


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
            f"- FLOPs: those until the target, as a ratio to {CHECKPOINTED}, paired by seed. A run that does not "
            "reach the target gives a bound.",
            "- Memory: the most bytes of one step at once, beyond the weights and the batch; a dash if it was not "
            "measured.",
            "- A learning rate with an asterisk is an edge of the grid: a better rate may lie beyond it.",
            *_one_gradient(results),
            *_other_choices(results, lengths),
            *_choices_by_loss(results, lengths),
            *_left_out(results, reproduction),
            *_sizes(reproduction),
            *_constant_answer(reproduction),
        )
    )
    yield from _common_loss_section(results, lengths, reproduction.task)
    coded = [method for method in reproduction.named() if method.as_coded is not None]
    if coded:
        yield "## What the public code computes"
        yield (
            f"A name that ends in `{AS_CODED}` is our reading of the public code's training functions for text "
            "classification (commit 8e47ca2), which was not run. Not imitated: a finite-difference step of 0.01, "
            "sparse weights chosen once per epoch, an adaptive direction per pair of adapter matrices, FmAD-SVRG "
            "setting the weights back to the snapshot at every step, its other direction at the snapshot in each "
            "epoch, and the noise of dropout in the correction of ZO-SVRG. It differs from the name as follows:"
        )
        yield "\n".join(f"- {method.name}: {method.difference}" for method in coded)
    yield "## What this scale cannot tell"
    tried = [run for each in lengths if is_compared(each.name) for run in completed_finals(results.trials, each.name)]
    if tried and all(run.reached is None for run in tried):
        yield (
            f"No run without backprop reached the target within {reproduction.forwards:g} forward passes. So, at the "
            "learning rates tried, the ratios are lower bounds, and how many more computations the target would take "
            f"is not known. {_from_start_to_end(tried)}"
        )
    if isinstance(getattr(reproduction.task, "model", None), Encoder):
        yield (
            "A new output layer is trained, without a prompt. MeZO's authors attribute its success to pretraining "
            "and task prompts, and train with plain SGD (Malladi et al. 2023). So this tests neither MeZO nor "
            "forward gradients in their best setting."
        )
    yield (
        "The paper trains models of 110 million to 13 billion weights. Memory and FLOPs of such models follow from "
        "their shapes (`gradcost plan`). Accuracy and steps to a target do not: the variance of a forward gradient "
        "and of a finite difference grows with the number of trained weights, so these results do not transfer to "
        "models with more of them."
    )


def _one_gradient(results: Results) -> Iterator[str]:
    """Yield a line if BP-Vanilla, which has the gradient of CHECKPOINTED, was tuned to another learning rate."""
    plain, own = (completed_finals(results.trials, name) for name in (VANILLA, CHECKPOINTED))
    if plain and own and plain[0].lr != own[0].lr and _steps(plain) != _steps(own):
        yield (
            f"- {VANILLA} and {CHECKPOINTED} have the same gradient; their steps to the target differ because tuning "
            f"chose {plain[0].lr:g} for the one and {own[0].lr:g} for the other. At {plain[0].lr:g} {CHECKPOINTED} "
            f"would reach the target at the steps of {VANILLA}, {_steps(plain)} instead of {_steps(own)} (medians), "
            "and the ratios to it would be other ones by this factor."
        )


def _other_choices(results: Results, lengths: Sequence[Length]) -> Iterator[str]:
    """Yield a line for each method whose final runs do not have the learning rate that tuning chose."""
    for each in lengths:
        runs, lr = completed_finals(results.trials, each.name), chosen(results.trials, each.name)
        if runs and lr is not None and runs[0].lr != lr:
            yield (
                f"- {each.name} scored best at the learning rate {lr:g} in its tuning runs, but its final runs have "
                f"{runs[0].lr:g}: they ran before the tuning run at {lr:g} did."
            )


def _choices_by_loss(results: Results, lengths: Sequence[Length]) -> Iterator[str]:
    """Yield a line on the methods for which another learning rate has the least validation loss."""
    others, tuned = [], [run for run in results.trials if run.phase == "tune"]
    for each in lengths:
        used = chosen(results.trials, each.name)
        losses = {lr: -score[1] for lr, score in scores(tuned, each.name).items()}
        if used in losses and losses[best := min(losses, key=lambda lr: losses[lr])] < losses[used]:
            others.append(f"{each.name} {best:g} (loss {losses[best]:.3g} instead of {losses[used]:.3g})")
    if others:
        yield (
            "- By the validation loss of the tuning runs, these methods would have another learning rate: "
            f"{'; '.join(others)}. Where nothing was learned, the accuracy chose by chance."
        )


def _left_out(results: Results, reproduction: Reproduction) -> Iterator[str]:
    """Yield a line on the methods with records that the page leaves out."""
    runs = Counter(run.method for run in results.trials if run.method not in reproduction.methods)
    if runs:
        names = ", ".join(f"{name} ({count(number_of, 'run')})" for name, number_of in runs.items())
        yield f"- In the records and the core-hours, and in no other figure of this page: {names}."


def _sizes(reproduction: Reproduction) -> Iterator[str]:
    """Yield a line on the sizes that the names of the methods leave open."""
    settings = reproduction.settings
    meanings = {
        "-Multiple": f"multiple: {settings.probes} directions per step",
        "-Adaptive": f"adaptive: one of {settings.candidates} directions",
        "-SVRG": f"SVRG: a full gradient every {settings.every:,} steps (the public code: every five epochs)",
        "-Sparse": f"sparse: the {percent(settings.share)} of the weights of smallest magnitude",
    }
    names = [method.name for method in reproduction.named()]
    used = [text for end, text in meanings.items() if any(name.endswith(end) for name in names)]
    if used:
        yield f"- Names: {'; '.join(used)}. Finite differences have a step of {settings.eps:g}."


def _constant_answer(reproduction: Reproduction) -> Iterator[str]:
    """Yield a line on the accuracy of one answer to all examples of the test split, if it is known."""
    share = majority(reproduction.task)
    if share is not None:
        yield f"- The most frequent answer of the test split, always given, has an accuracy of {percent(share)}."


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
    names = dict.fromkeys(run.method for run in results.trials)
    methods = [runs for name in names if (runs := completed_finals(results.trials, name))]
    lows = [[loss for _, loss in evaluations(run, "loss")] for runs in methods for run in runs]
    return max(map(min, lows)) if len(methods) > 1 and all(lows) else None


def common_loss_rows(results: Results, lengths: Sequence[Length]) -> list[list[str]]:
    """Return (method, step, FLOPs as a ratio to CHECKPOINTED) at the common loss.

    Empty if there is none, or if a run without backprop has it after one step.
    """
    loss = common_loss(results)
    if loss is None:
        return []
    target = Target("loss", loss)
    by_name = {each.name: each for each in lengths}
    steps = {
        name: {run.seed: int(target.step(run)) for run in completed_finals(results.trials, name)} for name in by_name
    }
    if any(step <= 1 for name, found in steps.items() if is_compared(name) for step in found.values()):
        return []  # no fall: the loss of the start
    base = {seed: by_name[CHECKPOINTED].until(step) for seed, step in steps.get(CHECKPOINTED, {}).items()}
    rows = []
    for name, found in steps.items():
        if found:
            ratios = [by_name[name].until(step) / base[seed] for seed, step in found.items() if base.get(seed)]
            rows.append([name, f"{median(found.values()):g}", format_interval(ratios, DASH, is_ratio=True)])
    return rows


def _common_loss_section(results: Results, lengths: Sequence[Length], task: Task) -> Iterator[str]:
    rows = common_loss_rows(results, lengths)
    if rows:
        yield "## To a loss that every run reaches"
        yield (
            f"A validation loss of {common_loss(results):.4g}, the least one that every final run reaches. *Step*: "
            f"the first evaluated one, the median over seeds. *FLOPs*: as a ratio to {CHECKPOINTED}, paired by seed. "
            "A step is known to one step or to a quarter of it, whichever is more."
        )
        constant = constant_loss(task)
        if constant is not None:
            yield (
                "A model that ignores its input, and gives the shares of the classes in the training split as "
                f"probabilities, has a validation loss of {constant:.4g}. To a loss that is above that, or hardly "
                "below it, the steps are those that learning these shares takes."
            )
        yield markdown_table(("method", "step", "FLOPs"), rows)
    elif common_loss(results) is not None:
        yield "There is no table of steps to a common validation loss: a run without backprop has it after one step."


def _accuracy(runs: Sequence[TrialRecord]) -> str:
    tested = [_test_accuracy(run) for run in runs]
    return format_interval([100 * score for score in tested], missing=DASH, bounds=(0.0, 100.0))


def _test_accuracy(run: TrialRecord) -> float:
    return (run.test.accuracy or 0.0) if run.test is not None else 0.0


def _steps(runs: Sequence[TrialRecord]) -> str:
    if not runs:
        return DASH
    steps = sorted(inf if run.reached is None else run.reached for run in runs)
    middle = steps[(len(steps) - 1) // 2]
    reached = sum(map(isfinite, steps))
    return f"{middle:,.0f}" if isfinite(middle) else f"not reached ({reached} of {len(steps)})"


def _flops(runs: Sequence[TrialRecord], base: Mapping[int, TrialRecord], each: Length, own: Length | None) -> str:
    pairs = [(run, base[run.seed]) for run in runs if run.seed in base]
    if own is None or any(first.reached is None for _, first in pairs):
        return DASH
    return format_interval([flops_ratio((own, first), (each, run)) for run, first in pairs], DASH, is_ratio=True)


def _memory(cost: Cost | None) -> str:
    return DASH if cost is None or cost.peak_bytes is None else size(cost.peak_bytes)


def _note(claim: Claim, found: Found) -> str:
    if found.rival is None:
        return ""
    note = f"Against {found.rival}, which {found.choice}."
    if len(found.values) >= LEAST_SEEDS:
        ours = measured_interval(found.values, claim.is_ratio, claim.bounds)
        if ours.low > claim.published.interval[1]:
            note += " The value here is larger than the published one."
    if any(isinstance(value, Between) for value in found.values):
        note += " A run that does not reach the target within its FLOPs gives a bound."
    return note
