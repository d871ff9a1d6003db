"""Steps of forward gradients to those of gradient descent: `python benchmarks/slowdown.py`, minutes on one core.

On quadratics x'Hx/2 of 1,000 weights and condition 100, eigenvalues from 0.01 to 1 spaced evenly, or evenly in
their logarithm, started where each eigenvector holds the same loss. Each method takes its best constant step, found
by trying `STEPS_TRIED` on the runs themselves; counted are the steps until the mean loss of 6 runs is 1/100, or
1/10,000, of the first.

The runs do not call the library: they draw its estimate's exact distribution in one go, g = (q grad + sqrt(q) |grad|
u)/n with q ~ chi^2_n and u standard normal at right angles to the gradient (`expected_cosine` derives it). That the
library's estimator scatters alike is checked first, on 40 steps of it. Writes the part `slowdown` of docs/theory.md
and docs/images/slowdown.svg (extra report).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from theory import DOCS, KEY, Point, flat, written
from torch import Tensor, nn

from gradcost import Gaussian, Jvp, Objective, Probing
from gradcost.theory.quadratic import expected_losses, steps_to_reach
from gradcost.theory.slowdown import effective_slowdown, slowdown

D, RUNS, LEAST, MOST = 1000, 6, 1e-4, 100_000
PROBES, RATIOS = (1, 10, 100), (1e-2, 1e-4)
STEPS_TRIED = [1.2, 1.4, 1.6, 1.8, 2.0, 2.2]  # of 1/(L (1 + (r + 1)/n)); a method's best lies within
SPECTRA = {"even in the logarithm": np.geomspace(0.01, 1, D), "even": np.linspace(0.01, 1, D)}


class Curve(NamedTuple):
    """The mean loss of the runs at each step, as a share of the first, and its standard error."""

    mean: np.ndarray
    error: np.ndarray


class Row(NamedTuple):
    """Of one number of probes on one spectrum to one share of the first loss."""

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
    """f of each run after 0, 1, 2, ... steps."""
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


def followed(curvature: np.ndarray, lr: float, probes: int) -> Curve:
    """Until the mean is below `LEAST` of the first or has grown tenfold."""
    means, errors, first = [], [], D / 2
    for found in itertools.islice(losses(curvature, lr, probes, seed=probes), MOST):
        means.append(found.mean() / first)
        errors.append(found.std(ddof=1) / math.sqrt(len(found)) / first)
        if not LEAST < means[-1] < 10:
            break
    return Curve(np.array(means), np.array(errors))


def reached(mean: np.ndarray, ratio: float) -> int | None:
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
        curves = {factor: followed(curvature, factor / effective, probes) for factor in STEPS_TRIED}
        found = []
        for ratio in RATIOS:
            steps, factor = min(
                (steps, factor)
                for factor, curve in curves.items()
                if (steps := reached(curve.mean, ratio)) is not None
            )
            exact = [
                steps_to_reach(expected_losses(curvature, start, factor / effective, probes), ratio, MOST)
                for factor in STEPS_TRIED
            ]
            expected = min(steps for steps in exact if steps is not None)
            descent = best_descent(curvature, ratio)
            found.append(Row(spectrum, ratio, probes, descent, steps, factor, expected, dimension, effective))
        yield (
            found,
            {
                "spectrum": spectrum,
                "probes": probes,
                "lr": found[-1].rate / effective,
                "curve": curves[found[-1].rate],
            },
        )


def library_agrees(probes: int = 10, steps: int = 40, runs: int = 24) -> str:
    """Log losses after `steps` steps of the library's estimator and of `losses`: means and standard errors."""
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
            found = Probing(Jvp(probes), Gaussian(), probes).estimate(objective, weights, key).gradient
            model.x.data.sub_(lr * flat(found))
        ends.append(float(objective.evaluate(weights, KEY)) / (D / 2))
    ours = np.array(ends)
    drawn = next(itertools.islice(losses(curvature, lr, probes, seed=0, runs=400), steps, None)) / (D / 2)
    stated = next(itertools.islice(expected_losses(curvature, 1 / np.sqrt(curvature), lr, probes), steps, None)) / (
        D / 2
    )
    error = math.hypot(ours.std() / math.sqrt(runs), drawn.std() / math.sqrt(len(drawn)))
    assert abs(ours.mean() - drawn.mean()) < 4 * error
    return (
        f"After {steps} steps with n = {probes} the library's estimator leaves {ours.mean():.4f} ± "
        f"{ours.std() / math.sqrt(runs):.4f} of the loss, the runs' shortcut {drawn.mean():.4f} ± "
        f"{drawn.std() / math.sqrt(len(drawn)):.4f}, and `expected_losses` states {stated:.4f}."
    )


def table(found: list[Row]) -> str:
    lines = [
        "| eigenvalues | f falls to | n | steps of gradient descent | steps | slow-down | `expected_losses` | "
        "`effective_slowdown` | `slowdown` | best lr, of 1/(L (1 + (r+1)/n)) |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        exact, effective, dimension = (
            f"{stated:.1f} ({stated / row.measured - 1:+.0%})" for stated in (row.exact, row.effective, row.dimension)
        )
        lines.append(
            f"| {row.spectrum} | {row.ratio:g} | {row.probes} | {row.descent} | {row.steps:,} | {row.measured:.1f} | "
            f"{exact} | {effective} | {dimension} | {row.rate:.2f} |"
        )
    return "\n".join(lines)


def picture(curves: list[dict[str, Any]]) -> Any:
    import altair as alt

    dots = []
    for drawn in curves:
        curvature, mean = SPECTRA[drawn["spectrum"]], drawn["curve"].mean
        stated = expected_losses(curvature, 1 / np.sqrt(curvature), drawn["lr"], drawn["probes"])
        places = set(np.unique(np.geomspace(1, len(mean) - 1, 60).astype(int)).tolist())
        for step, loss in enumerate(itertools.islice(stated, len(mean))):
            if step in places:
                told = {"step": step, "n": f"n = {drawn['probes']}", "panel": f"eigenvalues {drawn['spectrum']}"}
                dots.append(told | {"loss": loss / (D / 2), "way": "expected_losses"})
                dots.append(told | {"loss": float(mean[step]), "way": f"mean of {RUNS} runs"})
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
    agreed = library_agrees()
    print(agreed, flush=True)
    found, curves = [], []
    for spectrum, curvature in SPECTRA.items():
        for some, curve in rows(spectrum, curvature):
            found += some
            curves.append(curve)
            print(table(some), f"{time.perf_counter() - started:.0f} s", flush=True)
    found.sort(key=lambda row: (list(SPECTRA).index(row.spectrum), -row.ratio, row.probes))
    ranks = ", ".join(f"{curvature.sum():.0f} ({name})" for name, curvature in SPECTRA.items())
    text = (
        f"Quadratics of d = {D:,} weights and condition 100 (eigenvalues 0.01 to 1; effective ranks {ranks}), "
        "started where each eigenvector holds the same loss; every method at its best constant step, of "
        f"{len(STEPS_TRIED)} tried on the runs; steps until the mean of {RUNS} runs has fallen. {agreed} In "
        "brackets: how far a statement is off the "
        f"measured slow-down. {time.perf_counter() - started:.0f} s on one thread.\n\n{table(found)}"
    )
    written("slowdown", text)
    picture(curves).save(str(DOCS / "images" / "slowdown.svg"))


if __name__ == "__main__":
    main()
