"""Values: frozen dataclasses that are identified by their repr, in configurations, arguments, hashes and labels.

The repr is the expression that creates the value: `Probing(slope=Jvp(), probes=4)`. Two values are equal if their
fields are equal. The hash is computed from the repr by BLAKE2b. It is the same in every process, unlike Python's hash
of a string.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from dataclasses import dataclass, fields
from hashlib import blake2b
from types import FunctionType
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from gradcost.core.errors import BadInput

T = TypeVar("T")

_NUMBERS = {"int": int, "float": float, "float | None": float | None}  # the annotations that are checked


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """Turn a class into a frozen dataclass whose hash is computed from its repr, the same in every process.

    Fields annotated `int`, `float` or `float | None` are checked at construction, before the class's own
    `__post_init__`. A float field accepts an int and stores it as a float, so that equal values have equal reprs.
    Fields annotated with an abstract class of gradcost, such as `Estimator`, are checked after it. The parts of tasks
    are not: there a class of the user needs the methods only.

    Args:
        cls: the class; its fields are its annotations, as in a dataclass.
    Returns:
        The same class. Its constructor raises BadInput if a checked field has another type.
    """
    check = getattr(cls, "__post_init__", lambda self: None)  # its own one, or that of a value that it extends

    def __post_init__(self: Any) -> None:
        _normalise_numbers(self)
        try:
            check(self)
        except BadInput:
            raise
        except Exception:
            _check_parts(self)  # the likely cause
            raise
        _check_parts(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    frozen = dataclass(frozen=True)(cls)
    frozen.__hash__ = _hash  # type: ignore[method-assign]
    return frozen


def _normalise_numbers(instance: Any) -> None:
    for name, kind in _number_fields(type(instance)):
        number = getattr(instance, name)
        if kind is int:
            if isinstance(number, bool) or not isinstance(number, int):
                raise BadInput(f"{name} of {type(instance).__name__} is a whole number, not {number!r}.")
        elif kind is float or number is not None:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise BadInput(f"{name} of {type(instance).__name__} is a number, not {number!r}.")
            try:
                object.__setattr__(instance, name, float(number))
            except OverflowError:
                raise BadInput(f"{name} of {type(instance).__name__} is too large for a number.") from None


def _check_parts(instance: Any) -> None:
    for name, kind in _part_fields(type(instance)):
        part = getattr(instance, name)
        if not isinstance(part, kind):
            call = f": write {part.__name__}()" if isinstance(part, FunctionType | type) else ""
            given = getattr(part, "__name__", repr(part))
            raise BadInput(
                f"{name} of {type(instance).__name__} is a value of type {kind.__name__}, not {given}{call}."
            )


@functools.cache
def _part_fields(cls: type) -> tuple[tuple[str, type], ...]:
    """Return the name and the type of each field annotated with an abstract class of gradcost."""
    try:
        types = get_type_hints(cls)
    except Exception:  # some annotation cannot be resolved at run time
        return ()
    found = [(field.name, types[field.name]) for field in fields(cls)]
    return tuple((name, kind) for name, kind in found if _is_abstract_class(kind))


def _is_abstract_class(kind: Any) -> bool:
    if not isinstance(kind, ABCMeta) or getattr(kind, "_is_protocol", False):
        return False
    return kind.__module__.startswith("gradcost.") and not kind.__module__.startswith("gradcost.tasks.")


@functools.cache  # once per class, because values are created in inner loops
def _number_fields(cls: type) -> tuple[tuple[str, Any], ...]:
    """Return the name and the type of each field annotated `int`, `float` or `float | None`."""
    try:
        types = get_type_hints(cls)
    except Exception:  # some annotation cannot be resolved at run time: look all up by their text
        types = {
            each.name: _NUMBERS.get(each.type) if isinstance(each.type, str) else each.type for each in fields(cls)
        }
    return tuple((field.name, types[field.name]) for field in fields(cls) if types[field.name] in _NUMBERS.values())


def is_value(kind: type) -> bool:
    """Return whether a class is decorated with `value`."""
    return kind.__hash__ is _hash


def digest(of: Any, size: int = 8) -> str:
    """Return a short hexadecimal identifier: the BLAKE2b hash of the repr, in `2 * size` digits."""
    return blake2b(repr(of).encode(), digest_size=size).hexdigest()


def _hash(self: Any) -> int:
    return int(digest(self), 16) >> 3  # Python's hashes have 61 bits
