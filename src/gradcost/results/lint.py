"""Rules that detect unfair comparisons and weak conclusions.

- E (error): the comparison is unfair or its numbers are wrong.
- W (warning): its conclusions are weaker than they look.

Each rule detects a fault that audits found in published comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import floor, log2
from typing import Any

from gradcost.core.metric import Metric
from gradcost.core.units import count, number
from gradcost.core.value import value
from gradcost.results import comparability
from gradcost.results.comparability import MethodDesign, Violations
from gradcost.results.effort import TrainingEffort, TuningEffort, unequal_training, unequal_tuning
from gradcost.results.facts import (
    Environment,
    Fact,
    OverriddenWinners,
    ScoreCoverage,
    SeedCount,
    Setting,
    Timing,
    TuningScores,
    TuningWinners,
    UseOfTestSet,
)
from gradcost.results.publication import Statement, contradicted_statements

ALPHA = 0.05
ENOUGH = floor(1 - log2(ALPHA)) + 1  # seeds; with fewer seeds an exact paired test cannot give p < ALPHA


@value
class Finding:
    """One violation of a rule.

    Args:
        code: code of the rule, such as "E101".
        rule: name of the rule.
        method: the method that violates it.
        found: the violation in words, with numbers.
        remedy: how to correct it.
    """

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
    """A rule, checked on all facts of one class.

    Args:
        code: E or W and a number.
        name: short name.
        kind: the class of the facts.
        check: takes the facts of this class; yields (method, sentence) for each violation.
        remedy: how to correct a violation.
    """

    code: str
    name: str
    kind: type[Any]
    check: Callable[[Any], Violations]
    remedy: str


def winners_on_edge(facts: Sequence[TuningWinners]) -> Violations:
    for fact in facts:
        if fact.on_edge:
            counted = f"{fact.on_edge} of {fact.searches} winners lie on an edge of what was tried"
            yield fact.method, fact.which or counted


def changed_settings(facts: Sequence[Setting]) -> Violations:
    for fact in facts:
        if fact.tuned != fact.trained:
            yield fact.method, f"{fact.what}: tuned with {fact.tuned}, trained with {fact.trained}"


def winner_within_noise(facts: Sequence[TuningScores]) -> Violations:
    for fact in facts:
        if len(fact.scores) < 2:
            continue
        (winner, top), (second, second_score) = fact.scores[:2]
        if fact.spread is None:
            lead = f"{winner} leads {second} by {_gap(top - second_score, fact.metric)}"
            yield fact.method, f"{lead} on one seed, so the noise between seeds is unknown"
            continue
        near = [other for other in fact.scores if top - other[1] <= fact.spread]
        if len(near) > 1:
            names = ", ".join(other for other, _ in near)
            gap = f"lie within {_gap(top - near[-1][1], fact.metric)}"
            spread = _points(fact.spread) if fact.metric.is_accuracy else number(fact.spread)
            yield fact.method, f"{names} {gap}, and the spread between seeds is {spread}"


def nothing_learned(facts: Sequence[TuningScores]) -> Violations:
    for fact in facts:
        if not fact.scores:
            if fact.diverged:
                yield fact.method, f"all {count(fact.diverged, 'point')} diverged"
        elif fact.guess is not None and fact.scores[0][1] <= fact.guess.limit(fact.targets):
            name, top = fact.scores[0]
            yield fact.method, f"the best point, {name}, has {top:.1%} accuracy, and {fact.guess.text}"


def partial_scores(facts: Sequence[ScoreCoverage]) -> Violations:
    for fact in facts:
        if fact.targets < fact.of:
            yield fact.method, f"the {fact.what} is the mean over {fact.targets:,} of {fact.of:,} examples"


def overridden_winners(facts: Sequence[OverriddenWinners]) -> Violations:
    for fact in facts:
        if fact.overruled:
            counted = f"{fact.overruled} of {fact.searches} winners were replaced by hand"
            yield fact.method, f"trained at {fact.which}" if fact.which else counted


def reused_test_set(facts: Sequence[UseOfTestSet]) -> Violations:
    for fact in facts:
        why = []
        if fact.early:
            why.append(f"{count(fact.early, 'test score')} before the final runs")
        if fact.rates > 1:
            why.append(f"final runs at {fact.rates} learning rates")
        elif fact.final > fact.seeds:
            why.append(f"{count(fact.final, 'test score')} of {count(fact.seeds, 'seed')}")
        if why:
            yield fact.method, "; ".join(why)


def few_seeds(facts: Sequence[SeedCount]) -> Violations:
    for fact in facts:
        if fact.seeds == 1:
            yield fact.method, "one seed: the effect of the seed and of the method cannot be separated"
        elif fact.seeds < ENOUGH:
            least = number(2.0 ** (1 - fact.seeds))
            yield fact.method, f"{fact.seeds} seeds: a paired test cannot give p below {least}"


def changed_environment(facts: Sequence[Environment]) -> Violations:
    for fact in facts:
        if len(fact.values) > 1:
            yield fact.method, f"{fact.what} was not the same in all runs: {', '.join(fact.values)}"


def doubtful_timing(facts: Sequence[Timing]) -> Violations:
    for fact in facts:
        if fact.doubt is not None:
            yield fact.method, fact.doubt.partition("; time it again")[0]  # the advice of the rule says so


def _gap(x: float, metric: Metric) -> str:
    return f"{_points(x)} of accuracy" if metric.is_accuracy else f"{number(x)} of {metric.name}"


def _points(x: float) -> str:
    return f"{number(100 * x, 2)} points"


RULES = (
    Rule(
        "E101",
        "edge",
        TuningWinners,
        winners_on_edge,
        "Extend the grid beyond that edge and tune again: the best value may lie there.",
    ),
    Rule(
        "E102",
        "unequal tuning",
        TuningEffort,
        unequal_tuning,
        "Give each method equally many points and steps, or equal FLOPs or seconds.",
    ),
    Rule(
        "E106",
        "unequal training",
        TrainingEffort,
        unequal_training,
        "Train each method for equally many steps, or equal FLOPs or seconds.",
    ),
    Rule(
        "E205",
        "setting",
        Setting,
        changed_settings,
        "Tune with the settings of the final runs: the best hyperparameters depend on them.",
    ),
    Rule(
        "E206",
        "different settings",
        MethodDesign,
        comparability.different_settings,
        "Give all methods one task, model, batch and optimizer, or compare within those that share them.",
    ),
    Rule("E207", "statement", Statement, contradicted_statements, "Correct the text, or run what it states."),
    Rule("E301", "subset", ScoreCoverage, partial_scores, "Score the whole split, each example once."),
    Rule(
        "E302",
        "override",
        OverriddenWinners,
        overridden_winners,
        "Train with what tuning chose, or add the value to the grid and tune again.",
    ),
    Rule(
        "E303",
        "test set",
        UseOfTestSet,
        reused_test_set,
        "Choose on the validation split. Score the test split once per seed, at the end.",
    ),
    Rule(
        "E304",
        "different seeds",
        MethodDesign,
        comparability.different_seeds,
        "Run each method on the same final seeds: differences are then paired, and none is picked.",
    ),
    Rule(
        "E305",
        "seed of the tuning",
        MethodDesign,
        comparability.reused_seeds,
        "Confirm on fresh seeds: on the seed of the tuning the winner's score is its best draw.",
    ),
    Rule(
        "W102",
        "untried rates",
        MethodDesign,
        comparability.untried_below_divergence,
        "Try rates between the winner and the one that diverged: the best may lie there.",
    ),
    Rule(
        "W103", "sparser grid", MethodDesign, comparability.sparser_grids, "Tune all methods on equally dense grids."
    ),
    Rule(
        "W104",
        "given rates",
        MethodDesign,
        comparability.given_rates,
        "State that the comparison holds at these rates only.",
    ),
    Rule(
        "W105",
        "customary optimizers",
        MethodDesign,
        comparability.customary_optimizers,
        "The result is one of method and optimizer together. Repeat it with one optimizer for all to separate them.",
    ),
    Rule(
        "W110",
        "noise",
        TuningScores,
        winner_within_noise,
        "Confirm the best few on fresh seeds, or draw no conclusion from which one won.",
    ),
    Rule(
        "W111",
        "seeds",
        SeedCount,
        few_seeds,
        f"Run {ENOUGH} seeds or more: with fewer no test can give p < {ALPHA}.",
    ),
    Rule(
        "W120",
        "nothing learned",
        TuningScores,
        nothing_learned,
        "Widen the grid or train longer: no point learned enough to choose by.",
    ),
    Rule("W121", "exploded", MethodDesign, comparability.exploded_runs, "Count these runs as diverged."),
    Rule(
        "W122",
        "not trained",
        MethodDesign,
        comparability.not_trained,
        "Train it on the seeds of the others, or leave it out of the study: without final runs it has no rank.",
    ),
    Rule(
        "W401",
        "environment",
        Environment,
        changed_environment,
        "Run everything again in a new folder, in one environment and with one version of the code.",
    ),
    Rule(
        "W402",
        "timing",
        Timing,
        doubtful_timing,
        "Run the same command again on an idle machine: it repeats the doubtful timings.",
    ),
)


def lint(facts: Iterable[Fact | MethodDesign | Statement]) -> list[Finding]:
    """Check the facts of a study.

    Args:
        facts: from `gradcost.results.facts.facts`, or entered by hand from a publication.
    Returns:
        The violations, errors first, in the order of RULES.
    """
    facts = list(facts)
    return [
        Finding(rule.code, rule.name, method, sentence, rule.remedy)
        for rule in RULES
        for method, sentence in rule.check([fact for fact in facts if isinstance(fact, rule.kind)])
    ]


def unchecked(facts: Iterable[Fact | MethodDesign | Statement]) -> list[Rule]:
    """Return the rules that could not be checked, as no fact of their kind is known. E207 is for publications."""
    kinds = {Statement, *(type(fact) for fact in facts)}
    return [rule for rule in RULES if rule.kind not in kinds]
