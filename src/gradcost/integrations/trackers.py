"""Write the trials of a study as runs of TensorBoard, Weights & Biases and MLflow: one run per trial.

The configuration of a run is the settings of its trial. Its curves are those of the trial, by step. Its summary has
the final figures of the trial, and the cost of a step of its method. Values that are not finite are left out.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput, described, require, shortened
from gradcost.results import export
from gradcost.results.records import Results

# Fields of TrialRecord in the configuration, and in the summary; fields of Cost.
_SETTINGS = ("trial", "method", "estimator", "optimizer", "phase", "lr", "seed", "status", "reason")
_FIGURES = ("steps", "seconds", "reached", "clip_rate")
_COSTS = ("peak_bytes", "flops", "forwards", "ms")
_LONGEST = 400  # characters of a text that is shortened for MLflow, which takes 500 in all versions
_AT_ONCE = 1000  # the most metrics that MLflow takes at once
_TAG = "gradcost.trial"  # the tag that identifies the runs of a trial in MLflow


@dataclass(frozen=True)
class Run:
    """A trial in the terms of experiment trackers.

    Args:
        trial: id of the trial.
        name: name in lists of runs.
        group: the method.
        config: settings of the trial.
        points: for each step, the values of the curves at this step.
        summary: final figures.
        has_failed: whether the trial raised an error.
    """

    trial: str
    name: str
    group: str
    config: dict[str, str | int | float]
    points: dict[int, dict[str, float]]
    summary: dict[str, float]
    has_failed: bool


def runs(results: Results) -> Iterator[Run]:
    """Yield a run for each trial of a study.

    Scores have the name of the study's metric, such as `test_accuracy` or `test_perplexity`.
    """
    study, metric, costs = results.study, results.study.metric, {cost.method: cost for cost in results.costs}
    shared = {"task": study.task, "model": study.model_name, "batch": study.batch}

    def valued(what: str, x: Any) -> tuple[str, Any]:
        shown = metric.score(x) if what.endswith("_score") and x is not None else x
        return what.replace("_score", f"_{metric.name}"), shown

    for trial, row in zip(results.trials, export.trials(results), strict=True):
        points: dict[int, dict[str, float]] = {}
        columns = export.curves([trial])
        for step, what, x in zip(columns["step"], columns["what"], columns["value"], strict=True):
            if x is not None:
                points.setdefault(step, {}).update([valued(what, x)])
        scores = dict(valued(what, x) for what, x in row.items() if what.startswith(("validation_", "test_")))
        cost = costs.get(trial.method)
        step_costs = {f"step_{name}": getattr(cost, name) for name in _COSTS} if cost else {}
        yield Run(
            trial.trial,
            f"{trial.method} {trial.phase} lr={trial.lr:g} seed={trial.seed}",
            trial.method,
            _known({name: row[name] for name in _SETTINGS} | shared),
            dict(sorted(points.items())),
            _known({name: row[name] for name in _FIGURES} | scores | step_costs),
            trial.status == "failed",
        )


def to_tensorboard(results: Results, folder: Path) -> int:
    """Write event files, one folder per trial: FOLDER/METHOD/RUN. Runs written before are replaced.

    Args:
        results: a study.
        folder: the folder for `tensorboard --logdir`. It is made if it does not exist.
    Returns:
        The number of runs.
    Raises:
        BadInput: `folder` cannot be made.
        MissingExtra: tensorboard is not installed.
    """
    require("tensorboard", "An export to TensorBoard", "tensorboard")
    writer_of = require("torch.utils.tensorboard", "An export to TensorBoard", "tensorboard").SummaryWriter
    _make(folder)
    for run in runs(results):
        place = folder / _file_name(run.group) / _file_name(f"{run.name.removeprefix(run.group)} {run.trial}")
        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        with contextlib.closing(writer_of(str(place))) as writer:
            for step, values in run.points.items():
                for name, x in values.items():
                    writer.add_scalar(name, x, step)
            writer.add_hparams(run.config, run.summary, run_name=".", global_step=max(run.points, default=0))
    return len(results.trials)


def to_wandb(results: Results, project: str, folder: Path | None = None) -> int:
    """Write runs of Weights & Biases, grouped by method. Their ids are those of the trials.

    Args:
        results: a study.
        project: the project.
        folder: the runs are written below FOLDER/wandb, without network; `wandb sync` uploads them. None: where, and
            whether they are uploaded, is as W&B is set up: by `wandb login` and its environment variables.
    Returns:
        The number of runs.
    Raises:
        BadInput: `folder` cannot be made, or W&B refuses.
        MissingExtra: wandb is not installed.
    """
    wandb = require("wandb", "An export to Weights & Biases", "wandb")
    local: dict[str, Any] = {} if folder is None else {"dir": str(_make(folder)), "mode": "offline"}
    settings = wandb.Settings(console="off", silent=True, disable_git=True, x_disable_stats=True)
    try:
        for run in runs(results):
            written = wandb.init(
                project=_file_name(project), id=_file_name(run.trial), name=run.name, group=run.group,
                config=run.config, settings=settings, reinit="create_new", **local,
            )  # fmt: skip
            for step, values in run.points.items():
                written.log(values, step=step)
            written.summary.update(run.summary)
            written.finish(exit_code=int(run.has_failed))
    except wandb.errors.Error as error:
        raise BadInput(
            f"Weights & Biases refuses: {described(error).rstrip('.')}. With -o FOLDER it needs no login."
        ) from error
    return len(results.trials)


def to_mlflow(results: Results, experiment: str, folder: Path | None = None) -> int:
    """Write runs of MLflow. Earlier runs of the same trials in the same experiment are deleted.

    Args:
        results: a study.
        experiment: the name of the experiment. It is made if it does not exist.
        folder: the runs are written to FOLDER/mlflow.db, a file of SQLite. None: to the tracking server or file that
            MLflow is set up for, such as by MLFLOW_TRACKING_URI.
    Returns:
        The number of runs.
    Raises:
        BadInput: `folder` cannot be made, or MLflow refuses.
        MissingExtra: mlflow is not installed.
    """
    mlflow = require("mlflow", "An export to MLflow", "mlflow")
    entities = require("mlflow.entities", "An export to MLflow", "mlflow")
    uri = artifacts = None
    if folder is not None:
        uri, artifacts = mlflow_uri(_make(folder)), (folder / "artifacts").absolute().as_uri()
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment, artifacts)
        for run in runs(results):
            _add_to_mlflow(client, entities, place, run)
    except mlflow.exceptions.MlflowException as error:
        raise BadInput(f"MLflow refuses: {described(error)}") from error
    return len(results.trials)


def mlflow_uri(folder: Path) -> str:
    """Return the address of the runs that `to_mlflow` writes below a folder, for `mlflow ui --backend-store-uri`."""
    return f"sqlite:///{(folder / 'mlflow.db').absolute().as_posix()}"


def _add_to_mlflow(client: Any, entities: Any, experiment: str, run: Run) -> None:
    trial = _key(run.trial)
    for earlier in client.search_runs([experiment], f"tags.`{_TAG}` = '{trial}'"):
        client.delete_run(earlier.info.run_id)
    made = client.create_run(experiment, run_name=run.name, tags={_TAG: trial}).info.run_id
    texts = {name: shortened(str(x), _LONGEST) for name, x in run.config.items()}
    client.log_batch(made, params=[entities.Param(name, text) for name, text in texts.items()])
    now, last = int(1000 * time.time()), max(run.points, default=0)
    points = run.points | {last: run.points.get(last, {}) | run.summary}
    metrics = [
        entities.Metric(_key(name), float(x), now, step)
        for step, values in points.items()
        for name, x in values.items()
    ]
    for start in range(0, len(metrics), _AT_ONCE):
        client.log_batch(made, metrics=metrics[start : start + _AT_ONCE])
    client.set_terminated(made, "FAILED" if run.has_failed else "FINISHED")


def _make(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be a folder ({error.strerror}): choose another one (-o FOLDER).") from error
    return folder


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in values.items() if x is not None}


def _file_name(text: str) -> str:
    """Return a text as a name of a file on any system."""
    return re.sub(r"[^\w.,=()+-]+", "_", text).strip("._")[:100] or "unnamed"


def _key(text: str) -> str:
    """Return a text as a name that MLflow takes."""
    return re.sub(r"[^\w. /-]", "_", text, flags=re.ASCII)
