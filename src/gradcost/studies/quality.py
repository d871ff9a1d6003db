"""The quality of the estimates of each method of a study: angle and error against the gradient, beside the theory."""

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
from gradcost.estimators.structure import find, micro_batches
from gradcost.results import ledger
from gradcost.results.records import read
from gradcost.slopes.slope import Slope
from gradcost.studies.costs import Methods
from gradcost.studies.task_info import first_step
from gradcost.studies.trial_log import json_number
from gradcost.theory.cosines import expected_cosine
from gradcost.theory.moments import second_moment

DRAWS = 32


def assess_methods(task: Any, methods: Methods, folder: Path, draws: int = DRAWS) -> Iterator[str]:
    """Record the quality of the estimates of each method that measures slopes, and yield its label.

    - All methods are assessed at the same initial weights and on the same batch.
    - cosine: cos(g, grad). error: |g - grad|^2 / |grad|^2, the variance of an unbiased estimate.
    - theory: the expected values for 1, 2, 4, ... probes, where they are known.
    - Methods on record are skipped. Nothing is recorded where there is no gradient to compare with.

    Args:
        task: what is trained.
        methods: the methods, by label.
        folder: the results folder.
        draws: how many estimates of each method.
    """
    known = {quality.method for quality in read(folder).qualities}
    objective, batch = first_step(task)  # shared: an estimate changes nothing
    references: dict[int, Reference] = {}  # by the number of micro-batches
    for label, (estimator, _) in methods.items():
        if label in known or not find(estimator, Slope):
            continue
        count = micro_batches(estimator)
        if count not in references:
            references[count] = Reference(objective.in_micro_batches(count), batch, Key(0).fold("quality"))
        reference = references[count]
        if reference.refusal is not None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            sample = [draw(estimator, objective, reference, number) for number in range(draws)]
        ledger.append(
            folder,
            {"schema": 1, "kind": "quality", "method": label, "estimator": repr(estimator)}
            | {"dimension": objective.dimension, "probes": sample[0].probes, "draws": draws}
            | _mean("cosine", [one.cosine for one in sample])
            | _mean("error", [_error(one) for one in sample])
            | {"theory": _theory(estimator, objective.dimension)},
        )
        yield label


def _mean(name: str, sample: list[float]) -> dict[str, float | None]:
    """Return the mean and its standard error; None where a draw was not finite."""
    mean, error = mean_and_error(sample)
    return {name: json_number(mean), f"{name}_se": json_number(error)}


def _error(one: Draw) -> float:
    """Return |g - grad|^2 / |grad|^2."""
    return one.ratio**2 - 2 * one.projection + 1


def _theory(estimator: Estimator, dimension: int) -> dict[str, list[float | None]] | None:
    """Return the expected values for its probes and for 1, 2, 4, ... up to four times as many; None if unknown."""
    if not isinstance(estimator, Probing) or expected_cosine(estimator, dimension) is None:
        return None
    doublings = math.ceil(math.log2(estimator.probes)) + 3
    counts = sorted({estimator.probes, *(2**k for k in range(doublings) if 2**k <= dimension)})
    variants = [replace(estimator, probes=probes) for probes in counts]
    moments = [second_moment(variant, dimension) for variant in variants]
    return {
        "probes": [variant.probes for variant in variants],
        "cosine": [_number_or_none(expected_cosine(variant, dimension)) for variant in variants],
        "error": [None if moment is None else json_number(moment - 1) for moment in moments],  # if unbiased
    }


def _number_or_none(x: float | None) -> float | None:
    return None if x is None else json_number(x)
