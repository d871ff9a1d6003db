"""Group the methods of a study: families, which differ in numbers only, and twins, whose runs are identical."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.tuning import final_runs

_NUMBER = re.compile(r"\d[\d.e-]*")


def family(estimator: str, optimizer: str | None) -> str:
    """Return a key that is equal for methods that differ in numbers only, such as the number of probes."""
    return _NUMBER.sub("#", f"{estimator} {optimizer}")


def families(results: Results) -> dict[str, str]:
    """Return {method: the first method of its family}, in the study's order."""
    heads: dict[str, str] = {}
    return {
        row.method: heads.setdefault(family(row.estimator, row.optimizer), row.method) for row in summarise(results)
    }


@lru_cache(maxsize=4)
def twins(results: Results) -> dict[str, str]:
    """Return {method: the first method with the same final runs}: the same losses at every step, and the same scores.

    An exact gradient gives the same runs with and without recomputation. Cached per object.
    """
    seen: dict[tuple[Any, ...], str] = {}
    first = {}
    for row in summarise(results):
        runs = tuple(
            (run.seed, run.status, run.steps, run.curve.loss, run.curve.validation_loss, run.test)
            for run in final_runs(results, row.method)
            if run.curve.loss
        )
        first[row.method] = seen.setdefault(_hashable(runs), row.method) if runs else row.method
    return first


def _hashable(runs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((*run[:-1], None if run[-1] is None else (run[-1].loss, run[-1].score)) for run in runs)
