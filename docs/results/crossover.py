"""For which memory, model, number of directions and of workers does something beat checkpointed backprop?

    python docs/results/crossover.py

Writes crossover.md and crossover.svg beside this file, from committed records alone: forecasts of the paper's models
(panchal2025-cost) and six studies. Needs the extra report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gradcost.core.units import number, size
from gradcost.papers.claims import markdown_table
from gradcost.papers.panchal2025.cost import read_costs
from gradcost.papers.panchal2025.cost_page import Case, CostTable
from gradcost.results.records import Results, read
from gradcost.results.statistics import Interval
from gradcost.results.targets import Target, reaches, reference
from gradcost.results.tuning import final_rate

HERE = Path(__file__).parent
BY_CHANCE = "MiniLM on TREC, 22.7 million weights"  # the study whose methods without backprop learned nothing
ADAPTERS = {"MiniLM on TREC, 11,526 weights": "MiniLM", "SmolLM2 on TREC, 57,600 weights": "SmolLM2"}
MANY = {"FmAD-Vanilla": "FmAD-Multiple", "MeZO": "ZO-Multiple"}  # the same method with several directions
OTHER_LOSSES = 1.7, 1.6  # targets beside 1.62 for FmAD-Vanilla on MiniLM
EXACT, SAME, DIFFERENCE = "BP-Checkpointing", "BP-Vanilla", "MeZO"  # the first two have the same gradient
# label of the page, folder, method, its directions n, target: the hardest loss that every run of the method reaches,
# rounded up to three digits
STUDIES = [
    ("MNIST, 1,863,690 weights", "equal-flops-1", "forward gradient, cap, Adam, decay", 1, Target("loss", 1.6)),
    ("MNIST, 1,863,690 weights", "equal-flops-1", "MeZO, cap, momentum, decay", 1, Target("loss", 1.6)),
    ("MNIST, 1,863,690 weights", "equal-flops-1", "forward gradient 16, cap, SGD, decay", 16, Target("loss", 1.6)),
    ("MNIST, 1,863,690 weights", "equal-flops-1", "one-sided 16, cap, SGD, decay", 16, Target("loss", 1.6)),
    ("MNIST, 7,850 weights", "baydin2022-logistic", "forward logistic, tuned", 1, Target("loss", 1.2)),
    ("MiniLM on TREC, 11,526 weights", "panchal2025-6000", "FmAD-Vanilla", 1, Target("loss", 1.62)),
    ("MiniLM on TREC, 11,526 weights", "panchal2025-6000", "MeZO", 1, Target("loss", 1.62)),
    ("MiniLM on TREC, 11,526 weights", "panchal2025-6000", "FmAD-Multiple", 10, Target("loss", 1.62)),
    ("MiniLM on TREC, 11,526 weights", "panchal2025-6000", "ZO-Multiple", 10, Target("loss", 1.62)),
    ("SmolLM2 on TREC, 57,600 weights", "panchal2025-smollm2", "FmAD-Vanilla", 1, Target("loss", 3.48)),
    ("SmolLM2 on TREC, 57,600 weights", "panchal2025-smollm2", "MeZO", 1, Target("loss", 3.48)),
    ("SmolLM2 on TREC, 57,600 weights", "panchal2025-smollm2", "FmAD-Multiple", 4, Target("loss", 3.48)),
    ("SmolLM2 on TREC, 57,600 weights", "panchal2025-smollm2", "ZO-Multiple", 4, Target("loss", 3.48)),
    (BY_CHANCE, "panchal2025-full", "FmAD-Vanilla", 1, Target("loss", 1.78)),
    (BY_CHANCE, "panchal2025-full", "MeZO", 1, Target("loss", 1.78)),
    ("MNIST, 55,050 weights", "panchal2025-variants", "FmAD-Vanilla", 1, Target("accuracy", 0.6)),
    ("MNIST, 55,050 weights", "panchal2025-variants", "MeZO", 1, Target("accuracy", 0.6)),
    ("MiniLM on TREC, 11,526 weights", "panchal2025-6000", "MeZO", 1, Target("accuracy", 0.8)),
    ("MiniLM on TREC, 11,526 weights", "panchal2025-6000", "FmAD-Vanilla", 1, Target("accuracy", 0.8)),
]


class Steps(NamedTuple):
    """The steps of a method to a target, as a ratio to those of backprop in its study (`targets.reference`).

    reference: the backprop of this study, with its learning rate.
    ratio: over seeds, paired. Where no run reaches the target: the steps that the runs had, as a bound from below.
    other: the median ratio to BP-Checkpointing at its own learning rate, where that is another one.
    """

    study: str
    method: str
    directions: int
    target: Target
    reference: str
    ratio: Interval
    is_bound: bool
    other: float | None = None

    @property
    def rank(self) -> float:
        """Return r of the law ratio = 1 + (r + 1)/n, the effective rank of the Hessian in `effective_slowdown`."""
        return rank(self.ratio.median, self.directions)


def rank(ratio: float, directions: int = 1) -> float:
    return directions * (ratio - 1) - 1


class Model(NamedTuple):
    """Forecasts for one model: peaks in bytes, and the FLOPs of a step of checkpointed backprop in those of MeZO."""

    case: Case
    weights: int
    least: int
    exact: int
    advantage: float

    def workers(self, rank: float) -> float:
        """Return how many workers with one direction each make MeZO as fast as checkpointed backprop.

        A step of all workers together takes as long as one of MeZO. So 1 + (r + 1)/n must be at most `advantage`.
        """
        return math.ceil((rank + 1) / (self.advantage - 1))


def measured() -> Iterator[Steps]:
    for label, folder, method, directions, target in STUDIES:
        results = read(HERE / folder)
        first = reference(results)
        assert first is not None
        ratio = _ratio(results, method, target)
        if math.isinf(ratio.median):
            bound = _bound(results, method, target, ratio)
            yield Steps(label, method, directions, target, _named(results, EXACT), bound, True)
            continue
        others = replace(results, trials=tuple(run for run in results.trials if run.method != SAME))
        is_other = first == SAME and final_rate(results, SAME) != final_rate(results, EXACT)
        other = _ratio(others, method, target).median if is_other else None
        yield Steps(label, method, directions, target, _named(results, first), ratio, False, other)


def _ratio(results: Results, method: str, target: Target) -> Interval:
    return next(row.ratio["steps"] for row in reaches(results, [target]) if row.method == method)


def _nearer_to_the_start() -> Iterator[float]:
    """Yield the ratios of the study with all weights of MiniLM to a loss that is higher by 0.01."""
    for label, folder, method, _, target in STUDIES:
        if label == BY_CHANCE:
            yield _ratio(read(HERE / folder), method, Target("loss", round(target.value + 0.01, 2))).median


def _to_other_losses() -> Iterator[float]:
    """Yield r of FmAD-Vanilla on MiniLM with adapters to `OTHER_LOSSES`."""
    results = read(HERE / "panchal2025-6000")
    for loss in OTHER_LOSSES:
        yield rank(_ratio(results, "FmAD-Vanilla", Target("loss", loss)).median)


def _named(results: Results, method: str) -> str:
    return f"{method}, {final_rate(results, method)}"


def _bound(results: Results, method: str, target: Target, ratio: Interval) -> Interval:
    finals = [run for run in results.trials if run.phase == "final"]
    had = min(run.steps for run in finals if run.method == method)
    needed = max(target.step(run) for run in finals if run.method == EXACT)
    least = had / needed
    return Interval(least, least, math.inf, ratio.confidence, ratio.n)


def models() -> Iterator[Model]:
    records = read_costs(HERE / "panchal2025-cost")
    table = CostTable(records)
    for case in table.cases:
        least, exact = table.best(case, DIFFERENCE), table.best(case, EXACT)
        assert least is not None
        assert exact is not None
        yield Model(case, least.weights, least.peak, exact.peak, exact.flops / least.flops)


PAGE = """# When does anything beat checkpointed backprop?

Written by `python docs/results/crossover.py` from committed records. Peaks and FLOPs are forecasts from the
configurations of [the paper's models](panchal2025_cost.md); steps are measured on small models
([equal FLOPs](equal_flops.md), [logistic regression](baydin2022_logistic.md), [MiniLM](panchal2025_6000.md),
[SmolLM2](panchal2025_smollm2.md), [all weights of MiniLM](panchal2025_full.md), [a small
network](panchal2025_variants.md)).

## At a glance

- **Memory.** MeZO fits and backprop with per-block checkpointing does not in one range of budgets: from MeZO's peak
  up to {gaps} times it, with the whole batch at once. There micro-batches and `Within` may make backprop fit, too.
  This is for AdamW with every method, as in the paper, and for the paper's batches, such as 40 texts of 64 tokens.
  Larger batches widen the range, and so does MeZO without an optimizer's state, where all weights are trained.
- **Computations.** Nothing else wins. A step of checkpointed backprop takes {advantages} times the FLOPs of a step
  of MeZO, so MeZO may take at most so many times its steps. The medians measured with one direction are {ratios}
  times those of the backprop that was tuned best ({others} times those of BP-Checkpointing, where its learning rate
  is another one); the low ones are to targets close to the start. By the law below, n directions per step take
  n + r + 1 times the work, least for one. Measured with adapters, one optimizer and the rates tuned for each, runs
  with 4 and 10 directions per step evaluate {work} times as many directions as those with one, to the
  same loss. The directions of a step can share a forward pass ([what that saves](questions.md)). All need many times
  the work of backprop.
- **Time with n workers, one direction each.** If all directions of a step took the time of one, then by the law and
  with the r measured with adapters and one direction, backprop with adapters on *one* worker would be overtaken from
  {fewest} workers on, if r is that of {first}, and from {more} on, if it is that of {last}. On a
  small network 64 directions need as many steps as plain backprop ([counted, not timed](questions.md)). If the batch
  can be split, backprop uses the workers too, and is not overtaken.
- **What this cannot tell.** r is measured on models of 8 thousand to 22.7 million weights, at targets far from the
  end of training; for the models of the second table it is unknown. The methods of one study would have one r if the
  law held. They do not: r differs by up to {spread} times within a study, and the numbers of workers have at least
  this error. r also moves with the target: to a loss of {losses} instead of 1.62, that of FmAD-Vanilla on MiniLM is
  {moved}. Knowing the shares of the classes gives about that loss without a look at the texts ([how
  much](panchal2025_6000.md)). With all weights of MiniLM r differs by {chance} times, but there accuracy chose MeZO's
  learning rate by chance ([which](panchal2025_full.md)), and the target is 0.01 below the loss of equal probabilities
  and takes backprop one to three steps: to a loss of 1.79 instead of 1.78 the median ratios are {near}. On SmolLM2,
  with two seeds, the loss is hardly below that of the start, and backprop needs two steps to it, so r is known to
  about a factor of two. No run without backprop came to 80% on TREC, so there r is a bound from below.

![Budgets and workers](crossover.svg)

## Steps to a common target

The ratio to the steps of the backprop in the column before it, paired by seed. In the first study that is plain SGD
(with Adam it takes a quarter of these steps, so the ratios to it are four times as large). BP-Vanilla and
BP-Checkpointing have the same gradient, so at an equal learning rate equal steps, up to the distance between two
evaluations, which differs with the length of a run. The reference is the first backprop whose tuning score is at
most 2 points below the best one, and *BP-Checkpointing* is the median ratio to that one if it has another rate. The
interval is that of the median; with fewer than six seeds it is the range of the seeds. Targets are rounded to three
digits, so ratios differ from those of the studies' own pages. r follows from the law of `effective_slowdown`: ratio =
1 + (r + 1)/n.

{steps}

## Budgets and workers

*MeZO fits, BP does not*: from the peak of MeZO to that of BP-Checkpointing, each with its better attention. A forward
gradient fits from [its own peak](panchal2025_cost.md) on, mostly within this range. *Workers*:
directions that make MeZO as fast as checkpointed backprop on one worker, with r = {low} and r = {high}, the extremes
with one direction in the table above.

{models}
"""


def page(steps: Sequence[Steps], costs: Sequence[Model]) -> str:
    """Return the page as Markdown."""
    known = [row for row in steps if row.directions == 1 and not row.is_bound]
    low, high = (choose(known, key=lambda row: row.rank) for choose in (min, max))
    least, most = (choose(_with_adapters(known), key=lambda row: row.rank) for choose in (min, max))
    return PAGE.format(
        gaps=_range(model.exact / model.least for model in costs),
        advantages=_range(model.advantage for model in costs),
        ratios=_range(row.ratio.median for row in known),
        others=_range(row.other or row.ratio.median for row in known),
        work=_range(_work(steps)),
        near=" and ".join(number(ratio) for ratio in _nearer_to_the_start()),
        fewest=number(fewest_workers(least.rank, costs)),
        first=f"{least.method} on {ADAPTERS[least.study]}",
        more=number(fewest_workers(most.rank, costs)),
        last=f"{most.method} on {ADAPTERS[most.study]}",
        losses=" and ".join(map(number, OTHER_LOSSES)),
        moved=" and ".join(number(r, 2) for r in _to_other_losses()),
        spread=number(max(_spread(steps, study) for study in {row.study for row in steps} - {BY_CHANCE}), 2),
        chance=number(_spread(steps, BY_CHANCE), 2),
        low=number(low.rank, 2),
        high=number(high.rank),
        steps=markdown_table(
            ["model", "method", "n", "target", "reference, rate", "steps, ratio", "seeds", "r", "BP-Checkpointing"],
            [
                [
                    row.study,
                    row.method,
                    str(row.directions),
                    f"{row.target.quantity} {row.target.value:g}",
                    row.reference,
                    _ratio_cell(row),
                    str(row.ratio.n),
                    f"> {number(row.rank, 2)}" if row.is_bound else number(row.rank),
                    "" if row.other is None else number(row.other),
                ]
                for row in steps
            ],
        ),
        models=markdown_table(
            ["model", "trained", "weights trained", "MeZO fits, BP does not", "step, ratio of FLOPs", "workers"],
            [
                [
                    *model.case,
                    f"{model.weights:,}",
                    "nowhere" if model.exact < 1.01 * model.least else f"{size(model.least)} to {size(model.exact)}",
                    number(model.advantage),
                    f"{model.workers(low.rank):,.0f} to {model.workers(high.rank):,.0f}",
                ]
                for model in costs
            ],
        ),
    )


def fewest_workers(rank: float, costs: Sequence[Model]) -> float:
    """Return the fewest workers that overtake backprop on one, over the models with adapters."""
    return min(model.workers(rank) for model in costs if "LoRA" in model.case[1])


def _with_adapters(steps: Iterable[Steps]) -> list[Steps]:
    """Return the rows of models with adapters: r of other weights says nothing about these."""
    return [row for row in steps if row.study in ADAPTERS]


def _work(steps: Sequence[Steps]) -> Iterator[float]:
    """Yield how many times the directions of one per step several take to a target, with adapters."""
    rows = {(row.study, row.method): row for row in _with_adapters(steps) if not row.is_bound}
    for (study, method), one in rows.items():
        if method in MANY:
            many = rows[study, MANY[method]]
            yield many.directions * many.ratio.median / one.ratio.median


def _spread(steps: Sequence[Steps], study: str) -> float:
    """Return the ratio of the largest to the smallest r of a study."""
    ranks = [row.rank for row in steps if row.study == study and not row.is_bound]
    return max(ranks) / min(ranks)


def _range(values: Iterable[float]) -> str:
    listed = sorted(values)
    return f"{number(listed[0])} to {number(listed[-1])}"


def _ratio_cell(row: Steps) -> str:
    if row.is_bound:
        return f"> {number(row.ratio.median)}, no run reached it"
    return f"{number(row.ratio.median)} [{number(row.ratio.low)}, {number(row.ratio.high)}]"


def picture(steps: Sequence[Steps], costs: Sequence[Model]) -> Any:
    """Return the chart: shaded, where MeZO fits and backprop does not, and the workers with which it is faster."""
    import altair as alt

    bars = [
        {"model": f"{m.case[0]}, {m.case[1]}", "from": 1.0, "to": m.exact / m.least, "order": m.least} for m in costs
    ]
    memory = (
        alt.Chart(alt.Data(values=bars), title="Budgets that MeZO fits and backprop does not", width=300)
        .mark_bar(color="#e8a33d")
        .encode(
            x=alt.X("from:Q", title="budget / peak of MeZO", scale=alt.Scale(domain=[0.95, 1.5])),
            x2="to:Q",
            y=alt.Y("model:N", title=None, sort=alt.EncodingSortField("order")),
        )
    )
    counts = [2 ** (k / 4) for k in range(49)]
    lines = [
        {"workers": n, "ratio": 1 + (row.rank + 1) / n} | _names(row)
        for row in steps
        if row.directions == 1 and not row.is_bound
        for n in counts
    ]
    best = max(model.advantage for model in costs)
    region = [{"workers": n, "from": 1.0, "to": best} for n in counts]
    points = [
        {"workers": row.directions, "ratio": row.ratio.median} | _names(row) for row in steps if not row.is_bound
    ]
    x = alt.X("workers:Q", title="workers = directions n", scale=alt.Scale(type="log", domain=[1, 4096]))
    y = alt.Y("ratio:Q", title="steps / steps of backprop", scale=alt.Scale(type="log", domain=[1, 300]))
    colour = alt.Color("study:N", title=None)
    dash, shape = alt.StrokeDash("kind:N", title=None), alt.Shape("kind:N", title=None)
    shaded = alt.Chart(alt.Data(values=region), title="Shaded: faster than backprop on one worker", width=380)
    chart = (
        shaded.mark_area(color="#e8a33d", opacity=0.5).encode(x=x, y=alt.Y("from:Q"), y2="to:Q")
        + alt.Chart(alt.Data(values=lines))
        .mark_line()
        .encode(x=x, y=y, color=colour, strokeDash=dash, detail="method:N")
        + alt.Chart(alt.Data(values=points))
        .mark_point(filled=True, size=60)
        .encode(x=x, y=y, color=colour, shape=shape)
    )
    return (memory | chart.properties(height=220)).configure_axis(labelLimit=300).configure_legend(labelLimit=400)


def _names(row: Steps) -> dict[str, str]:
    """Return the study, the kind of the method, and its name."""
    is_forward = row.method.startswith(("FmAD", "forward"))
    return {
        "study": row.study,
        "kind": "forward gradient" if is_forward else "differences of losses",
        "method": row.method,
    }


def main() -> None:
    steps, costs = [*measured()], [*models()]
    (HERE / "crossover.md").write_text(page(steps, costs), encoding="utf-8")
    picture(steps, costs).save(str(HERE / "crossover.svg"))


if __name__ == "__main__":
    main()
