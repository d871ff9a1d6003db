"""Count the steps of forward gradients against those of gradient descent. Takes minutes on one core.

    python benchmarks/slowdown.py

- Problems: quadratics x'Hx/2 of 1,000 weights and condition 100. The eigenvalues go from 0.01 to 1, spaced evenly or
  evenly in their logarithm. Every eigenvector starts with the same loss.
- Learning rates: the best constant one for each method, of `FACTORS_TRIED`, on the runs themselves.
- Count: the steps until the mean loss of 6 runs is 1/100 or 1/10,000 of the first.

The runs sample the exact distribution of the estimate instead of calling the library: g = (q grad + sqrt(q) |grad|
u)/n, with q ~ chi^2_n and u standard normal orthogonal to the gradient (`expected_cosine` derives it). A check on 40
steps of the library's estimator comes first.

Writes the part `slowdown` of docs/theory.md, and docs/images/slowdown.svg. Needs the extra report.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from theory import DOCS, KEY, Point, flat, write_section
from torch import Tensor, nn

from gradcost import Gaussian, Jvp, Objective, Probing
from gradcost.theory.quadratic import expected_losses, steps_to_reach
from gradcost.theory.slowdown import effective_slowdown, slowdown

D, RUNS, LEAST_RATIO, MOST_STEPS = 1000, 6, 1e-4, 100_000
PROBES, RATIOS = (1, 10, 100), (1e-2, 1e-4)
FACTORS_TRIED = [1.2, 1.4, 1.6, 1.8, 2.0, 2.2]  # of 1/(L (1 + (r + 1)/n)); the best lies within
SPECTRA = {"even in the logarithm": np.geomspace(0.01, 1, D), "even": np.linspace(0.01, 1, D)}


class Curve(NamedTuple):
    """The mean loss of the runs at each step and its standard error, as shares of the first loss."""

    mean: np.ndarray
    error: np.ndarray


class Row(NamedTuple):
    """The steps of one number of probes on one spectrum, down to one share of the first loss."""

    spectrum: str
    ratio: float
    probes: int
    descent: int  # steps of gradient descent
    steps: int
    rate: float  # of 1/(L (1 + (r + 1)/n))
    expected: int
    dimension: float
    effective: float

    @property
    def measured(self) -> float:
        return self.steps / self.descent

    @property
    def exact(self) -> float:
        return self.expected / self.descent


def losses(curvature: np.ndarray, lr: float, probes: int, seed: int, runs: int = RUNS) -> Iterator[np.ndarray]:
    """Yield f of each run after 0, 1, 2, ... steps."""
    generator = np.random.default_rng(seed)
    x = np.tile(1 / np.sqrt(curvature), (runs, 1))
    while True:
        yield (curvature * x * x).sum(1) / 2
        gradient = curvature * x
        length = np.sqrt((gradient * gradient).sum(1, keepdims=True))
        q = generator.chisquare(probes, (runs, 1))
        u = generator.standard_normal((runs, D), dtype=np.float32).astype(np.float64)
        u -= (u * gradient).sum(1, keepdims=True) / (length * length) * gradient
        x -= lr / probes * (q * gradient + np.sqrt(q) * length * u)


def curve_of(curvature: np.ndarray, lr: float, probes: int) -> Curve:
    """Run until the mean loss is below `LEAST_RATIO` of the first or has grown tenfold."""
    means, errors, first = [], [], D / 2
    for sample in itertools.islice(losses(curvature, lr, probes, seed=probes), MOST_STEPS):
        means.append(sample.mean() / first)
        errors.append(sample.std(ddof=1) / math.sqrt(len(sample)) / first)
        if not LEAST_RATIO < means[-1] < 10:
            break
    return Curve(np.array(means), np.array(errors))


def first_step_below(mean: np.ndarray, ratio: float) -> int | None:
    below = np.flatnonzero(mean <= ratio)
    return int(below[0]) if len(below) else None


def best_descent(curvature: np.ndarray, ratio: float) -> int:
    start = 1 / np.sqrt(curvature)
    tried = (steps_to_reach(expected_losses(curvature, start, lr), ratio, 2000) for lr in np.linspace(0.5, 2, 151))
    return min(steps for steps in tried if steps is not None)


def rows(spectrum: str, curvature: np.ndarray) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    trace, start = float(curvature.sum()), 1 / np.sqrt(curvature)
    for probes in PROBES:
        effective = effective_slowdown(trace, 1.0, probes)
        dimension = slowdown(D, probes)
        assert dimension is not None
        curves = {factor: curve_of(curvature, factor / effective, probes) for factor in FACTORS_TRIED}
        results = []
        for ratio in RATIOS:
            steps, factor = min(
                (steps, factor)
                for factor, curve in curves.items()
                if (steps := first_step_below(curve.mean, ratio)) is not None
            )
            exact = [
                steps_to_reach(expected_losses(curvature, start, factor / effective, probes), ratio, MOST_STEPS)
                for factor in FACTORS_TRIED
            ]
            expected = min(steps for steps in exact if steps is not None)
            descent = best_descent(curvature, ratio)
            results.append(Row(spectrum, ratio, probes, descent, steps, factor, expected, dimension, effective))
        yield (
            results,
            {
                "spectrum": spectrum,
                "probes": probes,
                "lr": results[-1].rate / effective,
                "curve": curves[results[-1].rate],
            },
        )


def library_agrees(probes: int = 10, steps: int = 40, runs: int = 24) -> str:
    """Compare the losses after `steps` steps of the library's estimator with those of `losses`."""
    curvature = SPECTRA["even in the logarithm"]
    lr, weights = 1 / effective_slowdown(float(curvature.sum()), 1.0, probes), torch.from_numpy(curvature)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (batch * model.x.square()).sum() / 2  # type: ignore[operator]

    ends = []
    for run in range(runs):
        model = Point(weights.rsqrt())
        objective = Objective(model, loss)
        for step in range(steps):
            key = KEY.fold("slowdown", run).fold("step", step)
            estimate = Probing(Jvp(probes), Gaussian(), probes).estimate(objective, weights, key).gradient
            model.x.data.sub_(lr * flat(estimate))
        ends.append(float(objective.evaluate(weights, KEY)) / (D / 2))
    ours = np.array(ends)
    sampled = next(itertools.islice(losses(curvature, lr, probes, seed=0, runs=400), steps, None)) / (D / 2)
    expected = next(itertools.islice(expected_losses(curvature, 1 / np.sqrt(curvature), lr, probes), steps, None)) / (
        D / 2
    )
    error = math.hypot(ours.std() / math.sqrt(runs), sampled.std() / math.sqrt(len(sampled)))
    assert abs(ours.mean() - sampled.mean()) < 4 * error
    return (
        f"after {steps} steps with n = {probes} the library's estimator leaves {ours.mean():.4f} ± "
        f"{ours.std() / math.sqrt(runs):.4f} of the loss, sampling leaves {sampled.mean():.4f} ± "
        f"{sampled.std() / math.sqrt(len(sampled)):.4f}, and `expected_losses` predicts {expected:.4f}."
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| eigenvalues | f falls to | n | steps of gradient descent | steps | slow-down | `expected_losses` | "
        "`effective_slowdown` | `slowdown` | best lr, of 1/(L (1 + (r+1)/n)) |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        exact, effective, dimension = (
            f"{value:.1f} ({value / row.measured - 1:+.0%})" for value in (row.exact, row.effective, row.dimension)
        )
        lines.append(
            f"| {row.spectrum} | {row.ratio:g} | {row.probes} | {row.descent} | {row.steps:,} | {row.measured:.1f} | "
            f"{exact} | {effective} | {dimension} | {row.rate:.2f} |"
        )
    return "\n".join(lines)


def draw_chart(curves: list[dict[str, Any]]) -> Any:
    import altair as alt

    dots = []
    for entry in curves:
        curvature, mean = SPECTRA[entry["spectrum"]], entry["curve"].mean
        expected = expected_losses(curvature, 1 / np.sqrt(curvature), entry["lr"], entry["probes"])
        plotted = set(np.unique(np.geomspace(1, len(mean) - 1, 60).astype(int)).tolist())
        for step, loss in enumerate(itertools.islice(expected, len(mean))):
            if step in plotted:
                labels = {"step": step, "n": f"n = {entry['probes']}", "panel": f"eigenvalues {entry['spectrum']}"}
                dots.append(labels | {"loss": loss / (D / 2), "way": "expected_losses"})
                dots.append(labels | {"loss": float(mean[step]), "way": f"mean of {RUNS} runs"})
    x = alt.X("step:Q", title="steps", scale=alt.Scale(type="log"))
    y = alt.Y("loss:Q", title="loss, of the first", scale=alt.Scale(type="log"))
    chart = alt.Chart().encode(x=x, y=y, color=alt.Color("n:N", title=None))
    lines = chart.mark_line(strokeWidth=1).transform_filter(alt.datum.way == "expected_losses")
    points = chart.mark_point(size=14).transform_filter(alt.datum.way != "expected_losses")
    layers = alt.layer(lines, points, data=alt.Data(values=dots)).properties(width=340, height=240)
    return layers.facet(facet=alt.Facet("panel:N", title=None, sort=None), columns=2)


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    agreement = library_agrees()
    print(agreement, flush=True)
    results, curves = [], []
    for spectrum, curvature in SPECTRA.items():
        for group, curve in rows(spectrum, curvature):
            results += group
            curves.append(curve)
            print(table(group), f"{time.perf_counter() - started:.0f} s", flush=True)
    results.sort(key=lambda row: (list(SPECTRA).index(row.spectrum), -row.ratio, row.probes))
    ranks = ", ".join(f"{curvature.sum():.0f} ({name})" for name, curvature in SPECTRA.items())
    text = (
        f"Each problem is a quadratic of d = {D:,} weights and condition number 100 (eigenvalues 0.01 to 1; "
        f"effective ranks {ranks}). Every eigenvector starts with the same loss. Each row uses the best of "
        f'{len(FACTORS_TRIED)} constant learning rates. "Steps" are those until the mean loss of {RUNS} runs has '
        f'fallen to the share "f falls to". The runs sample g from its distribution. As a check, {agreement} In '
        "brackets: the error against the "
        f"measured slow-down. {time.perf_counter() - started:.0f} s on one thread.\n\n{table(results)}"
    )
    write_section("slowdown", text)
    draw_chart(curves).save(str(DOCS / "images" / "slowdown.svg"))


if __name__ == "__main__":
    main()
