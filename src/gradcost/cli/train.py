"""`gradcost train`: train with one method, record the run in a folder, and resume it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradcost.cli import console, spec
from gradcost.cli.objective import EXAMPLES, called_data, from_factory, refuse, training_part, with_batch
from gradcost.cli.train_options import TrainOptions
from gradcost.core.batching.batches import Batches, length_of
from gradcost.core.errors import BadInput, require
from gradcost.core.files import locked, replacing, write_whole
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.units import count
from gradcost.tasks.contract import check_loader, check_loss
from gradcost.tasks.metrics import default_loss
from gradcost.training.loop import StepResult, train
from gradcost.training.recorded import CHECKPOINT, LOSSES, recorded
from gradcost.training.step_log import StepLog

LOG, RUN, WEIGHTS = "steps.log", "run.json", "weights.safetensors"


class _Run:
    """The task of one run. Its objective is made once, so that its weights can be saved after the last step."""

    def __init__(self, task: Any, name: str, key: Key) -> None:
        self.task, self.name = task, name
        self.made: Objective = task.objective(key.fold("init"))

    def __repr__(self) -> str:
        return self.name

    def objective(self, key: Key) -> Objective:
        return self.made

    def batch_at(self, key: Key, step: int) -> Any:
        return self.task.batch_at(key, step)


def train_model(options: TrainOptions) -> int:
    """Train, write weights and losses, and return the exit code."""
    safetensors = require("safetensors.torch", "A file of weights", "study")
    estimator, optimizer = spec.method(options.method), spec.optimizer(options.optimizer)
    _require_new(options)
    run, steps = _run(options)
    if options.dry_run:
        _show_plan(options, run, steps)
        return 0
    _require_same(
        options, {"method": repr(estimator), "optimizer": repr(optimizer), "seed": options.seed, "task": repr(run)}
    )
    first = run.batch_at(Key(options.seed).fold("data"), 0)
    check_loss(run.made, first, "train", hint=run.made.loss is default_loss)
    log = StepLog(options.output / LOG) if options.log else None
    resume = None if options.log else options.output / CHECKPOINT
    last: StepResult | None = None
    finite: list[bool] = []  # whether the loss of each step of this call is finite
    weights = options.output / WEIGHTS
    with locked(options.output), console.status(f"training {steps:,} steps") as progress:
        try:
            taken = train(run, estimator, optimizer, Key(options.seed), steps, resume, log=log)
            for last in recorded(taken, options.output, None if options.log else options.every):
                progress(f"{last.number + 1:,}")
                finite.append(isfinite(last.loss))
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_kept(options)) from error
        save_weights(safetensors, run.made.model, weights)
    _show(options, steps, last, weights)
    if finite and not any(finite):
        console.complain(f"no weight has moved: the loss of all {count(len(finite), 'step')} was not finite.")
        return 1
    return 0


def _kept(options: TrainOptions) -> str:
    """Say what an interrupted run keeps."""
    if any((options.output / name).exists() for name in (CHECKPOINT, LOG)):
        return "the run goes on from its last checkpoint with --resume"
    return f"there is no checkpoint yet (--every {options.every:g} seconds), so with --resume the run starts again"


def save_weights(safetensors: Any, model: nn.Module, path: Path) -> None:
    """Write the weights of a model to a file of safetensors, atomically.

    Args:
        safetensors: the module `safetensors.torch`.
        model: the model.
        path: the file.
    Raises:
        BadInput: `path` is a folder or a device, or the file cannot be written.
    """
    with replacing(path) as temporary:
        try:
            safetensors.save_model(model, str(temporary))
        except OSError:
            raise
        except Exception as error:  # such as SafetensorError for a full disk
            raise BadInput(f"{path} cannot be written: {' '.join(str(error).split())}") from error


def _require_new(options: TrainOptions) -> None:
    if (options.output / "study.json").exists():
        raise BadInput(f"{options.output} has the results of a study: give another --output.")
    existing = next((name for name in (CHECKPOINT, LOG) if (options.output / name).exists()), None)
    has_steps = existing is not None or any((options.output / name).exists() for name in (WEIGHTS, LOSSES))
    is_run = has_steps and (options.output / RUN).exists()  # a run that failed before its first step may begin anew
    if (is_run or existing is not None) and not options.resume:
        raise BadInput(f"{options.output} has a run: add --resume to continue it, or give another --output.")
    if existing is None:
        others = [name for name in (WEIGHTS, LOSSES) if (options.output / name).exists()]
        if others and not is_run:
            raise BadInput(f"{options.output} has a file {others[0]} of something else: give another --output.")
        return
    if (existing == LOG) != options.log:
        wanted = "add --log" if existing == LOG else "leave --log out"
        raise BadInput(f"the run in {options.output} has the file {existing}: {wanted}.")


def _require_same(options: TrainOptions, arguments: dict[str, Any]) -> None:
    """Write the arguments of a new run; compare those of a resumed one."""
    path = options.output / RUN
    if not (options.resume and path.exists()):
        write_whole(path, json.dumps(arguments, indent=2) + "\n")
        return
    try:
        earlier = json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        earlier = None
    if not isinstance(earlier, dict):
        raise BadInput(
            f"{path} is damaged: delete it, and repeat the command with the arguments that the run began with."
        )
    for name, given in arguments.items():
        if earlier.get(name) != given:
            raise BadInput(f"the run in {options.output} has the {name} {earlier.get(name)}, not {given}.")


def _run(options: TrainOptions) -> tuple[_Run, int]:
    """Return what to train, and the number of steps."""
    key = Key(options.seed)
    if options.data is None:
        if options.model is not None and ":" in options.model:
            raise BadInput(f"--model {options.model} needs data: add --data FILE.py:LOADER.")
        task = with_batch(
            spec.task(options.task or "digits", options.model)[0], options.batch, options.task or "digits"
        )
        return _Run(task, repr(task), key), options.steps or task.steps
    if options.model is None:
        raise BadInput("--data needs a model: add --model FILE.py:MAKE.")
    refuse("--data", **{"--task": options.task})
    examples = options.batch or EXAMPLES
    loader = _loader(options.data, examples, key)
    steps = options.steps or length_of(loader)
    if steps is None:
        raise BadInput(f"the {type(loader).__name__} of {options.data} has no known length: give --steps.")
    name = f"{options.model} on {options.data}, batch {examples}"
    return _Run(_OwnTask(options.model, loader), name, key), steps


class _OwnTask:
    """The task of --model and --data."""

    def __init__(self, model: str, loader: Iterable[Any]) -> None:
        self.model, self.loader, self.batches = model, loader, Batches(loader)

    def objective(self, key: Key) -> Objective:
        def seeded(factory: Callable[[], Any]) -> Any:
            with seeded_generators(key):
                return factory()

        module, loss = from_factory(self.model, None, seeded)
        return Objective(module, loss or default_loss, data=lambda: self.batches.once(Key(0).fold("once")))

    def batch_at(self, key: Key, step: int) -> Any:
        return self.batches.at(key, step)


def _loader(text: str, examples: int, key: Key) -> Iterable[Any]:
    """Call the function that --data names; return its training batches."""
    with seeded_generators(key.fold("loader")):
        made = called_data(text, examples)
    made = training_part(made, text)
    if isinstance(made, Tensor | tuple | Mapping):  # one batch
        return [made]
    check_loader(made, f"what {text} returns")
    return made


def _show_plan(options: TrainOptions, run: _Run, steps: int) -> None:
    weights = run.made.dimension
    if options.as_json:
        console.print_json({"steps": steps, "weights": weights, "folder": str(options.output)})
        return
    console.show(f"{options.method} would train {weights:,} weights of {run} for {steps:,} steps in {options.output}")


def _show(options: TrainOptions, steps: int, last: StepResult | None, weights: Path) -> None:
    loss = None if last is None else float(last.loss)
    if options.as_json:
        record = {"steps": steps, "loss": loss, "weights": str(weights), "losses": str(options.output / LOSSES)}
        console.print_json(record)
        return
    reached = "was complete" if loss is None else f"reached loss {loss:.4g}"
    console.show(
        f"{steps:,} steps: {options.method} {reached}. Weights: {weights}. Losses: {options.output / LOSSES}"
    )
