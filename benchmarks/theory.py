"""Second moments and cosines of estimates beside theory: `python benchmarks/theory.py`, about 5 minutes of one core.

n = 1, 16 and 256 probes of eight pairs of directions and combination, each drawn through the library's own estimator
with forward-mode slopes, sharing a forward by up to 64: on a quadratic of 1,000 weights (float64) and on the digits
MLP (4,810 weights, float32) before, halfway through and after 2,000 steps of SGD by backpropagation. The truth is
the gradient of the same batch. Writes the table between the marks `theory` in docs/theory.md and
docs/images/theory.svg (extra report).
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


class Place(NamedTuple):
    """Where a gradient is looked at."""

    name: str
    about: str
    objective: Objective
    batch: Any


class Row(NamedTuple):
    """Of one estimator at one place: what theory states; what was measured and its standard error, in units of it."""

    place: str
    pair: str
    probes: int
    moment: float
    measured_moment: float
    moment_error: float
    cosine: float
    measured_cosine: float
    cosine_error: float
    given: float  # the cosine that theory states for this very gradient, in units of that without knowing it


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([leaf.detach().double().flatten() for _, leaf in gradient.leaves()])


class Point(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


def quadratic() -> Place:
    """f = x'Hx/2, H with eigenvalues spaced evenly in their logarithm from 1 to 100, on the weights' own axes."""
    generator = torch.Generator().manual_seed(0)
    model = Point(torch.randn(1000, dtype=torch.float64, generator=generator))
    curvature = torch.logspace(0, 2, 1000, dtype=torch.float64)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (batch * model.x.square()).sum() / 2  # type: ignore[operator]

    return Place("quadratic", "curvature 1 to 100", Objective(model, loss), curvature)


def digits() -> Iterator[Place]:
    """The MLP before, halfway through and after training, each time with the batch of the step to come."""
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
        yield Place(f"digits, step {number:,}", f"loss {loss:.3f}", objective, batch)


def rows(place: Place) -> Iterator[Row]:
    gradient = flat(gradcost.backprop().estimate(place.objective, place.batch, KEY).gradient)
    d, length = place.objective.dimension, float(gradient.norm())
    for directions, combine in PAIRS:
        for probes, draws in DRAWS.items():
            estimator = Probing(Jvp(together=min(probes, TOGETHER)), directions, probes, combine)
            moment, cosine = second_moment(estimator, d), expected_cosine(estimator, d)
            assert moment is not None
            assert cosine is not None
            moments, cosines = [], []
            for draw in range(draws):
                key = KEY.fold(repr(estimator), draw)
                found = flat(estimator.estimate(place.objective, place.batch, key).gradient)
                across = float(found.norm())
                moments.append((across / length) ** 2)
                cosines.append(float(found @ gradient) / (across * length) if across else 0.0)
            given = cosine_along_coordinates(gradient, probes) if directions == Coordinates() else cosine
            label = f"{directions!r} x {combine!r}".replace("()", "")
            yield Row(place.name, label, probes, *ratio(moments, moment), *ratio(cosines, cosine), given / cosine)


def ratio(drawn: list[float], stated: float) -> tuple[float, float, float]:
    """What is stated; the mean of what was drawn and its standard error, in units of that."""
    return stated, statistics.fmean(drawn) / stated, statistics.stdev(drawn) / len(drawn) ** 0.5 / stated


def table(found: list[Row], places: list[Place]) -> str:
    names = [place.name for place in places]
    lines = [
        "| directions x combine | n | E\\|g\\|² in theory | "
        + " | ".join(names)
        + " | cosine in theory | "
        + " | ".join(names)
        + " |",
        "|:---|---:|" + "---:|" * (2 * len(names) + 2),
    ]
    for pair in dict.fromkeys(row.pair for row in found):
        for probes in DRAWS:
            some = [row for row in found if (row.pair, row.probes) == (pair, probes)]
            moments = [f"{row.measured_moment:.3f} ± {row.moment_error:.3f}" for row in some]
            cosines = [f"{row.measured_cosine:.3f} ± {row.cosine_error:.3f}" for row in some]
            stated = [
                dict.fromkeys(f"{row.moment:.4g}" for row in some),
                dict.fromkeys(f"{row.cosine:.3g}" for row in some),
            ]
            cells = [pair, str(probes), ", ".join(stated[0]), *moments, ", ".join(stated[1]), *cosines]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def coordinates(found: list[Row], places: list[Place]) -> str:
    """Of Coordinates: the cosine for the gradient at hand, in units of that for one without preferred directions."""
    lines = ["| n | " + " | ".join(place.name for place in places) + " |", "|---:|" + "---:|" * len(places)]
    for probes in DRAWS:
        some = [row for row in found if row.pair.startswith("Coordinates") and row.probes == probes]
        cells = [f"{row.given:.3f}; measured {row.measured_cosine:.3f} ± {row.cosine_error:.3f}" for row in some]
        lines.append(f"| {probes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(found: list[Row]) -> str:
    """How far measurements are from theory, with Coordinates' cosines against those for the gradient at hand."""
    moments = [(abs(row.measured_moment - 1), row) for row in found]
    cosines = [(abs(row.measured_cosine / row.given - 1), row) for row in found]
    sentences = []
    for what, away in (("second moments", moments), ("cosines", cosines)):
        share = sum(gap <= 0.05 for gap, _ in away)
        gap, row = max(away, key=lambda pair: pair[0])
        sentences.append(
            f"{share} of {len(away)} {what} are within 5% of theory; the farthest, {row.pair} with n = {row.probes} "
            f"on {row.place}, is {100 * gap:.1f}% off."
        )
    square = statistics.fmean(((row.measured_moment - 1) / row.moment_error) ** 2 for row in found)
    return (
        f"{' '.join(sentences)} In standard errors, the mean square of the second moments' distances is {square:.2f}."
    )


def picture(found: list[Row]) -> Any:
    import altair as alt

    dots = []
    for row in found:
        for what, mean, error in (
            ("second moment", row.measured_moment, row.moment_error),
            ("cosine", row.measured_cosine / row.given, row.cosine_error / row.given),
        ):
            told = {"pair": row.pair, "place": row.place, "panel": f"{what}, n = {row.probes}"}
            dots.append(told | {"ratio": mean, "low": mean - 2 * error, "high": mean + 2 * error})
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


def written(name: str, text: str) -> None:
    """Put the text between the marks `name` of docs/theory.md."""
    page = DOCS / "theory.md"
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    _, after = rest.split(end)
    page.write_text(before + start + text + end + after, encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    places, found = [], []
    for place in itertools.chain([quadratic()], digits()):
        places.append(place)
        found += rows(place)
        print(place.name, f"{time.perf_counter() - started:.0f} s", flush=True)
    told = "; ".join(f"{place.name} ({place.about}, {place.objective.dimension:,} weights)" for place in places)
    draws = ", ".join(f"{draws:,} estimates of n = {probes}" for probes, draws in DRAWS.items())
    written(
        "theory",
        f"{draws}; measured / theory ± one standard error. {told}. torch {torch.__version__}, "
        f"{time.perf_counter() - started:.0f} s on one thread. {verdict(found)}\n\n{table(found, places)}\n\n"
        "Coordinates' cosine for the gradient at hand (`cosine_along_coordinates`), in units of the cosine for one "
        f"that points in no preferred direction:\n\n{coordinates(found, places)}",
    )
    picture(found).save(str(DOCS / "images" / "theory.svg"))


if __name__ == "__main__":
    main()
