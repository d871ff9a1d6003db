"""Compare second moments and cosines of estimates with theory. Takes about 5 minutes on one core.

    python benchmarks/theory.py

- Estimates: eight pairs of directions and combination, each with n = 1, 16 and 256 probes. The library's estimator
  draws them with forward-mode slopes, up to 64 per forward.
- Problems: a quadratic of 1,000 weights (float64), and the digits MLP (4,810 weights, float32) before, halfway
  through and after 2,000 steps of SGD by backpropagation.
- Reference: the gradient of the same batch.

Writes the table between the marks `theory` in docs/theory.md, and docs/images/theory.svg. Needs the extra report.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradcost
from gradcost import Gaussian, Gradient, Jvp, Key, Objective, Probing, Rademacher
from gradcost.directions import Coordinates, Sphere
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators import Mean, Projection
from gradcost.tasks.digits import Digits
from gradcost.theory.cosines import cosine_along_coordinates, expected_cosine
from gradcost.theory.moments import second_moment

DOCS = Path(__file__).parents[1] / "docs"
KEY = Key(0).fold("theory")
DRAWS = {1: 6000, 16: 500, 256: 40}
TOGETHER, STEPS, RATE = 64, 2000, 0.1
PAIRS = [(Gaussian(), Mean()), (Rademacher(), Mean()), (Sphere(), Mean()), (Orthogonal(), Mean())]
PAIRS += [(Coordinates(), Mean()), (Gaussian(), Projection()), (Rademacher(), Projection()), (Sphere(), Projection())]


class Problem(NamedTuple):
    """A point at which gradients are estimated."""

    name: str
    about: str
    objective: Objective
    batch: Any


class Row(NamedTuple):
    """One estimator on one problem: values in theory, and measured values with standard errors in units of them."""

    problem: str
    pair: str
    probes: int
    moment: float
    measured_moment: float
    moment_error: float
    cosine: float
    measured_cosine: float
    cosine_error: float
    given: float  # cosine in theory for this gradient, in units of the one for an unknown gradient


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([leaf.detach().double().flatten() for _, leaf in gradient.leaves()])


class Point(nn.Module):
    """A model whose only parameter is a point x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


def quadratic() -> Problem:
    """Return f = x'Hx/2 with H diagonal, eigenvalues from 1 to 100 spaced evenly in their logarithm."""
    generator = torch.Generator().manual_seed(0)
    model = Point(torch.randn(1000, dtype=torch.float64, generator=generator))
    curvature = torch.logspace(0, 2, 1000, dtype=torch.float64)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (batch * model.x.square()).sum() / 2  # type: ignore[operator]

    return Problem("quadratic", "curvature 1 to 100", Objective(model, loss), curvature)


def digits() -> Iterator[Problem]:
    """Yield the MLP before, halfway through and after training, each with the batch of the next step."""
    task, key = Digits(), KEY.fold("digits")
    training = gradcost.train(task, gradcost.backprop(), gradcost.SGD(RATE), key, STEPS)
    objective = task.objective(key.fold("init"))
    for number in (0, STEPS // 2, STEPS):
        for step in training if number else ():
            objective = step.objective
            if step.number == number - 1:
                break
        batch = task.batch_at(key.fold("data"), number)
        loss = float(objective.evaluate(batch, key))
        yield Problem(f"digits, step {number:,}", f"loss {loss:.3f}", objective, batch)


def compare(problem: Problem) -> Iterator[Row]:
    gradient = flat(gradcost.backprop().estimate(problem.objective, problem.batch, KEY).gradient)
    d, length = problem.objective.dimension, float(gradient.norm())
    for directions, combine in PAIRS:
        for probes, draws in DRAWS.items():
            estimator = Probing(Jvp(together=min(probes, TOGETHER)), directions, probes, combine)
            moment, cosine = second_moment(estimator, d), expected_cosine(estimator, d)
            assert moment is not None
            assert cosine is not None
            moments, cosines = [], []
            for draw in range(draws):
                key = KEY.fold(repr(estimator), draw)
                estimate = flat(estimator.estimate(problem.objective, problem.batch, key).gradient)
                norm = float(estimate.norm())
                moments.append((norm / length) ** 2)
                cosines.append(float(estimate @ gradient) / (norm * length) if norm else 0.0)
            given = cosine_along_coordinates(gradient, probes) if directions == Coordinates() else cosine
            label = f"{directions!r} x {combine!r}".replace("()", "")
            yield Row(problem.name, label, probes, *ratio(moments, moment), *ratio(cosines, cosine), given / cosine)


def ratio(sample: list[float], expected: float) -> tuple[float, float, float]:
    """Return the expected value, and the mean of a sample with its standard error in units of it."""
    return expected, statistics.fmean(sample) / expected, statistics.stdev(sample) / len(sample) ** 0.5 / expected


def table(rows: list[Row], problems: list[Problem]) -> str:
    names = [problem.name for problem in problems]
    lines = [
        "| directions x combine | n | E\\|g\\|² in theory | "
        + " | ".join(names)
        + " | cosine in theory | "
        + " | ".join(names)
        + " |",
        "|:---|---:|" + "---:|" * (2 * len(names) + 2),
    ]
    for pair in dict.fromkeys(row.pair for row in rows):
        for probes in DRAWS:
            group = [row for row in rows if (row.pair, row.probes) == (pair, probes)]
            moments = [f"{row.measured_moment:.3f} ± {row.moment_error:.3f}" for row in group]
            cosines = [f"{row.measured_cosine:.3f} ± {row.cosine_error:.3f}" for row in group]
            expected = [
                dict.fromkeys(f"{row.moment:.4g}" for row in group),
                dict.fromkeys(f"{row.cosine:.3g}" for row in group),
            ]
            cells = [pair, str(probes), ", ".join(expected[0]), *moments, ", ".join(expected[1]), *cosines]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def coordinates_table(rows: list[Row], problems: list[Problem]) -> str:
    """Return the cosines of Coordinates for each gradient, in units of the one for an isotropic gradient."""
    lines = ["| n | " + " | ".join(problem.name for problem in problems) + " |", "|---:|" + "---:|" * len(problems)]
    for probes in DRAWS:
        group = [row for row in rows if row.pair.startswith("Coordinates") and row.probes == probes]
        cells = [f"{row.given:.3f}; measured {row.measured_cosine:.3f} ± {row.cosine_error:.3f}" for row in group]
        lines.append(f"| {probes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """State the distance between measurements and theory; cosines of Coordinates use the gradient itself."""
    moments = [(abs(row.measured_moment - 1), row) for row in rows]
    cosines = [(abs(row.measured_cosine / row.given - 1), row) for row in rows]
    sentences = []
    for what, distances in (("second moments", moments), ("cosines", cosines)):
        share = sum(gap <= 0.05 for gap, _ in distances)
        gap, row = max(distances, key=lambda pair: pair[0])
        sentences.append(
            f"{share} of {len(distances)} {what} are within 5% of theory; the farthest, {row.pair} with "
            f"n = {row.probes} on {row.problem}, is {100 * gap:.1f}% off."
        )
    square = statistics.fmean(((row.measured_moment - 1) / row.moment_error) ** 2 for row in rows)
    sentences.append(f"The mean square of the second moments' deviations, in standard errors, is {square:.2f}.")
    return " ".join(sentences)


def draw_chart(rows: list[Row]) -> Any:
    import altair as alt

    dots = []
    for row in rows:
        for what, mean, error in (
            ("second moment", row.measured_moment, row.moment_error),
            ("cosine", row.measured_cosine / row.given, row.cosine_error / row.given),
        ):
            labels = {"pair": row.pair, "place": row.problem, "panel": f"{what}, n = {row.probes}"}
            dots.append(labels | {"ratio": mean, "low": mean - 2 * error, "high": mean + 2 * error})
    order = [f"{what}, n = {probes}" for what in ("second moment", "cosine") for probes in DRAWS]
    y = alt.Y("pair:N", title=None, sort=None)
    offset = alt.YOffset("place:N", sort=None)
    scale = alt.Scale(domain=[0.85, 1.2])
    x = alt.X("ratio:Q", title="measured / theory", scale=scale)
    base = alt.Chart().encode(y=y, yOffset=offset, color=alt.Color("place:N", title=None, sort=None))
    band = (
        alt.Chart().mark_rect(color="#ddd", opacity=0.4).encode(x=alt.XDatum(0.95, scale=scale), x2=alt.datum(1.05))
    )
    bars = base.mark_rule().encode(x=alt.X("low:Q", title="measured / theory", scale=scale), x2="high:Q")
    points = base.mark_point(filled=True, size=30).encode(x=x)
    layers = alt.layer(band, bars, points, data=alt.Data(values=dots)).properties(width=230, height=230)
    return layers.facet(facet=alt.Facet("panel:N", title=None, sort=order), columns=3)


def write_section(name: str, text: str) -> None:
    """Write the text between the marks `name` of docs/theory.md."""
    page = DOCS / "theory.md"
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    page.write_text(before + start + text + end + after, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    problems, every = [], []
    for problem in itertools.chain([quadratic()], digits()):
        problems.append(problem)
        every += compare(problem)
        print(problem.name, f"{time.perf_counter() - started:.0f} s", flush=True)
    setups = "; ".join(f"{each.name} ({each.about}, {each.objective.dimension:,} weights)" for each in problems)
    draws = ", ".join(f"{draws:,} estimates of n = {probes}" for probes, draws in DRAWS.items())
    write_section(
        "theory",
        f'Each cell is measured / theory ± one standard error, from {draws}. "In theory": first for 1,000 '
        f"weights, then for 4,810 weights. Problems: {setups}. torch {torch.__version__}, "
        f"{time.perf_counter() - started:.0f} s on one thread. {summary(every)}\n\n{table(every, problems)}\n\n"
        "The cosine of `Coordinates` for each gradient (`cosine_along_coordinates`), in units of the cosine for an "
        f"evenly spread (isotropic) gradient:\n\n{coordinates_table(every, problems)}",
    )
    draw_chart(every).save(str(DOCS / "images" / "theory.svg"))


if __name__ == "__main__":
    main()
