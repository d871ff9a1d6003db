"""The quality of each method's estimates: cosine and error, measured against the gradient and expected by theory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradcost.checks.quality import Draw, draw, mean_and_error
from gradcost.checks.reference import Reference
from gradcost.core.finite import NotFinite
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
    """For each method that measures slopes, record the quality of its estimates and yield its label.

    - All methods are assessed at the same initial weights and on the same batch.
    - cosine: cos(g, grad), for the estimate g and the gradient grad.
    - error: |g - grad|^2 / |grad|^2. Its mean is the relative variance if the estimate is unbiased.
    - theory: the expected cosine and error for 1, 2, 4, ... probes, if a formula is known.
    - A method whose quality is on record is skipped. If the gradient cannot be computed, nothing is recorded.

    Args:
        task: the task to train on.
        methods: maps each label to its estimator and optimizer.
        folder: the results folder.
        draws: the number of estimates per method.
    """
    assessed = {quality.method for quality in read(folder).qualities}
    objective, batch = first_step(task)  # shared by all methods, because estimates have no side effects
    references: dict[int, Reference] = {}  # keys: numbers of micro-batches
    for label, (estimator, _) in methods.items():
        if label in assessed or not find(estimator, Slope):
            continue
        count = micro_batches(estimator)
        if count not in references:
            references[count] = Reference(objective.in_micro_batches(count), batch, Key(0).fold("quality"))
        reference = references[count]
        if reference.refusal is not None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Note)
            try:
                estimates = [draw(estimator, objective, reference, index) for index in range(draws)]
            except NotFinite:  # recorded as estimates without a cosine and an error
                estimates = []
        probes = estimates[0].probes if estimates else getattr(estimator, "probes", 1)
        ledger.append(
            folder,
            {"schema": 1, "kind": "quality", "method": label, "estimator": repr(estimator)}
            | {"dimension": objective.dimension, "probes": probes, "draws": draws}
            | _mean("cosine", [each.cosine for each in estimates] or [math.nan])
            | _mean("error", [_error(each) for each in estimates] or [math.nan])
            | {"theory": _theory(estimator, objective.dimension)},
        )
        yield label


def _mean(name: str, numbers: list[float]) -> dict[str, float | None]:
    """Return {name: mean, name_se: its standard error}; both are None if a number is not finite."""
    mean, error = mean_and_error(numbers)
    return {name: json_number(mean), f"{name}_se": json_number(error)}


def _error(drawn: Draw) -> float:
    """Return |g - grad|^2 / |grad|^2 of one estimate g."""
    return drawn.ratio**2 - 2 * drawn.projection + 1


def _theory(estimator: Estimator, dimension: int) -> dict[str, list[float | None]] | None:
    """Return the expected cosine and error for 1, 2, 4, ... probes and for `estimator.probes`; None if unknown."""
    if not isinstance(estimator, Probing) or expected_cosine(estimator, dimension) is None:
        return None
    doublings = math.ceil(math.log2(estimator.probes)) + 3
    counts = sorted({estimator.probes, *(2**k for k in range(doublings) if 2**k <= dimension)})
    variants = [replace(estimator, probes=probes) for probes in counts]
    moments = [second_moment(variant, dimension) for variant in variants]
    return {
        "probes": [variant.probes for variant in variants],
        "cosine": [_number_or_none(expected_cosine(variant, dimension)) for variant in variants],
        # For unbiased estimates, E|g - grad|^2 / |grad|^2 = second moment - 1.
        "error": [None if moment is None else json_number(moment - 1) for moment in moments],
    }


def _number_or_none(x: float | None) -> float | None:
    return None if x is None else json_number(x)
