"""The page that says what became of Rike and Foerland's Table 1: Markdown, from records alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isinf

from gradcost.papers.rike2022.table import CHOICES, PUBLISHED, STEPS_PER_EPOCH, TITLE, TUNED, Row, rival
from gradcost.papers.rike2022.verdicts import Cell, Metric, Verdict, as_published, cells, times_faster, verdict
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


def number(x: float | None) -> str:
    return "-" if x is None else "diverged" if isinf(x) else f"{x:.3f}"


def shown(metric: Metric | None) -> str:
    """`0.332 [0.120, 0.611]`."""
    if metric is None:
        return "-"
    return number(metric.middle) + ("" if isinf(metric.middle) else f" [{number(metric.low)}, {number(metric.high)}]")


def share(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f}%"


def rows_of(found: Sequence[Cell], published: bool) -> list[list[str]]:
    """The table, under HEADERS."""
    return [
        [cell.row.name, number(cell.row.loss), shown(cell.last), shown(cell.whole), share(cell.accuracy)]
        + [verdict.value for verdict in verdicts(cell, found, published)]
        for cell in found
    ]


def verdicts(cell: Cell, found: Sequence[Cell], published: bool) -> tuple[Verdict, Verdict]:
    """As the paper measured, and on the whole test set."""
    (other,) = (of for of in found if of.row == rival(cell.row))
    return (
        verdict(cell.row, cell.last, other.last, published),
        verdict(cell.row, cell.whole, other.whole, published),
    )


def page(results: Results, table: Sequence[Row], command: str) -> str:
    """The whole page. command: what writes it, for who wants to."""
    return "\n\n".join(_sections(results, table, command)) + "\n"


def _sections(results: Results, table: Sequence[Row], command: str) -> Iterator[str]:
    found, published = cells(results, table), as_published(results, table)
    yield "# What holds of Rike and Førland's Table 1\n\n" + f"*{TITLE}* (EPFL). Written by\n\n    {command}"
    yield _answer(found, published)
    yield _markdown(HEADERS, rows_of(found, published))
    yield (
        "The paper's metric is the mean loss over the last batch of a shuffled pass over the test images, 16 of "
        "10,000; in brackets its 5% and 95% quantiles over 1,000 shuffles of the same model's losses. Beside it the "
        "mean over the whole test set, 1.96 standard errors to either side. With several seeds: the median, and from "
        f"the least end to the greatest. Here {_counted(found)}; one seed's interval says nothing of other seeds."
    )
    yield "## Claim by claim\n\n" + "\n".join(f"- {line}" for line in _claims(found, published))
    yield from _tuned(results, table)
    yield "## Rules of the verdicts\n\n" + "\n".join(f"- {line}" for line in RULES)
    yield "## What is published, and what had to be chosen\n\n" + "\n".join(f"- {line}" for line in PUBLISHED)
    yield "Not published, or not clearly:\n\n" + _markdown(
        ("what", "taken here"), [[choice.silent, choice.taken] for choice in CHOICES]
    )
    yield _runs(results, [run for cell in found for run in cell.runs])


RULES = (
    "Direction: on every seed of both, backprop's loss is below that of the forward gradient with the same "
    "optimizer. A run that diverged has an infinite loss.",
    "Size: the published number lies within the interval, or nearer to it than half of its last printed digit.",
    '"direction and size" needs both, "direction only" the first, and all else is "not reproduced".',
    "No verdict where a row or its rival was not run on MNIST for as long as published.",
)


def _answer(found: Sequence[Cell], published: bool) -> str:
    if not published:
        return "**These runs are not the paper's: another task, fewer epochs, or not all of them. No verdicts.**"
    last, whole = zip(*(verdicts(cell, found, published) for cell in found), strict=True)

    def count(given: Sequence[Verdict], *wanted: Verdict) -> int:
        return sum(verdict in wanted for verdict in given)

    directed = (Verdict.BOTH, Verdict.DIRECTION)
    return (
        f"On the whole test set the direction holds in {count(whole, *directed)} of {len(found)} rows and the size "
        f"in {count(whole, Verdict.BOTH)}; measured as the paper did, {count(last, *directed)} and "
        f"{count(last, Verdict.BOTH)}."
    )


def _claims(found: Sequence[Cell], published: bool) -> Iterator[str]:
    by_row = {cell.row: cell for cell in found}
    if not published:
        yield "These are the figures of shorter or other runs than the paper's, and answer none of its claims."
    for cell in (cell for cell in found if cell.row.gradient == "forward"):
        rows = f"{cell.row.name} against {rival(cell.row).name}"
        other = by_row[rival(cell.row)]
        if cell.whole is None or other.whole is None:
            yield f"{rows}: not run."
            continue
        faster = times_faster(cell, other)
        yield (
            f'"Backprop beats forward gradients", {rows}: whole test set {number(other.whole.middle)} against '
            f"{number(cell.whole.middle)}, accuracy {share(other.accuracy)} against {share(cell.accuracy)}."
        )
        yield (
            f'"Backprop converges 2 to 4 times faster", {rows}: '
            + ("not to be told, for one of them did not get so far." if faster is None else _faster(*faster))
        )
    for cell in (cell for cell in found if cell.row.gradient == "backprop" and cell.whole is not None):
        assert cell.whole is not None
        yield (
            f'"Test loss 0.000", {cell.row.name}: {share(cell.zero)} of the shuffles print it; the whole test set '
            f"has {number(cell.whole.middle)}."
        )
    clipped = [(cell.row.name, run.clip_rate) for cell in found for run in cell.runs if run.clip_rate is not None]
    if clipped:
        rates = "; ".join(f"{name} {share(rate)}" for name, rate in clipped)
        yield f"The cap of 1 cut this share of the steps' derivatives: {rates}."
    yield '"Forward gradients explode without clipping", and the CNN and CIFAR-10 rows: not asked here.'


def _faster(factor: float, bound: bool) -> str:
    return (
        f"backprop is at the training loss with which the forward gradient ends {'at least ' if bound else ''}"
        f"{factor:.0f} times earlier, in steps (means over 1/200 of a run)."
    )


def _tuned(results: Results, table: Sequence[Row]) -> Iterator[str]:
    found = cells(results, table, TUNED)
    if not any(cell.runs for cell in found):
        return
    yield (
        "## The same rows, tuned alike\n\nEvery row over as many learning rates about its published one, each for as "
        f"long as the final run ({_length([run for cell in found for run in cell.runs])}) and with its clip, by "
        "validation accuracy; decay, momentum, betas as published."
    )
    rows = []
    for cell in found:
        tried = [run for run in results.trials if (run.method, run.phase) == (cell.row.name + TUNED, "tune")]
        points = {run.lr for run in tried}
        lost = bool(tried) and all(run.status == "diverged" for run in tried)
        lr = f"{cell.runs[0].lr:g}" if cell.runs else "all diverged" if lost else "-"
        edge = cell.runs and len(points) > 1 and cell.runs[0].lr in (min(points), max(points))
        rows.append(
            [cell.row.name, f"{cell.row.lr:g}", lr + (" (an edge)" if edge else ""), str(len(points))]
            + [shown(cell.whole), share(cell.accuracy)]
        )
    yield _markdown(("row", "published rate", "chosen", "points", "whole test set", "accuracy"), rows)


def _counted(found: Sequence[Cell]) -> str:
    most = max((len(cell.runs) for cell in found), default=0)
    return f"{most} seed{'' if most == 1 else 's'} a row"


def _runs(results: Results, runs: Sequence[TrialRecord]) -> str:
    where = ", ".join(f"{name} {told}" for name, told in results.environment.items())
    return f"## How it was run\n\nThe published rows: {_length(runs)}. Task: `{results.study.task}`. {where}."


def _length(runs: Sequence[TrialRecord]) -> str:
    steps = max((run.steps for run in runs), default=0)
    return f"{steps:,} steps a run, {steps / STEPS_PER_EPOCH:.3g} of MNIST's epochs"


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
