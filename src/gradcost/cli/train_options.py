"""The options of `gradcost train` and `gradcost replay`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gradcost.cli.options import Json


@dataclass(frozen=True)
class TrainOptions:
    """The options of `gradcost train`."""

    method: Annotated[str, typer.Argument(help='The method: "mezo(probes=4)".')]
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for weights, losses and checkpoint.")]
    optimizer: Annotated[str, typer.Option(help='The optimizer, with its learning rate: "AdamW(lr=0.001)".')]
    task: Annotated[
        str | None, typer.Option(help="A task: its name, an expression, or FILE.py:NAME. Default: digits.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Your own model, with --data: FILE.py:MAKE or MODULE:MAKE, which returns a model or (model, loss). "
            "With --task: the name of one of its models."
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own data, with --model: FILE.py:LOADER. LOADER(batch_size) returns a DataLoader, a list of "
            "batches, one batch, or a dictionary with train."
        ),
    ] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Examples in a batch. Default: 8, or as in the task.")] = (
        None
    )
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps in total. Default: the task's, or one pass over --data.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="The seed of weights, data and directions.")] = 0
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint or log in the folder, with the same bits.")
    ] = False
    log: Annotated[
        bool, typer.Option("--log", help="Write a step log, 45 bytes per step, instead of training checkpoints.")
    ] = False
    every: Annotated[float, typer.Option(min=0, help="Seconds between two training checkpoints.")] = 30.0
    as_json: Json = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; train nothing.")] = False


@dataclass(frozen=True)
class ReplayOptions:
    """The options of `gradcost replay`."""

    log: Annotated[Path, typer.Argument(help="The step log of a training run.")]
    output: Annotated[Path, typer.Option("--output", "-o", help="The file for the weights (safetensors).")]
    to: Annotated[int | None, typer.Option(min=0, help="Number of steps to take. Default: all.")] = None
    model: Annotated[
        str | None,
        typer.Option(help="FILE.py:FACTORY. FACTORY returns the model. Default: the task and key of the log."),
    ] = None
    weights: Annotated[
        Path | None, typer.Option(help="The weights before step 0 (safetensors). Default: those of the model.")
    ] = None
    as_json: Json = False
