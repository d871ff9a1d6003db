"""`gradcost methods`: list the methods and parts, or explain one, from their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from gradcost.cli import console, spec
from gradcost.core.errors import BadInput

# Sections of a preset's docstring to show, in this order. Args, Returns and Raises are not shown.
SECTIONS = ("Law", "Cost", "Memory", "Use when", "Avoid when", "Source")
_SECTION = re.compile(rf"({'|'.join((*SECTIONS, 'Args', 'Returns', 'Raises'))}):(?: |$)")
_COLUMNS = {"Law": "law", "Cost": "cost", "Memory": "memory", "Source": "source"}
# The kind of a part, by its base class. Default: the name of the base class in lower case.
_KINDS = {"StatefulDirections": "directions", "Saving": "checkpointing policy"}


def sections(thing: Callable[..., Any]) -> dict[str, str]:
    """Return the sections of a docstring by name; the key "" has the text before the first one, the formula."""
    texts, name = {"": ""}, ""
    for line in (inspect.getdoc(thing) or "").split("\n"):
        match = _SECTION.match(line)
        if match:
            name, line = match[1], line[match.end() :]
            texts[name] = ""
        texts[name] = f"{texts[name]}\n{line}".strip()
    return {name: " ".join(text.split()) for name, text in texts.items()}


def kind(thing: Callable[..., Any]) -> str:
    """Return "preset" for a function, and for a class the kind that its base class defines, such as "estimator"."""
    if not inspect.isclass(thing):
        return "preset"
    base = thing.__mro__[-3].__name__  # the last two are ABC and object
    return _KINDS.get(base, base.lower())


def entry(name: str, thing: Callable[..., Any]) -> dict[str, Any]:
    """Return the name, signature, kind and docstring sections of a method or part, for JSON."""
    record = {"name": name, "write": spec.signature(thing), "kind": kind(thing)}
    if inspect.isclass(thing):
        return record | {"what": _headline(thing)}
    texts = sections(thing)
    return record | {"what": texts[""]} | {section.lower(): texts.get(section, "") for section in SECTIONS}


def list_methods(as_json: bool) -> int:
    """Print the presets with their costs, then the parts to compose methods from; return the exit code."""
    entries = [entry(name, thing) for name, thing in spec.names("method").items()]
    entries.sort(key=lambda item: (item["kind"] != "preset", item["name"]))
    if as_json:
        console.print_json(entries)
        return 0
    presets = [item for item in entries if item["kind"] == "preset"]
    parts = sorted(entries[len(presets) :], key=lambda item: item["kind"])
    rows = [[item["write"], *(_first_clause(item[section.lower()]) for section in _COLUMNS)] for item in presets]
    console.show_table(["method", *_COLUMNS.values()], rows, left=True)
    console.show()
    rows = [[item["kind"], item["write"], item["what"]] for item in parts]
    console.show_table(["kind", "write", "description"], rows, left=True)
    console.show()
    console.show("`gradcost methods NAME` explains one: formula, cost, memory, when to use it and when to avoid it.")
    return 0


def explain_method(name: str, as_json: bool) -> int:
    """Print the docstring of one method or part, and return the exit code."""
    known = spec.names("method")
    wanted = name.partition("(")[0].strip()
    if wanted not in known:
        raise BadInput(f"no method or part {name!r}.{spec.hint(wanted, known)} `gradcost methods` lists them.")
    thing = known[wanted]
    if as_json:
        text = {} if inspect.isfunction(thing) else {"text": inspect.getdoc(thing) or ""}
        console.print_json(entry(wanted, thing) | text)
        return 0
    console.show(f"{spec.signature(thing)}   {kind(thing)}", bold=True)
    if inspect.isclass(thing):
        console.show()
        console.show(inspect.getdoc(thing) or "")
        return 0
    texts = sections(thing)
    console.show(f"    {texts['']}")
    console.show(f"    = {thing()!r}" if _needs_no_argument(thing) else "")
    console.show()
    width = max(map(len, SECTIONS))
    for section in SECTIONS:
        console.show(f"    {section.lower():<{width}}   {texts.get(section, '')}")
    return 0


def _needs_no_argument(thing: Callable[..., Any]) -> bool:
    return all(p.default is not p.empty for p in inspect.signature(thing).parameters.values())


def _headline(thing: Callable[..., Any]) -> str:
    """Return the first sentence of a docstring."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


def _first_clause(text: str) -> str:
    """Return the text before the first semicolon or the end of the first sentence."""
    return re.split(r"; |\. ", text.rstrip("."), maxsplit=1)[0]
