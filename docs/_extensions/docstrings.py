"""Prepare the API reference.

- Sections of a docstring need a blank line above them.
- `<` must not start an HTML tag.
- A class under `@value` is a dataclass: its signature lists the fields.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<=[^\n])\n(Args|Returns|Yields|Raises|Law|Laws|Cost|Memory|Source):", re.MULTILINE)
LABEL = re.compile(r"^(Law|Laws|Cost|Memory|Use it|Use when|Not|Avoid when|Source):", re.MULTILINE)
CODE = re.compile(r"(`[^`\n]*`)")


def prepared(text: str) -> str:
    """Return the docstring as Markdown with Google sections."""
    text = LABEL.sub(r"**\1:**", SECTION.sub(r"\n\n\1:", text))
    pieces = CODE.split(text)
    return "".join(piece if number % 2 else piece.replace("<", "&lt;") for number, piece in enumerate(pieces))


class Docstrings(griffe.Extension):
    def on_class(self, *, cls: Any, **_: Any) -> None:
        for decorator in cls.decorators:
            if decorator.callable_path == "gradcost.core.value.value":
                decorator.value = griffe.ExprName("dataclasses.dataclass")

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = prepared(obj.docstring.value)
