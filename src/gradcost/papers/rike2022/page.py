"""Write the Markdown page that compares recorded runs with the numbers of Rike and Foerland's Table 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isinf

from gradcost.core.units import number
from gradcost.papers.claims import Glance, claims_page, markdown_table
from gradcost.papers.intervals import Between
from gradcost.papers.rike2022.claims import claims, free_runs, paired_runs, pairs
from gradcost.papers.rike2022.differences import DIFFERENCES, PUBLISHED_FACTS
from gradcost.papers.rike2022.printed import COMMIT, PRINTED, REPOSITORY
from gradcost.papers.rike2022.protocols import AsStated, protocol_of
from gradcost.papers.rike2022.runs import Metric, RowResult, is_published_setup, row_results
from gradcost.papers.rike2022.speed import DEFINITIONS, LEAST_FALL, Ratio, ratio, resolution
from gradcost.papers.rike2022.table import TABLE, TITLE, TUNED_SUFFIX, TableRow
from gradcost.results.guessing import guessing_loss
from gradcost.results.records import Results, TrialRecord

HEADERS = ("row", "Table 1", "printed, last ten", "paper's metric", "whole test set", "z", "accuracy")


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


def format_ratio(found: Ratio | None) -> str:
    """Format a ratio with its range: `22.0 [15.6, 27.5]`, or `at least 74`, `at most 3`, or `-` for None."""
    if found is None:
        return "-"
    if isinstance(found.value, Between):
        return f"at least {number(found.low)}" if found.high == inf else f"at most {number(found.high)}"
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def _format_step(step: int | None) -> str:
    return "not reached" if step is None else f"{step:,}"


def table_rows(results: Sequence[RowResult], is_published: bool = True) -> list[list[str]]:
    """Return the cells of the table whose columns are HEADERS.

    Args:
        results: the rows with their runs.
        is_published: whether the paper has such runs. If False, z is "-".
    """
    return [
        [result.row.name, format_loss(result.row.loss)]
        + [f"{PRINTED[result.row.name].mean:.3f} ± {result.printed_error:.3f}"]
        + [format_metric(result.last_batch_loss), format_metric(result.test_loss)]
        + ["-" if result.z is None or not is_published else f"{result.z:+.1f}", format_share(result.accuracy)]
        for result in results
    ]


def page(results: Results, table: Sequence[TableRow], command: str, folder: str, picture: str | None = None) -> str:
    """Return the page as Markdown.

    Args:
        results: the records of a results folder.
        table: the rows of Table 1 to report.
        command: the command that writes the page.
        folder: the name of the results folder.
        picture: the file name of the picture of the losses beside the page; None for none.
    """
    found = claims(results, table, command, f"`{folder}`")
    title = "Rike and Førland 2022, Table 1: what reproduces"
    return claims_page(title, _glance(results, table), found, list(_sections(results, table, picture)))


def _glance(records: Results, table: Sequence[TableRow]) -> Glance:
    stated = isinstance(protocol_of(records), AsStated)
    others = "The other rows were not run" if len(table) < len(TABLE) else "All rows"
    scope = (
        f"*{TITLE}* (EPFL). {len(table)} of {len(TABLE)} rows of Table 1, **as the "
        f"{'paper says' if stated else 'notebooks ran them'}**. {others}."
    )
    if not is_published_setup(records, table):
        names = {row.name for row in table}
        steps = sorted({run.steps for run in records.trials if run.phase == "final" and run.method in names})
        scope += (
            " These runs use another task, another net or another number of epochs than the paper: "
            f"`{records.study.task}` with {records.study.weights or 0:,} weights"
        )
        scope += f", {' or '.join(f'{each:,}' for each in steps)} steps a run." if steps else "."
    return Glance.of(scope, records)


def _sections(records: Results, table: Sequence[TableRow], picture: str | None) -> Iterator[str]:
    """Yield the parts of the page after its claims."""
    results = row_results(records, table)
    yield "## The rows"
    is_published = is_published_setup(records, table)
    yield markdown_table(HEADERS, table_rows(results, is_published))
    yield _markdown_list(_explanation(results, is_published))
    if picture is not None:
        yield "## The training loss"
        yield f"![Training loss against steps, a panel per optimizer]({picture})"
        yield "Medians over the seeds; each point is a mean over the steps since the previous one."
    yield from _zero_section(results)
    yield from _speed_section(results, guessing_loss(records.study.chance))
    yield from _cap_section(records, table)
    yield from _tuned_sections(records, table)
    yield from _difference_section(records)
    yield _setup(records, [run for result in results for run in result.runs])


def _explanation(results: Sequence[RowResult], is_published: bool) -> Iterator[str]:
    yield "Table 1: the published test loss, a mean over 16 images after the last epoch."
    yield (
        "Printed, last ten: the mean of the last ten losses that the authors' notebooks print, with its standard "
        "error. It is the larger one of two estimates: from the ten losses, and from the spread of our losses over "
        "the test images, for 160 images."
    )
    yield (
        "Paper's metric: the mean loss over the last batch of a shuffled pass over the test images: with batches of "
        "64, 16 of 10,000. In brackets: the 5% and 95% quantiles of this mean over 1,000 shuffles, for the same "
        "model."
    )
    yield (
        "Whole test set: the mean loss over all test images. In brackets: this mean minus and plus 1.96 standard "
        "errors. With several seeds: the median, and an interval from the lowest to the highest end."
    )
    yield (
        "z: our mean loss on the whole test set less the mean of the last ten printed losses, in standard errors of "
        "the difference. The claims above use the same printed mean and error."
        + ("" if is_published else " Runs that differ from those of the paper do not test whether a row reproduces.")
    )
    seeds = max((len(result.runs) for result in results), default=0)
    if seeds == 1:
        yield "Here: 1 seed per row, so the spread between seeds is unknown and no claim is decided."


def _zero_section(results: Sequence[RowResult]) -> Iterator[str]:
    shares = [
        f"{result.row.name} {format_share(result.zero_share)}"
        for result in results
        if result.row.gradient == "backprop" and result.row.loss == 0 and result.zero_share is not None
    ]
    if shares:
        yield "## Test loss 0.000"
        yield f"Fraction of the shuffles for which the paper's metric prints as 0.000: {'; '.join(shares)}."


def _speed_section(results: Sequence[RowResult], guessing: float | None) -> Iterator[str]:
    rows: list[list[str]] = []
    points = {resolution(run) for result in results for run in result.runs}
    for forward, backprop in pairs(results):
        for ours, theirs in paired_runs(forward, backprop):
            for definition in DEFINITIONS:
                found = ratio(ours, theirs, definition, guessing)
                steps = ["-", "-"] if found is None else [_format_step(found.forward), _format_step(found.backprop)]
                rows.append([forward.row.name, str(ours.seed), definition.name, *steps, format_ratio(found)])
    if not rows:
        return
    yield '## "Backprop converges 2 to 4 times faster", by four definitions'
    yield markdown_table(("row", "seed", "converged at", "steps", "steps of backprop", "ratio"), rows)
    steps = " or ".join(f"{each:,}" for each in sorted(points))
    yield (
        f"Resolution: a point of a curve is the mean loss of {steps} steps. In brackets: the range of ratios "
        f"that agrees with the records. A fall starts at the loss of guessing, {format_loss(guessing)}, and ends at "
        f"the least loss of the curve. A run whose loss falls by less than {LEAST_FALL:.0%} has no ratio."
    )


def _cap_section(records: Results, table: Sequence[TableRow]) -> Iterator[str]:
    results = row_results(records, table)
    rates = [(result.row.name, run.clip_rate) for result in results for run in result.runs]
    texts = [f"{name} {format_share(rate)}" for name, rate in rates if rate is not None]
    free = free_runs(records, table)
    if not texts and not free:
        return
    yield "## The cap on the slope"
    if texts:
        yield f"Fraction of the slopes that the cap of 1 cut: {'; '.join(texts)}."
    if not free:
        yield "No row ran without the cap, so these records do not show whether the forward gradient explodes."
        return
    rows = [
        [result.row.name, str(run.seed), run.status, f"{run.steps:,}", _largest(run)]
        + [format_loss(None if run.test is None else run.test.loss)]
        for result in free
        for run in result.runs
    ]
    yield "Runs without a cap:"
    yield markdown_table(("row", "seed", "status", "steps", "largest slope", "whole test set"), rows)


def _largest(run: TrialRecord) -> str:
    largest = (run.slopes or {}).get("largest")
    return "-" if largest is None else number(largest)


def _tuned_sections(records: Results, table: Sequence[TableRow]) -> Iterator[str]:
    """Yield the section on the rows with equal tuning; nothing if there are no such runs."""
    results = row_results(records, table, TUNED_SUFFIX)
    if not any(result.runs for result in results):
        return
    yield "## The same rows with equal tuning"
    yield (
        "Each row tries the same number of learning rates, around its published one; validation accuracy decides. "
        f"A tuning run is as long as its final run ({_length([run for result in results for run in result.runs])}) "
        "and has the same cap. Decay, momentum and betas are those of the protocol."
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
    yield markdown_table(("row", "published lr", "tuned lr", "lrs tried", "whole test set", "accuracy"), rows)


def _difference_section(records: Results) -> Iterator[str]:
    stated = isinstance(protocol_of(records), AsStated)
    yield "## The paper and its code"
    yield "Both agree on these:\n\n" + _markdown_list(PUBLISHED_FACTS)
    yield "They differ, or the paper is silent, on these. Cells count from 0."
    yield f"The code: {REPOSITORY}, commit {COMMIT}."
    rows = [
        [each.detail, each.paper or "not stated", each.code, each.where]
        + [each.as_stated if stated else each.as_run or "as the notebooks"]
        for each in DIFFERENCES
    ]
    yield markdown_table(("detail", "paper", "notebooks", "where", "these runs"), rows)


def _setup(records: Results, runs: Sequence[TrialRecord]) -> str:
    """Return the section on the length of the runs, the task and the machine."""
    return f"## How it was run\n\nThe published rows: {_length(runs)}. Task: `{records.study.task}`."


def _length(runs: Sequence[TrialRecord]) -> str:
    return f"{max((run.steps for run in runs), default=0):,} steps per run"


def _markdown_list(lines: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
