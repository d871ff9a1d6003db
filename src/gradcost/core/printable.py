"""Make texts from outside safe to print: names and error messages of records, plug-ins and the user's own files."""

from __future__ import annotations

from typing import Any
from unicodedata import category

_NUMBERS = frozenset({int, float, bool, type(None)})


def printable(text: str, keep: str = "") -> str:
    """Return the text with each character that a terminal or a page would not show replaced by its escape sequence.

    These are control characters, marks that change the direction of the text, other invisible format characters, line
    separators and halves of surrogate pairs. The replacement is Python's: `\\x1b`, `\\u202e`.

    Args:
        text: any text.
        keep: control characters that are not replaced.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or category(c) == "Zs" else c.encode("unicode_escape").decode()
        for c in text
    )


def all_printable(tree: Any) -> Any:
    """Return a tree of dicts, lists, tuples and other values in which every text is printable."""
    if isinstance(tree, str):
        return printable(tree)
    if isinstance(tree, dict):
        return {all_printable(name): all_printable(item) for name, item in tree.items()}
    if isinstance(tree, list | tuple) and not _NUMBERS.issuperset(map(type, tree)):
        return type(tree)(map(all_printable, tree))
    return tree
