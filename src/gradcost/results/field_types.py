"""Check that the fields of a record from a file have the types of their dataclass."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from gradcost.core.errors import BadInput
from gradcost.core.printable import all_printable


def checked(cls: Any, record: Mapping[str, Any]) -> Any:
    """Build a dataclass from a JSON record. Unknown fields come from a later version and are ignored.

    Characters that a terminal or a page would not show are replaced (`core.printable`).

    Args:
        cls: a dataclass, such as TrialRecord.
        record: values of its fields.
    Raises:
        BadInput: a field is missing or has another type than in the dataclass.
    """
    known = {name: all_printable(record[name]) for name in cls.__dataclass_fields__ if name in record}
    name = cls.__name__.removesuffix("Record").lower()
    if problem := _misfit(cls, known):
        raise BadInput(f"A {name} record is damaged: {problem}.")
    try:
        return cls(**known)
    except TypeError as error:
        raise BadInput(f"A {name} record is incomplete: {error}.") from None


def _misfit(cls: type, record: Mapping[str, Any]) -> str | None:
    """Return which field has another type than in the dataclass; None if there is none. An int counts as a float."""
    for name, allowed in _allowed(cls).items():
        if name in record and not allowed(record[name]):
            return f"its {name} is {str(record[name])[:80]!r}"
    return None


@functools.cache
def _allowed(cls: type) -> dict[str, Any]:
    return {name: _checker(hint) for name, hint in get_type_hints(cls).items()}


def _checker(hint: Any) -> Any:
    """Return a function of a value: whether it has the annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        checkers = [_checker(each) for each in arguments]
        return lambda value: any(check(value) for check in checkers)
    if origin is tuple:
        kinds = _kinds(arguments[:1])
        return lambda value: isinstance(value, tuple) and _consists_of(value, kinds)
    if origin is not None:  # a mapping
        kinds = _kinds(arguments[1:])
        return lambda value: isinstance(value, dict) and _consists_of(value.values(), kinds)
    kinds = _kinds((hint,))
    return lambda value: _consists_of((value,), kinds) if kinds else isinstance(value, hint)


def _kinds(hints: Iterable[Any]) -> frozenset[type]:
    """Return the classes of JSON values that have one of these annotations; empty for any other annotation."""
    found: set[type] = set()
    for hint in hints:
        parts = get_args(hint) or (hint,)
        if not set(parts) <= {int, float, str, bool, type(None)}:
            return frozenset()
        found.update(parts)
    return frozenset(found | {int} if float in found else found)


def _consists_of(values: Iterable[Any], kinds: frozenset[type]) -> bool:
    return not kinds or kinds.issuperset(map(type, values))
