"""`gradcost replay`: rebuild the weights of a training run from its step log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradcost.cli import console, spec
from gradcost.cli.objective import from_factory
from gradcost.cli.train import save_weights
from gradcost.cli.train_options import ReplayOptions
from gradcost.core.errors import BadInput, require
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Directions
from gradcost.training.replay import replay
from gradcost.training.step_log import Logged, read_log


def replay_log(options: ReplayOptions) -> int:
    """Write the weights after a step, and return the exit code."""
    safetensors = require("safetensors.torch", "A file of weights", "study")
    for given in (options.log, options.weights):
        if given is not None and options.output.resolve() == given.resolve():
            raise BadInput(f"--output {options.output} is also read: give another name.")
    logged = read_log(options.log)
    objective = _objective(options.log, logged, options.model)
    if options.weights is not None:
        _load(safetensors, objective, options.weights)
    directions = next((step.directions for step in logged.steps if step.directions), "Gaussian()")
    parsed = spec.parse(directions, "method", what="direction")
    if not isinstance(parsed, Directions):
        raise BadInput(f"{options.log} is along {directions}, which this version of gradcost does not have.")
    taken = replay(options.log, objective, parsed, spec.optimizer(logged.optimizer), options.to)
    save_weights(safetensors, objective.model, options.output)
    if options.as_json:
        console.print_json({"steps": taken, "logged": len(logged.steps), "weights": str(options.output)})
    else:
        console.show(f"{options.output}: the weights after {taken} of {len(logged.steps)} steps")
    return 0


def _objective(path: Path, logged: Logged, model: str | None) -> Objective:
    """Return an objective of the model of --model, or of the task that the log names. Its loss is not used."""
    if model is not None:
        return Objective(from_factory(model, None, lambda factory: factory())[0], _no_loss)
    about = logged.about
    try:
        task = spec.task(about["task"])[0]
    except (BadInput, KeyError):
        raise BadInput(f"{path} does not name a task of gradcost: give --model FILE.py:FACTORY.") from None
    return task.objective(Key(about["key"]).fold("init"))


def _no_loss(model: Any, batch: Any) -> Any:
    raise BadInput("a replay evaluates no loss.")


def _load(safetensors: Any, objective: Objective, path: Path) -> None:
    if not path.is_file():
        raise BadInput(
            f"{path} is not a regular file: give a file of weights." if path.exists() else f"there is no file {path}."
        )
    try:
        safetensors.load_model(objective.model, str(path))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} does not contain the weights of this model: {reason}") from error
