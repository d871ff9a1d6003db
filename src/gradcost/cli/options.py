"""The options of the commands: one dataclass for each, which is also the command's help text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Folder = Annotated[Path, typer.Argument(help="A results folder.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Results folder; resumed if it exists.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help="Trials that run at once. Default: one a core.")
]
Executor = Annotated[str, typer.Option(help="Where trials run: local or ray.")]
Every = Annotated[float, typer.Option(min=0, help="Seconds between two checkpoints of a trial.")]
Data = Annotated[str | None, typer.Option(help="FILE.py:FUNCTION; FUNCTION(batch size) returns a batch (x, y).")]


def with_options(options: type) -> Callable[[Callable[[Any], int]], Callable[..., int]]:
    """Give a command the fields of a dataclass as its options; it is called with one value of that class."""

    def decorate(command: Callable[[Any], int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**given: Any) -> int:
            return command(options(**given))

        hints = get_type_hints(options, include_extras=True)
        fields = inspect.signature(options).parameters.values()
        parameters = [field.replace(annotation=hints[field.name]) for field in fields]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {field.name: hints[field.name] for field in fields}
        return run

    return decorate


@dataclass(frozen=True)
class CompareOptions:
    """The options of `gradcost compare`; a second name is a former spelling, still accepted."""

    task: Annotated[str, typer.Option(help="The name of a task, an expression, or FILE.py:NAME.")] = "digits"
    model: Annotated[str | None, typer.Option(help="The name of one of the task's models, or an expression.")] = None
    method: Annotated[
        list[str] | None,
        typer.Option(
            help='Repeatable: "mezo(probes=4)". Default: backprop, checkpointed, forward_gradient, spsa, mezo.'
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory-beyond-weights",
            help="Budget of one step without parameters, buffers and batch: 64MiB. Methods above it are not run.",
        ),
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each trial. Default: the task's number.")] = None
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each method.")] = 3
    tuning_points: Annotated[
        int, typer.Option("--tuning-points", "--points", min=1, help="Learning rates in the grid of each method.")
    ] = 9
    extra_points: Annotated[
        int,
        typer.Option(
            "--extra-points", "--more", min=0, help="Learning rates after the grid: past its edge or beside the best."
        ),
    ] = 2
    confirm_seeds: Annotated[
        int,
        typer.Option(
            "--confirm-seeds", "--confirm", min=0, help="New seeds on which the best three learning rates run again."
        ),
    ] = 2
    lr_range: Annotated[str, typer.Option("--lr-range", "--rates", help="Range of the grid, LOW:HIGH.")] = "1e-4:10"
    target: Annotated[float, typer.Option(min=0, max=1, help="Validation accuracy whose first step is recorded.")] = (
        0.9
    )
    workers: Workers = None
    executor: Executor = "local"
    every: Every = 30.0
    output: Output = None
    as_json: Json = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run and what a step costs; run nothing.")
    ] = False


@dataclass(frozen=True)
class PlanOptions:
    """The options of `gradcost plan`."""

    memory: Annotated[
        str, typer.Option(help="Budget for the peak of a whole step, weights included: 24GiB, or 24GB.")
    ]
    model: Annotated[
        str | None,
        typer.Option(
            help="hf:CONFIG.json, MODULE:FACTORY, FILE.py:FACTORY, or the name of one of the task's models."
        ),
    ] = None
    data: Data = None
    task: Annotated[str | None, typer.Option(help="Plan for the model and batch of a task instead.")] = None
    device: Annotated[str | None, typer.Option(help="Where the step would run: cpu or cuda.")] = None
    dtype: Annotated[str | None, typer.Option(help="Of the weights: bfloat16. Default: the model's own.")] = None
    batch: Annotated[int | None, typer.Option(help="Examples in a batch. Default: 8.")] = None
    length: Annotated[int | None, typer.Option(help="Tokens in an example. Default: 512.")] = None
    lora: Annotated[int | None, typer.Option(help="Freeze the model and train LoRA adapters of this rank.")] = None
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Compute head and loss of a language model in this many chunks.")
    ] = None
    optimizer: Annotated[str, typer.Option(help="The optimizer, whose state counts as memory.")] = "AdamW(lr=0.001)"
    method: Annotated[
        list[str] | None, typer.Option(help='Repeatable: "mezo(probes=4)". Default: about twenty methods.')
    ] = None
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Also find the largest batch that fits.")] = False
    as_json: Json = False
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page with figures.")] = None


@dataclass(frozen=True)
class CheckOptions:
    """The options of `gradcost check`."""

    method: Annotated[
        str | None, typer.Argument(help='The method: "mezo(probes=4)". Default: every preset, one line each.')
    ] = None
    model: Annotated[str | None, typer.Option(help="FILE.py:FACTORY, or the name of one of the task's models.")] = (
        None
    )
    data: Data = None
    task: Annotated[str | None, typer.Option(help="Check on the model and batch of a task. Default: digits.")] = None
    batch: Annotated[int | None, typer.Option(help="Examples in a batch. Default: 8, or the task's own.")] = None
    draws: Annotated[int, typer.Option(min=1, help="Estimates that are compared with the gradient.")] = 16
    as_json: Json = False


@dataclass(frozen=True)
class StudyOptions:
    """The options of `gradcost study`."""

    file: Annotated[str, typer.Argument(help="FILE.py with one @study, or FILE.py:NAME.")]
    workers: Workers = None
    executor: Executor = "local"
    every: Every = 30.0
    output: Output = None
    as_json: Json = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first trials; run nothing.")] = False


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of `gradcost reproduce`."""

    paper: Annotated[str, typer.Argument(help="The paper: rike2022.")]
    rows: Annotated[str, typer.Option(help="Which rows of its table: nn.")] = "nn"
    epochs: Annotated[float, typer.Option(help="Length of each run; may be a fraction.")] = 50.0
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each row.")] = 1
    tuned: Annotated[bool, typer.Option("--tuned", help="Also run the same rows with equal tuning.")] = False
    tuning_points: Annotated[int, typer.Option(min=1, help="With --tuned: learning rates in a row's grid.")] = 5
    tuned_epochs: Annotated[
        float | None, typer.Option(help="With --tuned: length of these runs. Default: that of the rows.")
    ] = None
    task: Annotated[str, typer.Option(help="Another task in place of the paper's data, to try the command.")] = (
        "mnist"
    )
    workers: Workers = None
    executor: Executor = "local"
    every: Every = 30.0
    output: Output = None
    page: Annotated[
        Path | None, typer.Option(help="Write a Markdown page: which numbers were reproduced and which were not.")
    ] = None
    as_json: Json = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs; start none.")] = False
    records: Annotated[bool, typer.Option("--records", help="Start no run; use the records that exist.")] = False
