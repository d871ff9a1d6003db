"""`gradcost methods`: each method and part, as its docstring describes it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from gradcost.cli import console, spec
from gradcost.core.errors import BadInput

# The sections of a preset's docstring that are shown, in this order; Args, Returns and Raises are not.
SECTIONS = ("Law", "Cost", "Memory", "Use when", "Avoid when", "Source")
_SECTION = re.compile(rf"({'|'.join((*SECTIONS, 'Args', 'Returns', 'Raises'))}):(?: |$)")
_COLUMNS = {"Law": "law", "Cost": "cost", "Memory": "memory", "Source": "source"}
_KINDS = {"StatefulDirections": "directions", "Saving": "checkpointing policy"}  # else the class in lower case


def sections(thing: Callable[..., Any]) -> dict[str, str]:
    """Split a docstring at its section names; "" is the text before the first section: the formula."""
    texts, name = {"": ""}, ""
    for line in (inspect.getdoc(thing) or "").split("\n"):
        match = _SECTION.match(line)
        if match:
            name, line = match[1], line[match.end() :]
            texts[name] = ""
        texts[name] = f"{texts[name]}\n{line}".strip()
    return {name: " ".join(text.split()) for name, text in texts.items()}


def kind(thing: Callable[..., Any]) -> str:
    """Return what a name stands for: a preset, an estimator, or the part of a method that its base class names."""
    if not inspect.isclass(thing):
        return "preset"
    base = thing.__mro__[-3].__name__  # before ABC and object
    return _KINDS.get(base, base.lower())


def entry(name: str, thing: Callable[..., Any]) -> dict[str, Any]:
    """Return one method or part as plain data."""
    record = {"name": name, "write": spec.signature(thing), "kind": kind(thing)}
    if inspect.isclass(thing):
        return record | {"what": _headline(thing)}
    texts = sections(thing)
    return record | {"what": texts[""]} | {section.lower(): texts.get(section, "") for section in SECTIONS}


def list_methods(as_json: bool) -> int:
    """Print the presets with what each costs, then the parts that methods are made of."""
    entries = [entry(name, thing) for name, thing in spec.names("method").items()]
    entries.sort(key=lambda one: (one["kind"] != "preset", one["name"]))
    if as_json:
        print(json.dumps(entries, indent=2))
        return 0
    presets = [one for one in entries if one["kind"] == "preset"]
    parts = sorted(entries[len(presets) :], key=lambda one: one["kind"])
    rows = [[one["write"], *(_first_clause(one[section.lower()]) for section in _COLUMNS)] for one in presets]
    console.show_table(["method", *_COLUMNS.values()], rows, left=True)
    console.show()
    rows = [[one["kind"], one["write"], one["what"]] for one in parts]
    console.show_table(["kind", "write", "description"], rows, left=True)
    console.show()
    console.show("`gradcost methods NAME` shows a formula, its cost and memory, when to use it and when to avoid it.")
    return 0


def explain_method(name: str, as_json: bool) -> int:
    """Print the docstring of one method or part. Returns the exit code."""
    known = spec.names("method")
    wanted = name.partition("(")[0].strip()
    if wanted not in known:
        raise BadInput(f"no method or part {name!r}.{spec.hint(wanted, known)} `gradcost methods` lists them.")
    thing = known[wanted]
    if as_json:
        text = {} if inspect.isfunction(thing) else {"text": inspect.getdoc(thing) or ""}
        print(json.dumps(entry(wanted, thing) | text, indent=2))
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
