"""Write the Markdown page that compares recorded runs with the numbers of Rike and Foerland's Table 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isinf

from gradcost.papers.rike2022.table import (
    ASSUMPTIONS,
    PUBLISHED_FACTS,
    STEPS_PER_EPOCH,
    TITLE,
    TUNED_SUFFIX,
    TableRow,
    counterpart,
)
from gradcost.papers.rike2022.verdicts import (
    Metric,
    RowResult,
    Verdict,
    is_published_setup,
    row_results,
    speedup,
    verdict,
)
from gradcost.results.records import Results, TrialRecord

HEADERS = (
    "row",
    "paper",
    "paper's metric",
    "whole test set",
    "accuracy",
    "as the paper measured",
    "on the whole set",
)


def format_loss(x: float | None) -> str:
    """Format a loss: `0.332`, or `diverged` for inf, or `-` for None."""
    if x is None:
        return "-"
    return "diverged" if isinf(x) else f"{x:.3f}"


def format_metric(metric: Metric | None) -> str:
    """Format a metric: `0.332 [0.120, 0.611]`, or `diverged` if the median is inf, or `-` for None."""
    if metric is None:
        return "-"
    text = format_loss(metric.median)
    return text if isinf(metric.median) else f"{text} [{format_loss(metric.low)}, {format_loss(metric.high)}]"


def format_share(x: float | None) -> str:
    """Format a fraction in [0, 1] as a percentage; `-` for None."""
    return "-" if x is None else f"{100 * x:.1f}%"


def table_rows(results: Sequence[RowResult], published: bool) -> list[list[str]]:
    """Return the cells of the table whose columns are HEADERS.

    Args:
        results: the rows with their runs. The counterpart of each row must be among them.
        published: whether the runs have the published setup. If False, every verdict is "none".
    """
    return [
        [result.row.name, format_loss(result.row.loss), format_metric(result.last_batch_loss)]
        + [format_metric(result.test_loss), format_share(result.accuracy)]
        + [verdict.value for verdict in _verdicts(result, results, published)]
        for result in results
    ]


def _verdicts(result: RowResult, results: Sequence[RowResult], published: bool) -> tuple[Verdict, Verdict]:
    """Return two verdicts on a row: by the paper's metric, and by the mean over all test images."""
    (rival,) = (candidate for candidate in results if candidate.row == counterpart(result.row))
    return (
        verdict(result.row, result.last_batch_loss, rival.last_batch_loss, published),
        verdict(result.row, result.test_loss, rival.test_loss, published),
    )


def page(results: Results, table: Sequence[TableRow], command: str) -> str:
    """Return the page as Markdown.

    Args:
        results: the records of a results folder.
        table: the rows of Table 1 to report.
        command: the command that writes the page, shown at its top.
    """
    return "\n\n".join(_sections(results, table, command)) + "\n"


def _sections(records: Results, table: Sequence[TableRow], command: str) -> Iterator[str]:
    """Yield the parts of the page, to be separated by blank lines."""
    results, published = row_results(records, table), is_published_setup(records, table)
    yield "# Rike and Førland 2022, Table 1: what reproduces"
    yield f"*{TITLE}* (EPFL). This page is the output of\n\n    {command}"
    yield _summary(results, published)
    yield _markdown_table(HEADERS, table_rows(results, published))
    yield _markdown_list(_explanation(results))
    yield "## Claim by claim\n\n" + _markdown_list(_claims(results, published))
    yield from _tuned_sections(records, table)
    yield "## Rules of the verdicts\n\n" + _markdown_list(RULES)
    yield "## Published facts and assumptions\n\n" + _markdown_list(PUBLISHED_FACTS)
    yield "These details are not published, or not clear:\n\n" + _markdown_table(
        ("detail", "assumed here"), [[assumption.detail, assumption.assumed] for assumption in ASSUMPTIONS]
    )
    yield _setup(records, [run for result in results for run in result.runs])


RULES = (
    "Direction: the loss of backprop is below that of the forward gradient with the same optimizer, for every "
    "seed that both have. The loss of a run that diverged is infinite.",
    "Size: the published number is in the interval, after both ends move outwards by half of its last printed digit.",
    '"direction and size" needs both, "direction only" needs the first; anything else is "not reproduced".',
    '"none": a row or its counterpart was not run on MNIST for the published number of epochs.',
)


def _summary(results: Sequence[RowResult], published: bool) -> str:
    """Return how many rows reproduce in direction and in size, by each of the two metrics."""
    if not published:
        return "**No verdicts: these runs use another task or another number of epochs than the paper.**"
    by_last_batch, by_test_set = zip(*(_verdicts(result, results, published) for result in results), strict=True)

    def count(verdicts: Sequence[Verdict], *wanted: Verdict) -> int:
        return sum(verdict in wanted for verdict in verdicts)

    size, direction = (Verdict.DIRECTION_AND_SIZE,), (Verdict.DIRECTION_AND_SIZE, Verdict.DIRECTION_ONLY)
    return (
        f"On the whole test set, the direction reproduces in {count(by_test_set, *direction)} of {len(results)} rows "
        f"and the size in {count(by_test_set, *size)}. By the paper's metric, the direction reproduces in "
        f"{count(by_last_batch, *direction)} and the size in {count(by_last_batch, *size)}. "
        "The rules of the verdicts below define direction and size."
    )


def _explanation(results: Sequence[RowResult]) -> Iterator[str]:
    yield (
        "The paper's metric is the mean loss over the last batch of a shuffled pass over the test images: 16 of "
        "10,000. In brackets: the 5% and 95% quantiles of this mean over 1,000 shuffles, for the same model."
    )
    yield "Each training loss below is a mean over 1/200 of a run."
    yield (
        'The column "whole test set" is the mean loss over all test images. In brackets: this mean minus and plus '
        "1.96 standard errors."
    )
    yield "With several seeds: the median over seeds, and an interval from the lowest to the highest end."
    seeds = max((len(result.runs) for result in results), default=0)
    yield (
        f"Here: {seeds} seed{'' if seeds == 1 else 's'} per row. The interval of one seed does not show how much the "
        "seeds differ."
    )


def _claims(results: Sequence[RowResult], published: bool) -> Iterator[str]:
    """Yield a sentence on each claim of the paper and each row that tests it."""
    by_row = {result.row: result for result in results}
    if not published:
        yield "These runs use another task or number of epochs than the paper, so they do not test its claims."
    for forward in (result for result in results if result.row.gradient == "forward"):
        backward = by_row[counterpart(forward.row)]
        names = f"{backward.row.name} against {forward.row.name}"
        if forward.test_loss is None or backward.test_loss is None:
            yield f"{names}: not run."
            continue
        yield (
            f'"Backprop beats forward gradients", {names}: test loss {format_loss(backward.test_loss.median)} '
            f"against {format_loss(forward.test_loss.median)}, accuracy {format_share(backward.accuracy)} against "
            f"{format_share(forward.accuracy)}."
        )
        yield f'"Backprop converges 2 to 4 times faster", {names}: {_speedup_clause(forward, backward)}'
    for result in (result for result in results if result.row.gradient == "backprop"):
        if result.test_loss is not None:
            yield (
                f'"Test loss 0.000", {result.row.name}: {format_share(result.zero_share)} of the shuffles give it. '
                f"The loss over the whole test set is {format_loss(result.test_loss.median)}."
            )
    clipped = [(result.row.name, run.clip_rate) for result in results for run in result.runs]
    rates = "; ".join(f"{name} {format_share(rate)}" for name, rate in clipped if rate is not None)
    if rates:
        yield f"Fraction of the directional derivatives that were clipped to [-1, 1]: {rates}."
    yield '"Forward gradients explode without clipping", and the CNN and CIFAR-10 rows: not tested here.'


def _speedup_clause(forward: RowResult, backward: RowResult) -> str:
    """Return how much earlier backprop reaches the final training loss of the forward gradient."""
    ratio = speedup(forward, backward)
    if ratio is None:
        return "unknown, because a run is missing or did not reach the loss."
    factor, is_bound = ratio
    return (
        f"backprop reaches the final training loss of the forward gradient {'at least ' if is_bound else ''}"
        f"{factor:.0f} times earlier, in steps."
    )


def _tuned_sections(records: Results, table: Sequence[TableRow]) -> Iterator[str]:
    """Yield the section on the rows with equal tuning; nothing if there are no such runs."""
    results = row_results(records, table, TUNED_SUFFIX)
    if not any(result.runs for result in results):
        return
    yield "## The same rows with equal tuning"
    yield (
        "Each row tries the same number of learning rates, around its published one; validation accuracy decides. "
        f"A tuning run is as long as its final run ({_length([run for result in results for run in result.runs])}) "
        "and has the same clipping. Decay, momentum and betas are as published."
    )
    rows = []
    for result in results:
        tuning = [
            run for run in records.trials if (run.method, run.phase) == (result.row.name + TUNED_SUFFIX, "tune")
        ]
        rates = {run.lr for run in tuning}
        all_diverged = bool(tuning) and all(run.status == "diverged" for run in tuning)
        lr = f"{result.runs[0].lr:g}" if result.runs else "all diverged" if all_diverged else "-"
        is_edge = result.runs and len(rates) > 1 and result.runs[0].lr in (min(rates), max(rates))
        rows.append(
            [result.row.name, f"{result.row.lr:g}", lr + (" (edge of the grid)" if is_edge else ""), str(len(rates))]
            + [format_metric(result.test_loss), format_share(result.accuracy)]
        )
    yield _markdown_table(("row", "published lr", "tuned lr", "lrs tried", "whole test set", "accuracy"), rows)


def _setup(records: Results, runs: Sequence[TrialRecord]) -> str:
    """Return the section on the length of the runs, the task and the machine."""
    environment = ", ".join(f"{name} {version}" for name, version in records.environment.items())
    return f"## How it was run\n\nThe published rows: {_length(runs)}. Task: `{records.study.task}`. {environment}."


def _length(runs: Sequence[TrialRecord]) -> str:
    steps = max((run.steps for run in runs), default=0)
    return f"{steps:,} steps per run, {steps / STEPS_PER_EPOCH:.3g} epochs of MNIST"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_list(lines: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
