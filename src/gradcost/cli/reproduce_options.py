"""The options of `gradcost reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gradcost.cli.options import Every, Executor, Json, Output, TrialDevice, TrialTimeout, Workers


@dataclass(frozen=True)
class ReproduceOptions:
    """The options of `gradcost reproduce`."""

    paper: Annotated[str, typer.Argument(help="The paper: rike2022, baydin2022 or panchal2025.")]
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows to run. rike2022: nn (the default), cnn or cifar10. baydin2022: logistic, nn (the default) or "
            'cnn. panchal2025: names of methods, such as "BP-Vanilla; MeZO"; default: all whose estimates differ.'
        ),
    ] = None
    protocol: Annotated[
        str, typer.Option(help="paper: as the paper says. code: as the authors' notebooks ran it. rike2022 only.")
    ] = "paper"
    epochs: Annotated[
        float | None, typer.Option(help="rike2022: epochs of each run; may be a fraction. Default: the paper's.")
    ] = None
    forwards: Annotated[float, typer.Option(help="panchal2025: budget of each run, in forward passes.")] = 6000.0
    rates: Annotated[
        str,
        typer.Option(
            help="panchal2025: learning rates in a method's grid: a number of them, the largest ones of the five, or "
            "a range LOW:HIGH, half a decade apart, such as 1e-5:1e-3."
        ),
    ] = "5"
    more: Annotated[
        int, typer.Option(min=0, help="panchal2025: further learning rates, each chosen from the results so far.")
    ] = 2
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="Final runs of each row, one per seed. Default: 1; panchal2025: 3."),
    ] = None
    uncapped: Annotated[bool, typer.Option("--uncapped", help="Also run each capped row without the cap.")] = False
    points: Annotated[int, typer.Option(min=1, help="Points of each curve of the training loss.")] = 200
    tuned: Annotated[bool, typer.Option("--tuned", help="Also tune each row with equal effort and run it.")] = False
    tuning_points: Annotated[
        int | None,
        typer.Option(min=1, help="With --tuned: learning rates in a row's grid. Default: 5; baydin2022: 9."),
    ] = None
    tuned_epochs: Annotated[
        float | None, typer.Option(help="With --tuned: epochs of each tuning run and tuned run. Default: --epochs.")
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="baydin2022: steps of a run. Default: the paper's.")] = None
    tuned_steps: Annotated[
        int | None, typer.Option(min=1, help="Of baydin2022, with --tuned: steps of its runs. Default: --steps.")
    ] = None
    times_only: Annotated[bool, typer.Option("--times-only", help="baydin2022: time the steps; train nothing.")] = (
        False
    )
    costs: Annotated[
        bool, typer.Option("--costs", help="panchal2025: forecast a step on the paper's models; train nothing.")
    ] = False
    probes: Annotated[
        int | None, typer.Option(min=1, help='panchal2025: directions per step of "multiple". Default: 10.')
    ] = None
    snapshot_every: Annotated[
        int | None,
        typer.Option(min=1, help="panchal2025: steps from one full gradient of SVRG to the next. Default: 100."),
    ] = None
    target: Annotated[
        float | None,
        typer.Option(help='Of panchal2025: the validation accuracy of "steps to the target", 0 to 1. Default: 0.8.'),
    ] = None
    task: Annotated[
        str | None,
        typer.Option(
            help="Another task to train on. To try the command: digits. A name keeps the model of the rows; "
            "an expression such as Cifar10(model=Vgg(8)), or FILE.py:NAME, has its own."
        ),
    ] = None
    device: TrialDevice = None
    workers: Workers = None
    executor: Executor = "local"
    every: Every = 30.0
    trial_timeout: TrialTimeout = None
    output: Output = None
    page: Annotated[
        Path | None, typer.Option(help="Also write a Markdown page with the reproduced and other numbers.")
    ] = None
    as_json: Json = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and their hours, from a few timed steps; start none.")
    ] = False
    records: Annotated[bool, typer.Option("--records", help="Start no run; use the existing records.")] = False
