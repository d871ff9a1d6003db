"""What an estimator is made of, found in its fields: its slopes, its directions, its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from gradcost.estimators.accumulated import Accumulated

T = TypeVar("T")


def within(estimator: Any, kind: type[T]) -> list[T]:
    """The values of this kind that an estimator holds, at any depth, itself among them; each value once."""
    return list(dict.fromkeys(part for part in _every(estimator) if isinstance(part, kind)))


def micro_batches(estimator: Any) -> int:
    """Into how many parts it cuts a batch: the product over the `Accumulated` in it."""
    return math.prod(part.parts for part in within(estimator, Accumulated))


def _every(held: Any) -> Iterator[Any]:
    if isinstance(held, tuple):
        for item in held:
            yield from _every(item)
    elif is_dataclass(held) and not isinstance(held, type):
        yield held
        for field in fields(held):
            yield from _every(getattr(held, field.name))
