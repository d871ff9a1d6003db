"""`gradcost status`, `show`, `why`, `diff` and `export`: inspect results folders. None of them imports torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gradcost.cli.options import Folder, Json

Id = Annotated[str, typer.Argument(metavar="TRIAL", help="The id of a trial, or its first characters.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """Show the progress of a study: finished, failed and unfinished trials, and the process that runs it."""
    from gradcost.cli import console
    from gradcost.core.units import count
    from gradcost.results import status

    progress = status.status(folder)
    if as_json:
        print(json.dumps(dataclasses.asdict(progress), indent=2))
        return
    user = "no process" if progress.pid is None else f"process {progress.pid}" if progress.pid else "another process"
    console.show(f"{folder}   {user} works on it")
    console.show_table(["phase", "done"], [[phase, str(n)] for phase, n in progress.done.items()])
    for trial in progress.kept:
        place = "at an unknown step" if trial.step is None else f"at step {trial.step:,}"
        console.show(f"{trial.trial}  {'stopped' if progress.pid is None else 'running'}, checkpoint {place}")
    for trial in progress.failed:
        console.show(f"{trial}  failed: `gradcost why {folder} {trial}`")
    if progress.torn:
        console.show(f"skipped in records.jsonl: {count(progress.torn, 'damaged line')}; such a trial runs again")


def show(folder: Folder, trial: Id, as_json: Json = False) -> None:
    """Show the record of a trial."""
    from gradcost.cli import console
    from gradcost.results import status

    record = status.record(folder, trial)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    rows = [[name, _readable(item)] for name, item in record.items() if name not in ("schema", "kind", "traceback")]
    console.show_table(["", ""], rows, left=True)
    if record.get("traceback"):
        console.show(record["traceback"])


def why(folder: Folder, trial: Id, as_json: Json = False) -> None:
    """Explain why a trial ran, why it failed, and why its learning rate was chosen or not."""
    from gradcost.cli import console
    from gradcost.results import status

    record, reasons = status.record(folder, trial), status.why(folder, trial)
    if as_json:
        names = ("trial", "method", "phase", "lr", "seed", "status", "traceback")
        print(json.dumps({name: record.get(name) for name in names} | {"why": list(reasons)}, indent=2))
        return
    console.show(f"{record['trial']}   {record['method']}   {record['phase']}   {record['status']}")
    for reason in reasons:
        console.show(reason)
    if record.get("traceback"):
        console.show(record["traceback"])


def diff(
    first: Annotated[Path, typer.Argument(help="A results folder.")],
    second: Annotated[Path, typer.Argument(help="The results folder to compare it with.")],
    as_json: Json = False,
) -> None:
    """Compare two results folders: settings and versions that differ, and each method's score and costs."""
    from gradcost.cli import console
    from gradcost.results import difference
    from gradcost.results.records import read

    one, other = read(first), read(second)
    settings, rows = difference.settings(one, other), difference.differences(one, other)
    cells = [row.cells(other.study.metric) for row in rows]
    if as_json:
        named = [dict(zip(difference.COLUMNS, row, strict=True)) for row in cells]
        print(json.dumps({"settings": [list(setting) for setting in settings], "methods": named}, indent=2))
        return
    if settings:
        console.show_table(["differs", str(first), str(second)], [list(setting) for setting in settings], left=True)
    else:
        console.show("The settings and versions of both are the same.")
    console.show()
    console.show_table(list(difference.COLUMNS), cells)
    console.show("second - first: median of the differences between runs with one seed, and its interval")


def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="FILE.parquet. Curves: FILE.curves.parquet.")],
    as_json: Json = False,
) -> None:
    """Write the records as two tables: one row per trial, and one row per point of a curve."""
    from gradcost.cli import console
    from gradcost.results import export as tables

    trials, curves = tables.write(folder, output)
    if as_json:
        print(json.dumps({"trials": str(trials), "curves": str(curves)}, indent=2))
        return
    console.show(f"trials   {trials}")
    console.show(f"curves   {curves}")


def _readable(item: Any) -> str:
    """Format a field of a record. A list is shown as its last item and its length."""
    match item:
        case dict():
            return "   ".join(f"{name} {_readable(part)}" for name, part in item.items())
        case [*_, last] if len(item) > 1:
            return f"{last} (the last of {len(item)})"
        case None:
            return "none"
    return str(item)
