"""The options of the commands: one dataclass per command. Typer makes the help text from its fields."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from gradcost.cli.limits import check_address_space


def _above_zero(seconds: float | None) -> float | None:
    """Refuse a number of seconds that is not above 0; click names the option."""
    if seconds is not None and not seconds > 0:
        raise typer.BadParameter(f"{seconds:g} is not a number of seconds above 0.")
    return seconds


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Folder = Annotated[Path, typer.Argument(help="A results folder.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Results folder; resumed if it exists.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help="Trials to run at once. Default: one per core.")
]
Executor = Annotated[str, typer.Option(help="Where trials run: local or ray.")]
Every = Annotated[float, typer.Option(min=0, help="Seconds between two training checkpoints of a trial.")]
TrialTimeout = Annotated[
    float | None,
    typer.Option(
        callback=_above_zero, help="Seconds after which a trial is ended and counts as failed. Default: no limit."
    ),
]
TrialDevice = Annotated[str | None, typer.Option("--device", help="Where trials run: cpu or cuda. Default: cpu.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="With --model: FILE.py:FUNCTION. FUNCTION(batch_size) or FUNCTION() returns one batch: (x, y), or what "
        "the loss of --model takes; or the dictionary of loaders that `compare` takes."
    ),
]


def with_options(options: type) -> Callable[[Callable[[Any], int]], Callable[..., int]]:
    """Return a decorator: the command takes one `options` value; its fields become the options that Typer parses."""

    def decorate(command: Callable[[Any], int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**parsed: Any) -> int:
            check_address_space()  # every command with options imports torch
            return command(options(**parsed))

        hints = get_type_hints(options, include_extras=True)
        fields = inspect.signature(options).parameters.values()
        parameters = [field.replace(annotation=hints[field.name]) for field in fields]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {field.name: hints[field.name] for field in fields}
        return run

    return decorate


@dataclass(frozen=True)
class CompareOptions:
    """The options of `gradcost compare`. The second name of an option is an older one that still works."""

    task: Annotated[
        str | None, typer.Option(help="A task: its name, an expression, or FILE.py:NAME. Default: digits.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Your own model, with --data: FILE.py:MAKE, which returns a model or (model, loss). "
            "With --task: the name of one of its models, or an expression."
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Your own data, with --model: FILE.py:LOADERS, which returns a dictionary of train, validation and "
            "test: DataLoaders, or lists of batches."
        ),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            help="With --data, what ranks the runs: loss (the default), perplexity, accuracy, or FILE.py:FUNCTION "
            "with metric(model, batch)."
        ),
    ] = None
    lower_is_better: Annotated[
        bool | None,
        typer.Option("--lower-is-better/--higher-is-better", help="The direction of --metric FILE.py:FUNCTION."),
    ] = None
    method: Annotated[
        list[str] | None,
        typer.Option(
            help='A method: "mezo(probes=4)". Repeatable. '
            "Default: backprop, checkpointed, forward_gradient, spsa, mezo."
        ),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory-beyond-weights",
            help="Budget for the peak memory of a step, without parameters, buffers and batch: 64MiB. "
            "Methods above it do not run.",
        ),
    ] = None
    whole_memory: Annotated[str | None, typer.Option("--memory", hidden=True)] = None
    optimizer: Annotated[
        str | None,
        typer.Option(
            help='The optimizer of every method: "AdamW(weight_decay=0.1)"; or customary: AdamW for exact gradients, '
            "SGD for estimated ones. Its learning rate is searched. Default: SGD."
        ),
    ] = None
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples in a batch. Default: the task or LOADERS sets them.")
    ] = None
    device: TrialDevice = None
    dtype: Annotated[str | None, typer.Option(help="Dtype of weights and inputs: bfloat16. Default: unchanged.")] = (
        None
    )
    autocast: Annotated[
        str | None, typer.Option(help="Dtype of autocast around the loss: bfloat16. Default: no autocast.")
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each trial. Default: the task sets them.")] = None
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each method, one per seed.")] = 6
    tuning_points: Annotated[
        int, typer.Option("--tuning-points", "--points", min=1, help="Learning rates in the grid of each method.")
    ] = 9
    extra_points: Annotated[
        int,
        typer.Option(
            "--extra-points",
            "--more",
            min=0,
            help="Learning rates to try after the grid: beyond its edge or next to the best.",
        ),
    ] = 2
    confirm_seeds: Annotated[
        int,
        typer.Option(
            "--confirm-seeds",
            "--confirm",
            min=0,
            help="New seeds with which the best three learning rates run again.",
        ),
    ] = 2
    lr_range: Annotated[
        str | None,
        typer.Option(
            "--lr-range",
            "--rates",
            help="Range of learning rates, LOW:HIGH. Default: 1e-4:10 for SGD, 3e-6:0.3 for Adam and AdamW.",
        ),
    ] = None
    target: Annotated[
        float | None,
        typer.Option(help="Record when the validation metric first reaches this. Default: 0.9 for the accuracy."),
    ] = None
    time: Annotated[
        str | None,
        typer.Option(
            help="Time for the trials of this call: 10m. A coarse answer comes first and is refined until the time "
            "is up; the same command continues. Default: no limit."
        ),
    ] = None
    workers: Workers = None
    executor: Executor = "local"
    every: Every = 30.0
    trial_timeout: TrialTimeout = None
    output: Output = None
    as_json: Json = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the number of trials and the cost of a step; run nothing.")
    ] = False


@dataclass(frozen=True)
class PlanOptions:
    """The options of `gradcost plan`."""

    memory: Annotated[
        str, typer.Option(help="Budget for the peak memory of a step, weights included: 24GiB or 24GB.")
    ]
    model: Annotated[
        str | None,
        typer.Option(
            help="hf:CONFIG.json, MODULE:FACTORY or FILE.py:FACTORY. With --task: the name of a model of the task."
        ),
    ] = None
    data: Data = None
    task: Annotated[str | None, typer.Option(help="Use the model and batch of this task.")] = None
    device: Annotated[str | None, typer.Option(help="Device to forecast for: cpu or cuda.")] = None
    devices: Annotated[
        int, typer.Option(min=1, help="Devices that share the state of training (ZeRO, FSDP2), by arithmetic.")
    ] = 1
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights: bfloat16. Default: unchanged.")] = None
    autocast: Annotated[
        str | None, typer.Option(help="Compute the loss under torch.autocast in this dtype: bfloat16.")
    ] = None
    attention: Annotated[
        str | None, typer.Option(help="Attention of a model of transformers: sdpa or eager. Default: its own.")
    ] = None
    batch: Annotated[int | None, typer.Option(help="Examples in a batch. Default: 8, or as in the task.")] = None
    length: Annotated[
        int | None, typer.Option(help="Tokens in an example. Default: 512, or the model's maximum.")
    ] = None
    lora: Annotated[int | None, typer.Option(help="Freeze the model and train LoRA adapters of this rank.")] = None
    bits: Annotated[int | None, typer.Option(min=4, max=4, help="4: frozen weights in 4 bits, with --lora.")] = None
    chunks: Annotated[
        int | None,
        typer.Option(min=1, help="Split the output head and loss of a language model into this many parts."),
    ] = None
    optimizer: Annotated[
        str, typer.Option(help='"SGD(lr=0.1)"; or customary: AdamW for exact gradients, SGD for the others.')
    ] = "customary"
    method: Annotated[
        list[str] | None,
        typer.Option(help='A method: "mezo(probes=4)". Repeatable. Default: several of each family.'),
    ] = None
    all_rows: Annotated[
        bool, typer.Option("--all", help="Every method, also with 4 and 16 directions. Default: one of each family.")
    ] = False
    max_batch: Annotated[bool, typer.Option("--max-batch", help="Also find the largest batch that fits.")] = False
    fail_over: Annotated[
        bool,
        typer.Option("--fail-over", help="Exit with 4 if a method listed with --method exceeds the budget, for CI."),
    ] = False
    as_json: Json = False
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write an HTML page.")] = None
    sweep: Annotated[list[str] | None, typer.Option(help="A page of many plans: batch=1..64,length=512|1024.")] = None


@dataclass(frozen=True)
class CheckOptions:
    """The options of `gradcost check`."""

    method: Annotated[
        str | None,
        typer.Argument(help='A method: "mezo(probes=4)". Default: all presets that need no argument, one line each.'),
    ] = None
    model: Annotated[str | None, typer.Option(help="FILE.py:FACTORY, or the name of a model of the task.")] = None
    data: Data = None
    task: Annotated[str | None, typer.Option(help="Use the model and batch of this task. Default: digits.")] = None
    batch: Annotated[int | None, typer.Option(help="Examples in a batch. Default: 8, or as in the task.")] = None
    draws: Annotated[int, typer.Option(min=1, help="Estimates to compare with the exact gradient.")] = 16
    as_json: Json = False


@dataclass(frozen=True)
class AuditOptions:
    """The options of `gradcost audit`."""

    function: Annotated[
        str,
        typer.Argument(
            help="MODULE:FUNCTION or FILE.py:FUNCTION. FUNCTION(model, loss) fills .grad; loss() returns the loss."
        ),
    ]
    draws: Annotated[int, typer.Option(min=100, help="Estimates per mean.")] = 1000
    as_json: Json = False


@dataclass(frozen=True)
class StudyOptions:
    """The options of `gradcost study`."""

    file: Annotated[str, typer.Argument(help="FILE.py if it defines one @study, or FILE.py:NAME.")]
    device: Annotated[str | None, typer.Option(help="Device of all trials: cuda. Default: that of the file.")] = None
    workers: Workers = None
    executor: Executor = "local"
    every: Every = 30.0
    trial_timeout: TrialTimeout = None
    output: Output = None
    as_json: Json = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the first trials; run nothing.")] = False
