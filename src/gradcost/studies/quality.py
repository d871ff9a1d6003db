"""How good an estimate of each method of a study is: its angle with the gradient and its error, beside the theory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradcost.checks.quality import Draw, draw, mean_and_error
from gradcost.checks.reference import Reference
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.probing import Probing
from gradcost.estimators.structure import micro_batches, within
from gradcost.results import ledger
from gradcost.results.records import read
from gradcost.slopes.slope import Slope
from gradcost.studies.costs import Methods, first_step
from gradcost.studies.trial_log import short
from gradcost.theory.cosines import expected_cosine
from gradcost.theory.moments import second_moment

DRAWS = 32


def assess_methods(task: Any, methods: Methods, folder: Path, draws: int = DRAWS) -> Iterator[str]:
    """Put on record how good `draws` estimates of each method that measures slopes are, at the initial weights and on
    one batch, the same for all; a method that is on record already is not looked at again.

    error: |g - grad|^2 / |grad|^2, of an unbiased estimate its variance. Beside them what theory expects of 1, 2, 4,
    ... probes, where it knows. Where there is no gradient to hold them against, none is judged.
    """
    known = {quality.method for quality in read(folder).qualities}
    objective, batch = first_step(task)  # one for all: an estimate leaves nothing behind
    grounds: dict[int, Reference] = {}  # by the micro-batches that the loss is the mean of
    for label, (estimator, _) in methods.items():
        if label in known or not within(estimator, Slope):
            continue
        parts = micro_batches(estimator)
        if parts not in grounds:
            grounds[parts] = Reference(objective.in_parts(parts), batch, Key(0).fold("quality"))
        ground = grounds[parts]
        if ground.refusal is not None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            drawn = [draw(estimator, objective, ground, number) for number in range(draws)]
        ledger.append(
            folder,
            {"schema": 1, "kind": "quality", "method": label, "estimator": repr(estimator)}
            | {"dimension": objective.dimension, "probes": drawn[0].probes, "draws": draws}
            | _told("cosine", [one.cosine for one in drawn])
            | _told("error", [_error(one) for one in drawn])
            | {"theory": _theory(estimator, objective.dimension)},
        )
        yield label


def _told(name: str, sample: list[float]) -> dict[str, float | None]:
    """The mean and its standard error; None where a draw was not finite."""
    mean, error = mean_and_error(sample)
    return {name: short(mean), f"{name}_se": short(error)}


def _error(one: Draw) -> float:
    """|g - grad|^2 / |grad|^2."""
    return one.ratio**2 - 2 * one.projection + 1


def _theory(estimator: Estimator, dimension: int) -> dict[str, list[float | None]] | None:
    """What to expect of its own probes and of 1, 2, 4, ... to a factor of four beyond; None where unknown."""
    if not isinstance(estimator, Probing) or expected_cosine(estimator, dimension) is None:
        return None
    doublings = math.ceil(math.log2(estimator.probes)) + 3
    many = sorted({estimator.probes, *(2**k for k in range(doublings) if 2**k <= dimension)})
    kinds = [replace(estimator, probes=probes) for probes in many]
    moments = [second_moment(kind, dimension) for kind in kinds]
    return {
        "probes": [kind.probes for kind in kinds],
        "cosine": [_short(expected_cosine(kind, dimension)) for kind in kinds],
        "error": [None if moment is None else short(moment - 1) for moment in moments],  # of the unbiased
    }


def _short(x: float | None) -> float | None:
    return None if x is None else short(x)
