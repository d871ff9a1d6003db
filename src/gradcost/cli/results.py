"""`gradcost status`, `show`, `why` and `export`: looking into a results folder. None of them loads torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Id = Annotated[str, typer.Argument(help="A trial's id, or how it begins.")]
Folder = Annotated[Path, typer.Argument(help="A results folder.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """Say how far a study is, what failed, what is half-finished, and who works on it."""
    from gradcost.cli import console
    from gradcost.core.units import count
    from gradcost.results import status

    found = status.status(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    worked = "nobody works on it" if found.pid is None else f"process {found.pid} works on it"
    console.show(f"{folder}   {worked}")
    console.show_table(["phase", "done"], [[phase, str(n)] for phase, n in found.done.items()])
    for kept in found.kept:
        at = "at a step that cannot be read" if kept.step is None else f"at step {kept.step:,}"
        console.show(f"{kept.trial}  {'stopped' if found.pid is None else 'running'}, kept {at}")
    for trial in found.failed:
        console.show(f"{trial}  failed: `gradcost why {trial} {folder}`")
    if found.torn:
        console.show(f"{count(found.torn, 'line')} of records.jsonl torn by a crash, and passed over")


def show(trial: Id, folder: Folder = Path("."), as_json: Json = False) -> None:
    """Show the record of a trial."""
    from gradcost.cli import console
    from gradcost.results import status

    found = status.record(folder, trial)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [[name, _readable(held)] for name, held in found.items() if name not in ("schema", "kind", "traceback")]
    console.show_table(["", ""], rows, left=True)
    if found.get("traceback"):
        console.show(found["traceback"])


def why(trial: Id, folder: Folder = Path("."), as_json: Json = False) -> None:
    """Say why a trial ran, why it failed, and why it was or was not chosen."""
    from gradcost.cli import console
    from gradcost.results import status

    asked, reasons = status.record(folder, trial), status.why(folder, trial)
    if as_json:
        told = {name: asked.get(name) for name in ("trial", "method", "phase", "lr", "seed", "status", "traceback")}
        print(json.dumps(told | {"why": list(reasons)}, indent=2))
        return
    console.show(f"{asked['trial']}   {asked['method']}   {asked['phase']}   {asked['status']}")
    for reason in reasons:
        console.show(reason)
    if asked.get("traceback"):
        console.show(asked["traceback"])


def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.parquet; the curves go beside it.")],
    as_json: Json = False,
) -> None:
    """Write a results folder as tidy tables: a row a trial, and a row a point of its curves."""
    from gradcost.cli import console
    from gradcost.results import export as tables

    trials, curves = tables.write(folder, output)
    if as_json:
        print(json.dumps({"trials": str(trials), "curves": str(curves)}, indent=2))
        return
    console.show(f"trials   {trials}")
    console.show(f"curves   {curves}")


def _readable(held: Any) -> str:
    """A list as its last value and how many there are; a dictionary as what is in it."""
    match held:
        case dict():
            return "   ".join(f"{name} {_readable(item)}" for name, item in held.items())
        case [*_, last] if len(held) > 1:
            return f"{last} (the last of {len(held)})"
        case None:
            return "none"
    return str(held)
