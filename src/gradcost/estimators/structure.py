"""Inspect an estimator: its parts of a given type, its number of micro-batches, the estimator inside its wrappers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator

T = TypeVar("T")


def find(estimator: Any, kind: type[T]) -> list[T]:
    """Return the parts of type `kind` of an estimator, at any depth, itself included. Equal parts appear once."""
    return list(dict.fromkeys(part for part in _parts(estimator) if isinstance(part, kind)))


def micro_batches(estimator: Any) -> int:
    """Return the number of micro-batches per batch: the product of `parts` over all `Accumulated` in it."""
    return math.prod(part.parts for part in find(estimator, Accumulated))


def unwrapped(estimator: Estimator) -> Estimator:
    """Return the estimator inside the outer wrappers that do not change cost, variance and cosine."""
    while estimator.facts.transparent and estimator.inner is not None:
        estimator = estimator.inner
    return estimator


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
