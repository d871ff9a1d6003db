"""`gradcost status`, `show`, `why`, `diff` and `export`: inspect results folders.

None of them imports torch, except an export to TensorBoard.
"""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gradcost.cli.options import Folder, Json
from gradcost.core.errors import BadInput

Id = Annotated[str, typer.Argument(metavar="TRIAL", help="The id of a trial, or its first characters.")]


def status(folder: Folder, as_json: Json = False) -> None:
    """Show the progress of a study: finished, failed and unfinished trials, and the process that runs it."""
    from gradcost.cli import console
    from gradcost.core.units import count
    from gradcost.results import status

    progress = status.status(folder)
    if as_json:
        console.print_json(dataclasses.asdict(progress))
        return
    user = "no process" if progress.pid is None else f"process {progress.pid}" if progress.pid else "another process"
    console.show(f"{folder}   {user} works on it")
    if progress.done:
        console.show_table(["phase", "trials done"], [[phase, str(n)] for phase, n in progress.done.items()])
    else:
        console.show("no trial has ended yet")
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
        console.print_json(record)
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
        console.print_json({name: record.get(name) for name in names} | {"why": list(reasons)})
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
    for path, results in ((first, one), (second, other)):
        console.complain_of(results, f"{path}: ")
    settings, rows = difference.settings(one, other), difference.differences(one, other)
    cells = [row.cells(other.study.metric) for row in rows]
    if as_json:
        named = [dict(zip(difference.COLUMNS, row, strict=True)) for row in cells]
        console.print_json({"settings": [list(setting) for setting in settings], "methods": named})
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="parquet: FILE.parquet; the curves go to FILE.curves.parquet. Otherwise a folder. Without it, W&B "
            "and MLflow write to the server that they are set up for.",
        ),
    ] = None,
    to: Annotated[str, typer.Option(help="What to write: parquet, tensorboard, wandb or mlflow.")] = "parquet",
    as_json: Json = False,
) -> None:
    """Write the records as two Parquet tables, or as runs of an experiment tracker: one per trial."""
    from gradcost.cli import console

    written = _export(folder, output, to)
    if as_json:
        console.print_json({name: item for name, item in written.items() if name != "next"})
        return
    for name, item in written.items():
        console.show(f"{name:8} {item}")


def _export(folder: Path, output: Path | None, to: str) -> dict[str, str | int]:
    """Write the records, and return what to show."""
    from gradcost.cli import console
    from gradcost.integrations import trackers
    from gradcost.results import export as tables
    from gradcost.results.records import read

    known = ("parquet", "tensorboard", "wandb", "mlflow")
    if to not in known:
        raise BadInput(f"--to takes {', '.join(known[:-1])} or {known[-1]}, not {to!r}.")
    if output is None and to in known[:2]:
        raise BadInput(f"--to {to} needs -o {'FILE.parquet' if to == 'parquet' else 'FOLDER'}.")
    results, name = read(folder), folder.resolve().name
    console.complain_of(results)
    match to, output:
        case "parquet", Path():
            trials, curves = tables.write(folder, output, results)
            return {"trials": str(trials), "curves": str(curves)}
        case "tensorboard", Path():
            number = trackers.to_tensorboard(results, output)
            follow = f"tensorboard --logdir {shlex.quote(str(output))}"
        case "wandb", _:
            number = trackers.to_wandb(results, name, output)
            follow = f"wandb sync {shlex.quote(str(output / 'wandb'))}/offline-run-*" if output else ""
        case _:
            number = trackers.to_mlflow(results, name, output)
            follow = f"mlflow ui --backend-store-uri {shlex.quote(trackers.mlflow_uri(output))}" if output else ""
    return {"runs": number} | ({"next": follow} if follow else {})


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
