"""`gradcost methods`: what each method and part is, from its own docstring and nowhere else."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

from gradcost.cli import console, spec
from gradcost.core.errors import BadInput

# The sections of a preset's docstring, in their order: each begins a line, and ends where the next one begins.
SECTIONS = ("Law", "Cost", "Memory", "Use it", "Not", "Source")
_COLUMNS = {"Law": "law", "Cost": "cost", "Memory": "memory", "Source": "source"}


def sections(thing: Callable[..., Any]) -> dict[str, str]:
    """The docstring cut at its section names: "" is what stands before the first, the formula and what it is."""
    found = {"": ""}
    name = ""
    for line in (inspect.getdoc(thing) or "").split("\n"):
        match = re.match(rf"({'|'.join(SECTIONS)}): ", line)
        if match:
            name, line = match[1], line[match.end() :]
            found[name] = ""
        found[name] = f"{found[name]}\n{line}".strip()
    return {name: " ".join(text.split()) for name, text in found.items()}


def kind(thing: Callable[..., Any]) -> str:
    """What a thing is: a preset, or the part of a method that its class is."""
    if not inspect.isclass(thing):
        return "preset"
    return thing.__mro__[1].__name__.lower()


def entry(name: str, thing: Callable[..., Any]) -> dict[str, Any]:
    """Plain data about one method or part."""
    found = {"name": name, "write": spec.signature(thing), "kind": kind(thing)}
    if inspect.isclass(thing):
        return found | {"what": _headline(thing)}
    told = sections(thing)
    return found | {"what": told[""]} | {section.lower(): told.get(section, "") for section in SECTIONS}


def list_methods(as_json: bool) -> int:
    """Show the presets with what each costs, then the parts that methods are made of."""
    found = [entry(name, thing) for name, thing in spec.names("method").items()]
    found.sort(key=lambda one: (one["kind"] != "preset", one["name"]))
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    presets = [one for one in found if one["kind"] == "preset"]
    parts = sorted(found[len(presets) :], key=lambda one: one["kind"])
    rows = [[one["write"], *(_first(one[section.lower()]) for section in _COLUMNS)] for one in presets]
    console.show_table(["method", *_COLUMNS.values()], rows, left=True)
    console.show()
    rows = [[one["kind"], one["write"], one["what"]] for one in parts]
    console.show_table(["made of", "write", "what it is"], rows, left=True)
    console.show()
    console.show("gradcost methods NAME tells one's formula, cost and memory, when to use it and when not.")
    return 0


def explain_method(name: str, as_json: bool) -> int:
    """Show all that one method's docstring says. Raises: ValueError when there is none of that name."""
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
    told = sections(thing)
    console.show(f"    {told['']}")
    console.show(f"    = {thing()!r}" if _is_complete(thing) else "")
    console.show()
    width = max(map(len, SECTIONS))
    for section in SECTIONS:
        console.show(f"    {section.lower():<{width}}   {told.get(section, '')}")
    return 0


def _is_complete(thing: Callable[..., Any]) -> bool:
    return all(p.default is not p.empty for p in inspect.signature(thing).parameters.values())


def _headline(thing: Callable[..., Any]) -> str:
    """The first sentence."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


def _first(text: str) -> str:
    """The first clause: what stands before the first semicolon or the end of the first sentence."""
    return re.split(r"; |\. ", text.rstrip("."), maxsplit=1)[0]
