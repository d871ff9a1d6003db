"""The commands. Nothing heavy is imported until a command needs it: `gradcost --help` answers at once."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from gradcost.cli import results as inspect
from gradcost.cli.results import Json
from gradcost.core.errors import BadInput, GradcostError

app = typer.Typer(
    help="What does a gradient cost, and which way of getting one should you train with?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Fetch and check data sets.", no_args_is_help=True)
app.add_typer(data, name="data")


BUG = 70  # the exit code of an internal error: EX_SOFTWARE of sysexits.h


def reported(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turn the errors that a user can cause into a sentence and an exit code; show any other as a bug of ours."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from gradcost.cli.console import complain

        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            complain("interrupted; finished work is kept.")
            code = 130
        except OSError as error:
            reason = error.strerror or str(error)
            complain(f"{reason}: {error.filename}" if error.filename else reason)
            code = 1
        except GradcostError as error:
            complain(str(error))
            code = 2
        except (typer.Exit, typer.Abort, click.ClickException):
            raise
        except Exception:
            traceback.print_exc()
            complain("this is a bug in gradcost: please report it with the traceback above and your command.")
            code = BUG
        raise typer.Exit(code or 0)

    return run


@app.command()
@reported
def compare(
    task: Annotated[str, typer.Option(help="A task's name, an expression, or FILE.py:NAME.")] = "digits",
    model: Annotated[str | None, typer.Option(help="One of the task's models, or an expression.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help='Repeatable: "mezo(probes=4)". All presets if none.')
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Budget of a step beyond the weights: 64MiB.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of every run; the task's own if none.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each method.")] = 3,
    points: Annotated[int, typer.Option(min=1, help="Learning rates that each method is tuned over first.")] = 9,
    more: Annotated[int, typer.Option(min=0, help="Points after those, past an edge or beside the best.")] = 2,
    confirm: Annotated[int, typer.Option(min=0, help="Fresh seeds on which the best three are run again.")] = 2,
    span: Annotated[str, typer.Option("--rates", help="The range of those, LEAST:MOST.")] = "1e-4:10",
    target: Annotated[float, typer.Option(min=0, max=1, help="Validation accuracy whose time is noted.")] = 0.9,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Results folder; resumed if it exists.")
    ] = None,
    as_json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what a step costs.")] = False,
) -> int:
    """Tune every method alike, train with each, and say which to use and what each costs."""
    from gradcost.cli.compare import compare_methods

    return compare_methods(
        task, model, method or [], memory, steps, seeds, points, more, confirm, span, target, output,
        as_json, dry_run,
    )  # fmt: skip


@app.command()
@reported
def plan(
    memory: Annotated[
        str, typer.Option(help="Budget for the peak of a whole step, weights included: 24GiB, or 24GB.")
    ],
    model: Annotated[
        str | None, typer.Option(help="hf:CONFIG.json, MODULE:FACTORY, FILE.py:FACTORY, or one of the task's.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION, where FUNCTION(batch size) gives a batch (x, y).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Plan for a task's model and batch instead.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the step would run: cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: bfloat16; the model's own if none.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of a batch; 8 if none.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of an example; 512 if none.")] = None,
    lora: Annotated[int | None, typer.Option(help="Freeze the model and train LoRA adapters of this rank.")] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="The head and the loss of a language model in so many chunks.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="What the gradient is used by.")] = "AdamW(lr=0.001)",
    method: Annotated[
        list[str] | None, typer.Option(help='Repeatable: "mezo(probes=4)". The usual ones if none.')
    ] = None,
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Find the largest batch that fits, too.")] = False,
    as_json: Json = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page with figures.")] = None,
) -> int:
    """Say what a step by each method would take, and which to use, before anything runs: no weights are made."""
    from gradcost.cli.plan import plan_methods

    return plan_methods(
        model, data, task, memory, device, dtype, batch, length, lora, chunks, optimizer, method or [], max_batch,
        as_json, output,
    )  # fmt: skip


@app.command()
@reported
def check(
    method: Annotated[
        str | None, typer.Argument(help='What to check: "mezo(probes=4)". Every preset, in short, if none.')
    ] = None,
    model: Annotated[str | None, typer.Option(help="FILE.py:FACTORY, or one of the task's.")] = None,
    data: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION, where FUNCTION(batch size) gives a batch (x, y).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Check on a task's model and batch; digits if none.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of a batch; 8, or the task's own, if none.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Estimates held against the gradient.")] = 16,
    as_json: Json = False,
) -> int:
    """Say whether a method is right on this model and data, and how near it comes to the gradient."""
    from gradcost.cli.check import check_methods

    return check_methods(method, model, data, task, batch, draws, as_json)


@app.command()
@reported
def study(
    file: Annotated[str, typer.Argument(help="FILE.py with one @study, or FILE.py:NAME.")],
    workers: Annotated[int | None, typer.Option("-j", min=1, help="Trials at a time; one a core if none.")] = None,
    executor: Annotated[str, typer.Option(help="Who performs the trials: local or ray.")] = "local",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Results folder; resumed if it exists.")
    ] = None,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two checkpoints of a trial.")] = 30.0,
    as_json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first trials and run none.")] = False,
) -> int:
    """Run a study of your own, once and only once: the same command again resumes."""
    from gradcost.cli.study import run_study

    return run_study(file, workers, executor, output, every, as_json, dry_run)


@app.command()
@reported
def reproduce(
    paper: Annotated[str, typer.Argument(help="The paper: rike2022.")],
    rows: Annotated[str, typer.Option(help="Which rows of its table: nn.")] = "nn",
    epochs: Annotated[float, typer.Option(help="Of every run; a fraction will do for a try.")] = 50.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 1,
    tuned: Annotated[bool, typer.Option("--tuned", help="The same rows again, all tuned alike.")] = False,
    points: Annotated[int, typer.Option(min=1, help="Learning rates of a row's grid, with --tuned.")] = 5,
    tuned_epochs: Annotated[float | None, typer.Option(help="Of the tuned runs; those of the rows if none.")] = None,
    task: Annotated[str, typer.Option(help="A stand-in for the paper's data, to try it.")] = "mnist",
    workers: Annotated[int, typer.Option("-j", min=1, help="Runs at a time.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Results folder; resumed if it exists.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write what holds and what does not, as Markdown.")] = None,
    every: Annotated[float, typer.Option(min=0, help="Seconds between two checkpoints of a run.")] = 30.0,
    as_json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and start none.")] = False,
    records: Annotated[bool, typer.Option("--records", help="Start none: tell from the records there are.")] = False,
) -> int:
    """Run a published comparison again, and say which of its numbers hold and in what sense."""
    from gradcost.cli.reproduce import reproduce_paper

    return reproduce_paper(
        paper,
        rows,
        epochs,
        seeds,
        tuned,
        points,
        tuned_epochs,
        task,
        workers,
        output,
        page,
        every,
        as_json,
        dry_run,
        records,
    )


@app.command()
@reported
def methods(
    name: Annotated[str | None, typer.Argument(help="One method or part to be told of.")] = None,
    as_json: Json = False,
) -> int:
    """List the methods with what each costs and the parts that they are made of, or tell of one."""
    from gradcost.cli.methods import explain_method, list_methods

    return list_methods(as_json) if name is None else explain_method(name, as_json)


@app.command()
@reported
def tasks(as_json: Json = False) -> None:
    """List the tasks, their models, and whether their data is at hand."""
    from gradcost.cli import console
    from gradcost.tasks import TASKS

    found = [
        {"name": name, "models": list(task.models), "what": (task.__doc__ or "").split("\n")[0]}
        for name, task in TASKS.items()
    ]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [[entry["name"], ", ".join(entry["models"]), entry["what"]] for entry in found]
    console.show_table(["task", "models", "what it is"], rows, left=True)


@data.command()
@reported
def fetch(name: Annotated[str, typer.Argument(help="The data set: mnist.")]) -> None:
    """Fetch a data set, check it, and keep it in the cache folder (GRADCOST_CACHE, or the platform's)."""
    from gradcost.cli import console, spec
    from gradcost.tasks import data as datasets

    if name not in datasets.DATASETS:
        raise BadInput(
            f"no data set {name!r}.{spec.hint(name, datasets.DATASETS)} Data sets: {', '.join(datasets.DATASETS)}."
        )
    console.show(f"{name} is in {datasets.fetch(datasets.DATASETS[name], console.say)}")


@app.command()
@reported
def report(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; FOLDER/report.html if none.")
    ] = None,
    assets: Annotated[
        bool, typer.Option("--assets", help="Each figure and table as a file too, in FOLDER/report-files.")
    ] = False,
) -> None:
    """Write the report of a results folder anew, from its records alone."""
    from gradcost.cli import console
    from gradcost.report import assets as files
    from gradcost.report import html

    console.show(str(html.write(folder, output)))
    if assets:
        made = files.write(folder)
        console.show(f"{made[0].parent}: {len(made)} files")


@app.command()
@reported
def lint(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 where there is an error.")] = False,
    as_json: Json = False,
) -> int:
    """Say what is unfair in a study, or says less than it seems to, from its records alone."""
    from gradcost.cli.lint import lint_folder

    return lint_folder(folder, strict, as_json)


@app.command()
@reported
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure for 10 s what the machine does in a second, and remember it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine and installation can do."""
    import torch

    from gradcost.cli import console
    from gradcost.noise.add import has_fused_path
    from gradcost.studies.environment import describe, fingerprint

    found = describe(torch.get_num_threads(), fingerprint()) | {
        "cuda": str(torch.cuda.is_available()),
        "noise": "fused with the update (numba)" if has_fused_path() else "plain torch: slow; install gradcost[fast]",
    }
    rows = [[name, str(value)] for name, value in found.items()]
    if calibrate:
        from gradcost.planning import roofline

        rates = roofline.calibrate()
        console.say(f"remembered in {roofline.remember(rates)}")
        found |= {"rates": asdict(rates)}
        rows += [list(row) for row in rates.rows()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console.show_table(["", ""], rows, left=True)


for _command in (inspect.status, inspect.show, inspect.why, inspect.export):
    app.command()(reported(_command))


def version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        print(f"gradcost {installed('gradcost')}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    app(prog_name="gradcost")


if __name__ == "__main__":
    sys.exit(main())
