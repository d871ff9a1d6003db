"""The syntax of expressions such as `mezo(probes=4)`, and the kinds of values that a call accepts."""

from __future__ import annotations

import ast
import inspect
import re
import types
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from math import isinf
from typing import Any, Union, get_args, get_origin, get_type_hints

from gradcost.core.errors import BadInput

LONGEST = 10_000  # characters of an expression
DEEPEST = 60  # levels of its syntax tree; a call inside a call by keyword is two levels deeper
LARGEST = 2**64  # of a whole number

_KINDS = {int: "a whole number", float: "a number", str: "a text in quotes", bool: "True or False"}
_LITERALS = (int, float, str, bool, type(None))
BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(rf"(?<![\w.])(\d+(?:\.\d+)?)({'|'.join(BYTES)})(?!\w)")
_PARTS = (ast.Tuple, ast.List, ast.Name, ast.Load, ast.USub, ast.keyword)


def tree(text: str) -> ast.expr:
    """Return the syntax tree of an expression: literals, tuples, names, and calls of names. `8GiB` is a number.

    Args:
        text: the expression.
    Raises:
        BadInput: the text is too long or nested too deep, or contains anything else.
    """
    text = text.strip()
    if not {"'", '"'} & set(text):  # Within(8GiB); a text in quotes stays as it is
        text = _SIZE.sub(lambda found: str(int(float(found[1]) * BYTES[found[2]])), text)
    if len(text) > LONGEST:
        raise BadInput(f"an expression has at most {LONGEST:,} characters, and {_short(text)} has {len(text):,}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # such as of `1or 2`, which is refused in any case
            expression = ast.parse(text, mode="eval").body
    except (RecursionError, MemoryError):
        raise BadInput(f"{_short(text)} is nested too deep.") from None
    except SyntaxError as error:
        raise BadInput(f"{_short(text)} is not an expression like mezo(probes=4): {error.msg}.") from None
    except ValueError:  # a null byte, or half of a surrogate pair
        raise BadInput(f"{_short(text)} contains a character that no expression has.") from None
    waiting: deque[tuple[ast.AST, int]] = deque([(expression, 1)])
    while waiting:  # not by recursion: a chain of operators may be long
        node, depth = waiting.popleft()
        if depth > DEEPEST:
            raise BadInput(f"{_short(text)} is nested too deep.")
        _check(node, text)
        waiting.extend((child, depth + 1) for child in ast.iter_child_nodes(node))
    return expression


def _check(node: ast.AST, text: str) -> None:
    match node:
        case ast.Constant(value=int() as number) if abs(number) >= LARGEST:
            raise BadInput(f"{_source(node, text)} is too large: a whole number has at most 19 digits.")
        case ast.Constant(value=float() as number) if isinf(number):
            raise BadInput(f"{_source(node, text)} is too large for a number.")
        case ast.Constant(value=literal) if isinstance(literal, _LITERALS):
            return
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            if not isinstance(number, bool):
                return
        case ast.Call(func=ast.Name(), keywords=keywords):
            given = [keyword.arg for keyword in keywords]
            if None in given:
                raise BadInput(f"{_source(node, text)} contains **: write each argument as name=value.")
            if len(set(given)) < len(given):
                raise BadInput(f"{_source(node, text)} gives an argument twice: give it once.")
            return
        case _ if isinstance(node, _PARTS):
            return
    raise BadInput(f"{_source(node, text)} in {_short(text)} is neither a number, a tuple nor a call such as mezo().")


def _source(node: ast.AST, text: str) -> str:
    return _short(ast.get_source_segment(text, node) or "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def misfit(thing: Callable[..., Any], arguments: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """Return which argument of a call has another type than its annotation; None if there is none.

    Args:
        thing: a class or function with annotations.
        arguments: the arguments by name.
        known: the names that an expression may call, from which the message suggests some.
    """
    for name, hint in get_type_hints(thing).items():
        if name in arguments and not _fits(arguments[name], hint):
            return f"{name} is {_described(hint, known)}, not {_short(repr(arguments[name]))[1:-1]}"
    return None


def _fits(argument: Any, hint: Any) -> bool:
    """Return whether a value has the annotated type. An int counts as a float, a bool as neither."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(argument, part) for part in parts)
    if origin is tuple:
        if not isinstance(argument, tuple):
            return False
        kinds = parts[:1] * len(argument) if parts[1:] == (...,) else parts
        return len(argument) == len(kinds) and all(map(_fits, argument, kinds))
    if hint in (int, float):
        return isinstance(argument, int if hint is int else (int, float)) and not isinstance(argument, bool)
    return hint is Any or not isinstance(hint, type) or isinstance(argument, hint)


def _described(hint: Any, known: Mapping[str, Any]) -> str:
    """Return the words for an annotation: "a whole number", or "a Slope: Jvp or CentralDifference"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part, known) for part in parts if part is not type(None))
    if origin is tuple:
        return f"a tuple, and each item is {_described(parts[0], known)}"
    if hint in _KINDS:
        return _KINDS[hint]
    makers = [name for name, thing in known.items() if _makes(thing, hint)]
    makers.sort(key=lambda name: name[0].isupper())  # presets first
    shown = ", ".join([*makers[:8], "..."] if len(makers) > 8 else makers)
    return f"{'an' if hint.__name__[0] in 'AEIO' else 'a'} {hint.__name__} ({shown})"


def _makes(thing: Any, kind: type) -> bool:
    made = thing if inspect.isclass(thing) else get_type_hints(thing).get("return")
    return isinstance(made, type) and issubclass(made, kind)
