"""What is unfair in a study, or says less than it seems to: rules over its facts.

A finding of severity E makes the comparison unfair or its figures wrong; one of severity W makes them weaker than
they look. The faults are those that audits of published comparisons of gradients found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, log2, sqrt
from typing import Any

from gradcost.core.units import count, number
from gradcost.core.value import value
from gradcost.results.facts import Effort, Fact, Looked, Ran, Ranking, Regime, Scored, Seeds, Settled, Timed, Winners

ALPHA = 0.05
ENOUGH = floor(1 - log2(ALPHA)) + 1  # pairs: with fewer an exact paired test cannot give p < ALPHA
ALIKE = 1.1  # FLOPs within this factor are equal budgets

Found = Iterator[tuple[str, str]]  # the method, and a sentence with the figures


@value
class Finding:
    """One fault: the code and the name of its rule, the method it is found in, what was found, and what to do."""

    code: str
    rule: str
    method: str
    found: str
    remedy: str

    @property
    def severity(self) -> str:
        """ "error" or "warning"."""
        return "error" if self.code.startswith("E") else "warning"


@dataclass(frozen=True)
class Rule:
    """find: from all facts of one `kind` the methods at fault, each with a sentence."""

    code: str
    name: str
    kind: type[Any]
    find: Callable[[Any], Found]
    remedy: str


def edge(searches: Sequence[Winners]) -> Found:
    for fact in searches:
        if fact.on_edge:
            counted = f"{fact.on_edge} of {fact.searches} winners lie on an edge of what was tried"
            yield fact.method, fact.which or counted


def unequal(efforts: Sequence[Effort]) -> Found:
    """Fair in one currency is fair: as many points and steps for each, or as many FLOPs."""
    if len(efforts) < 2 or _equal_runs(efforts) or _equal_flops(efforts):
        return
    most, least = max(efforts, key=_spent), min(efforts, key=_spent)
    yield least.method, f"tuned on {_told(least)}, against {_told(most)} for {most.method}"


def _equal_runs(efforts: Sequence[Effort]) -> bool:
    return len({(fact.points, fact.steps) for fact in efforts}) == 1


def _equal_flops(efforts: Sequence[Effort]) -> bool:
    flops = [fact.flops for fact in efforts if fact.flops]
    return len(flops) == len(efforts) and max(flops) <= ALIKE * min(flops)


def _spent(fact: Effort) -> tuple[int, int]:
    return fact.points, fact.steps or 0


def _told(fact: Effort) -> str:
    text = count(fact.points, "point")
    text += f" of {fact.steps:,} steps in all" if fact.steps is not None else ""
    return text if fact.flops is None else f"{text} and {fact.flops:.2g} FLOPs"


def regime(regimes: Sequence[Regime]) -> Found:
    for fact in regimes:
        if fact.tuned != fact.trained:
            yield fact.method, f"{fact.what}: tuned with {fact.tuned}, trained with {fact.trained}"


def noise(rankings: Sequence[Ranking]) -> Found:
    for fact in rankings:
        if len(fact.scores) < 2:
            continue
        (name, top), (second, score) = fact.scores[:2]
        if fact.spread is None:
            apart = f"{name} leads {second} by {_points(top - score)}"
            yield fact.method, f"{apart} of accuracy on one seed, which cannot tell whether that is noise"
            continue
        near = [other for other in fact.scores if top - other[1] <= fact.spread]
        if len(near) > 1:
            within = f"within {_points(top - near[-1][1])} of accuracy"
            names = ", ".join(other for other, _ in near)
            yield fact.method, f"{names} are one: {within}, a seed's spread being {_points(fact.spread)}"


def signal(rankings: Sequence[Ranking]) -> Found:
    for fact in rankings:
        if not fact.scores:
            if fact.diverged:
                yield fact.method, f"all {count(fact.diverged, 'point')} diverged"
        elif fact.chance is not None and fact.scores[0][1] <= fact.chance + _luck(fact.chance, fact.targets):
            name, top = fact.scores[0]
            yield (
                fact.method,
                f"the best point, {name}, is at {top:.1%} accuracy, where guessing gives {fact.chance:.1%}",
            )


def _luck(chance: float, targets: int | None) -> float:
    """What the best of a grid of guessers may have above chance: three standard deviations of a mean over `targets`,
    or a twentieth of the way to perfect, which is less than any method worth naming reaches."""
    return max(0.05 * (1 - chance), 3 * sqrt(chance * (1 - chance) / targets) if targets else 0.0)


def subset(scored: Sequence[Scored]) -> Found:
    for fact in scored:
        if fact.seen < fact.of:
            yield fact.method, f"the {fact.what} is the mean over {fact.seen:,} of {fact.of:,} examples"


def override(settled: Sequence[Settled]) -> Found:
    for fact in settled:
        if fact.overruled:
            counted = f"{fact.overruled} of {fact.searches} winners were overruled by hand"
            yield fact.method, f"trained at {fact.which}" if fact.which else counted


def touched(looked: Sequence[Looked]) -> Found:
    for fact in looked:
        why = []
        if fact.early:
            why.append(f"{count(fact.early, 'test score')} before the final runs")
        if fact.rates > 1:
            why.append(f"final runs at {fact.rates} learning rates")
        elif fact.looks > fact.seeds:
            why.append(f"{count(fact.looks, 'test score')} of {count(fact.seeds, 'seed')}")
        if why:
            yield fact.method, "; ".join(why)


def seeds(counted: Sequence[Seeds]) -> Found:
    for fact in counted:
        if fact.seeds == 1:
            yield fact.method, "one seed: its luck cannot be told from the method"
        elif fact.seeds < ENOUGH:
            least = number(2.0 ** (1 - fact.seeds))
            yield fact.method, f"{fact.seeds} seeds: whatever they show, a paired test gives p of {least} or more"


def mixed(ran: Sequence[Ran]) -> Found:
    for fact in ran:
        if len(fact.found) > 1:
            yield fact.method, f"{fact.what} was not the same in all runs: {', '.join(fact.found)}"


def load(timed: Sequence[Timed]) -> Found:
    for fact in timed:
        if fact.doubt is not None:
            yield fact.method, fact.doubt


def _points(x: float) -> str:
    return f"{number(100 * x, 2)} points"


RULES = (
    Rule("E101", "edge", Winners, edge, "Extend the grid beyond that edge and tune again: the best may lie there."),
    Rule("E102", "unequal tuning", Effort, unequal, "Give each method as many points and steps, or as many FLOPs."),
    Rule("E205", "regime", Regime, regime, "Tune in the setting that is trained in: what wins depends on it."),
    Rule("E301", "subset", Scored, subset, "Score the whole split, each example once."),
    Rule("E302", "override", Settled, override, "Train with what tuning chose, or tune over what you want instead."),
    Rule(
        "E303", "test set", Looked, touched, "Choose on validation; look at the test split once a seed, at the end."
    ),
    Rule("W110", "noise", Ranking, noise, "Confirm the best few on fresh seeds, or read nothing into which one won."),
    Rule("W111", "seeds", Seeds, seeds, f"Run {ENOUGH} seeds or more: with fewer no test can give p < {ALPHA}."),
    Rule(
        "W120", "no signal", Ranking, signal, "Widen the grid or train for longer: nothing was learned to choose by."
    ),
    Rule("W401", "environment", Ran, mixed, "Run everything again in one environment, by one code, in a new folder."),
    Rule(
        "W402", "load", Timed, load, "Run the same command again on a quiet machine: it times what is in doubt anew."
    ),
)


def lint(facts: Iterable[Fact]) -> list[Finding]:
    """All that the rules find in the facts of a study, errors first, in the order of the rules."""
    facts = list(facts)
    return [
        Finding(rule.code, rule.name, method, found, rule.remedy)
        for rule in RULES
        for method, found in rule.find([fact for fact in facts if isinstance(fact, rule.kind)])
    ]


def unlooked(facts: Iterable[Fact]) -> list[Rule]:
    """The rules that had nothing to look at: no fact of their kind is known."""
    kinds = {type(fact) for fact in facts}
    return [rule for rule in RULES if rule.kind not in kinds]
