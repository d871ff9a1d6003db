"""Which points to try, as values: a grid, a scrambled Sobol sequence, or a search that learns from what it tried.

A search is asked for one point after another, or for a stage of points where it does not learn:

    search = Sobol(points=16, seed=0, spans=(("lr", 1e-4, 1.0), ("eps", 1e-5, 1e-2)))
    ran = yield [trial(**point) for point in search.design()]

    search, tried = TPE(points=16, seed=0, spans=(("lr", 1e-4, 1.0),)), []
    while (point := search.ask(tried)) is not None:
        (run,) = yield [trial(**point)]
        tried.append((point, merit(run)))

Each says beforehand how many points it spends, and nothing stops one early: methods that are compared get as many.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from gradcost.core.value import digest, value

Point = dict[str, float]
History = Sequence[tuple[Mapping[str, float], float]]  # each point with its merit: more is better, -inf is worst
Spans = tuple[tuple[str, float, float], ...]  # what is searched over: its name, its least and its most


class Search(ABC):
    """A way of choosing points: a pure function of what was tried."""

    points: int  # how many it spends

    @abstractmethod
    def ask(self, history: History) -> Point | None:
        """The next point after those of the history; None when all are spent."""


class Design(Search):
    """A search that does not learn: all its points are known beforehand and can run side by side."""

    @abstractmethod
    def design(self) -> tuple[Point, ...]:
        """All points, in order."""

    def ask(self, history: History) -> Point | None:
        return self.design()[len(history)] if len(history) < self.points else None


@value
class Grid(Design):
    """`points` values from `low` to `high`, evenly spaced in their logarithm, to two digits.

    Raises: ValueError where two digits do not tell so many points apart.
    """

    low: float
    high: float
    points: int
    name: str = "lr"

    def __post_init__(self) -> None:
        _check(self.points, ((self.name, self.low, self.high),))
        if len(set(self.values())) < self.points:
            raise ValueError(
                f"{self.points} points between {self.low:g} and {self.high:g} are alike to two digits: give fewer, "
                "or a wider range."
            )

    def values(self) -> tuple[float, ...]:
        if self.points == 1:
            return (_rounded(math.sqrt(self.low * self.high), 2),)
        ratio = self.high / self.low
        return tuple(_rounded(self.low * ratio ** (i / (self.points - 1)), 2) for i in range(self.points))

    def design(self) -> tuple[Point, ...]:
        return tuple({self.name: x} for x in self.values())


@value
class Sobol(Design):
    """`points` of a scrambled Sobol sequence, evenly spread in the logarithms of all spans at once, to three digits.

    Law: of the first 2^m points, each of 2^m equal parts of a span (in its logarithm, before rounding) holds one.

    Source: Sobol' 1967; Owen 1998 (scrambling); `scipy.stats.qmc`. Raises: ValueError; ImportError without SciPy.
    """

    points: int
    seed: int
    spans: Spans

    def __post_init__(self) -> None:
        _check(self.points, self.spans)
        _check_widths(self.spans)
        if self.seed < 0:
            raise ValueError(f"a seed is 0 or more, not {self.seed}.")

    def design(self) -> tuple[Point, ...]:
        power = (self.points - 1).bit_length()  # drawn by powers of 2, as its balance asks
        drawn = _qmc().Sobol(len(self.spans), scramble=True, seed=self.seed).random_base2(power)
        return tuple(
            {name: _between(low, high, float(u)) for (name, low, high), u in zip(self.spans, row, strict=True)}
            for row in drawn[: self.points]
        )


@value
class TPE(Search):
    """The tree-structured Parzen estimator: points are drawn where good ones lie dense against bad ones.

    startup: how many points are drawn evenly (in the logarithm) before it learns. Each point depends on all before,
    so no two run side by side.

    Source: Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization, section 4; `optuna`. Raises:
    ValueError; ImportError without Optuna.
    """

    points: int
    seed: int
    spans: Spans
    startup: int = 10

    def __post_init__(self) -> None:
        _check(self.points, self.spans)
        _check_widths(self.spans)
        if self.startup < 1:
            raise ValueError(f"startup is 1 point or more, not {self.startup}.")

    def ask(self, history: History) -> Point | None:
        if len(history) >= self.points:
            return None
        optuna = _optuna()
        spans = {name: optuna.distributions.FloatDistribution(low, high, log=True) for name, low, high in self.spans}
        # A fresh stream for each point, so that it depends on nothing but the seed and what was tried.
        seed = int(digest((self.seed, len(history)), 4), 16)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup)
        said = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of every study that is made
        try:
            study = optuna.create_study(sampler=sampler, direction="maximize")
        finally:
            optuna.logging.set_verbosity(said)
        for point, merit in history:
            worth = -math.inf if math.isnan(merit) else merit
            study.add_trial(optuna.trial.create_trial(params=dict(point), distributions=spans, value=worth))
        asked = study.ask(spans).params
        return {name: _clamped(low, high, asked[name]) for name, low, high in self.spans}


def _between(low: float, high: float, share: float) -> float:
    return _clamped(low, high, low * (high / low) ** share)


def _clamped(low: float, high: float, x: float) -> float:
    return min(max(_rounded(x, 3), low), high)


def _rounded(x: float, digits: int) -> float:
    return float(f"{x:.{digits}g}")


def _check(points: int, spans: Spans) -> None:
    if points < 1:
        raise ValueError(f"a search spends 1 point or more, not {points}.")
    names = [name for name, _, _ in spans]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"a search is over 1 span or more, each of a name of its own, not {', '.join(names) or 'none'}."
        )
    for name, low, high in spans:
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"the span of {name} goes from above 0 to as much or more, not from {low!r} to {high!r}."
            )


def _check_widths(spans: Spans) -> None:
    for name, low, high in spans:
        if high < 1.001 * low:
            raise ValueError(f"three digits tell nothing apart between {low!r} and {high!r}: give {name} one value.")


def _qmc() -> Any:
    try:
        from scipy.stats import qmc
    except ImportError as error:
        raise ImportError('Sobol needs SciPy, which is not installed: pip install "gradcost[study]".') from error
    return qmc


def _optuna() -> Any:
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('TPE needs Optuna, which is not installed: pip install "gradcost[optuna]".') from error
    return optuna
