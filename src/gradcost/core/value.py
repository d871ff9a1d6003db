"""Values: frozen dataclasses whose repr is the configuration, the argument, the hash and the label.

A value prints as the expression that makes it (`Probing(slope=Jvp(), probes=4)`), and that text is its
identity everywhere: two values are equal when their fields are, and a value's hash is a hash of its text,
so it is the same in every process (Python's own hash of a string is not).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, TypeVar, dataclass_transform

from gradcost.core.errors import BadInput

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that hashes by its text, alike in every process.

    A field of type float takes a whole number too and holds it as a float, so that equal values have one text.
    Making one raises ValueError when a field of type int or float is given something else.
    """
    check = cls.__dict__.get("__post_init__", lambda self: None)

    def __post_init__(self: Any) -> None:
        _settle_numbers(self)
        check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made = dataclass(frozen=True)(cls)
    made.__hash__ = _hash  # type: ignore[method-assign]
    return made


def _settle_numbers(made: Any) -> None:
    for field in fields(made):
        held = getattr(made, field.name)
        what = f"{field.name} of {type(made).__name__}"
        if field.type == "int" and (isinstance(held, bool) or not isinstance(held, int)):
            raise BadInput(f"{what} is a whole number, not {held!r}.")
        if field.type == "float" or (field.type == "float | None" and held is not None):
            if isinstance(held, bool) or not isinstance(held, int | float):
                raise BadInput(f"{what} is a number, not {held!r}.")
            object.__setattr__(made, field.name, float(held))


def is_value(kind: type) -> bool:
    """Whether `value` made this class."""
    return kind.__hash__ is _hash


def digest(of: Any, size: int = 8) -> str:
    """A short hexadecimal name for anything that prints itself: `2 * size` digits of BLAKE2b of its repr."""
    return blake2b(repr(of).encode(), digest_size=size).hexdigest()


def _hash(self: Any) -> int:
    return int(digest(self), 16) >> 3  # Python's hashes hold 61 bits
