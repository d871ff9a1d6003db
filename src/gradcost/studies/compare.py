"""Compare methods: tune each in the same way on validation, train on new seeds, score once on the test split."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing
from pathlib import Path

from gradcost.planning.forecast import Forecast
from gradcost.results.records import Results, read
from gradcost.studies.comparison import Comparison, GivenMethods, make_comparison
from gradcost.studies.costs import forecast_methods, record_refusal
from gradcost.studies.events import (
    ComparisonStarted,
    MethodForecast,
    MethodRefused,
    OnEvent,
    TrialsStarted,
    warn_of_failures,
)
from gradcost.studies.executors import Executor, local_or
from gradcost.studies.processes import Work
from gradcost.studies.run import RUNS, Tally, locked, measure_methods, open_folder, run_trials
from gradcost.studies.task_info import model_name, task_metric, task_name, weights
from gradcost.studies.user_code import refuse_while_importing
from gradcost.tasks import LoaderTask, Task
from gradcost.training.optimizers import Optimizer


def compare(
    task: Task | LoaderTask | str,
    methods: GivenMethods | None = None,
    *,
    steps: int | None = None,
    seeds: int = 6,
    tuning_points: int = 9,
    extra_points: int = 2,
    confirm_seeds: int = 2,
    lr_range: tuple[float, float] = (1e-4, 10.0),
    target: float | None = None,
    memory_beyond_weights: int | None = None,
    optimizer: Optimizer | None = None,
    folder: str | Path | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    every: float = 30.0,
    trial_timeout: float | None = None,
    on_event: OnEvent = warn_of_failures,
) -> Results:
    """Tune every method in the same way, train with each, and return all accuracies and costs.

    - Every method gets the same number of trials. Learning rates are chosen by the task's metric on validation.
    - The final runs use new seeds. Each is scored once on the test split.
    - Nothing is printed. `gradcost.results.verdict(results)` states which method to use.
    - A repeated call resumes. A trial that finished or diverged is never run again; a failed trial is.

    Args:
        task: from `gradcost.tasks.from_loaders`, a `gradcost.tasks.Task`, or a name in `gradcost.tasks.TASKS`.
        methods: estimators, or a mapping from labels to estimators. None: backprop, checkpointed, forward_gradient,
            spsa and mezo. If backprop exceeds the memory budget, also backprop with recomputation that fits it.
        steps: the number of training steps of each trial. None: `task.steps`, or 1000 if the task has none.
        seeds: the number of final runs of each method.
        tuning_points: the number of learning rates in the grid; every method has the same grid.
        extra_points: the number of learning rates tried after the grid: beyond its edge, or next to the best rate.
        confirm_seeds: the number of new seeds on which the best three learning rates run again. 0 skips this.
        lr_range: the smallest and the largest learning rate of the grid. The grid is evenly spaced in log(lr).
        target: a validation accuracy, or a value of the task's metric. Each trial records the first evaluated step
            that reaches it. None: an accuracy of 0.9; no target for another metric.
        memory_beyond_weights: budget in bytes for the peak memory of a step, without parameters, buffers and batch.
            A method that exceeds it does not run. None: no budget.
        optimizer: the optimizer of every method, such as `AdamW(1e-3, weight_decay=0.1)`. Its learning rate is
            replaced by those of the grid. None: SGD.
        folder: the results folder. None: `gradcost-runs/TASK-MODEL-HASH`, where HASH identifies the comparison.
        executor: where trials run. None: in processes of this machine.
        workers: the number of trials that run at the same time on this machine. None: one per CPU core.
        every: seconds between two training checkpoints of a trial.
        trial_timeout: seconds after which a trial is ended and recorded as failed. None: no limit.
        on_event: called with each event (`gradcost.studies.events`). The default warns when trials failed.
    Returns:
        All records of the folder: trials, costs, quality of the estimates, and the reasons why methods did not run.
    Raises:
        BadInput: the task or an option is invalid, or the folder contains another comparison.
        OSError: the folder cannot be written.
    """
    refuse_while_importing()
    comparison = make_comparison(
        task,
        methods,
        steps=steps,
        seeds=seeds,
        tuning_points=tuning_points,
        extra_points=extra_points,
        confirm_seeds=confirm_seeds,
        lr_range=lr_range,
        target=target,
        memory_beyond_weights=memory_beyond_weights,
        optimizer=optimizer,
    )
    settings = {"executor": local_or(executor, workers), "every": every, "trial_timeout": trial_timeout}
    return run_comparison(comparison, folder, **settings, on_event=on_event)


def run_comparison(
    comparison: Comparison,
    folder: str | Path | None = None,
    *,
    executor: Executor,
    every: float = 30.0,
    trial_timeout: float | None = None,
    on_event: OnEvent = warn_of_failures,
    task: str | None = None,
    model: str | None = None,
) -> Results:
    """Run a comparison, or resume it, and return the records of its folder.

    Args:
        task: the name of the task in reports. None: the name of its class in lower case.
        model: the name of the model in reports. None: its key in `task.models`, or its repr.
    """
    task, model = task or task_name(comparison.task), model or model_name(comparison.task)
    started, forecasts, reasons = forecast_comparison(comparison, folder, on_event=on_event, task=task, model=model)
    folder = started.folder
    work = Work(comparison.code, folder, comparison.user_file, every, trial_timeout)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        open_folder(folder, comparison.document(task, model), comparison.code)
        for name, reason in reasons.items():
            record_refusal(folder, name, dict(comparison.methods)[name], reason)
        failed = _run(comparison, executor, work, forecasts, on_event) if forecasts else 0
        if not failed:
            methods = comparison.with_optimizers
            measure_methods(comparison.task, methods, comparison.memory, folder, forecasts, on_event)
    return read(folder)


def forecast_comparison(
    comparison: Comparison,
    folder: str | Path | None = None,
    *,
    on_event: OnEvent,
    task: str | None = None,
    model: str | None = None,
) -> tuple[ComparisonStarted, dict[str, Forecast], dict[str, str]]:
    """Forecast each method of a comparison; run no trial.

    Returns:
        The `ComparisonStarted` event, the forecast of each method that can run, and the reason of each that cannot.
    """
    task, model = task or task_name(comparison.task), model or model_name(comparison.task)
    started = ComparisonStarted(
        folder=default_folder(comparison, task, model) if folder is None else Path(folder),
        task=task,
        model=model,
        weights=weights(comparison.task)["weights"],
        steps=comparison.steps,
        points=len(comparison.rates) + comparison.more,
        seeds=len(comparison.seeds),
    )
    on_event(started)
    forecasts, reasons = {}, {}
    for name, forecast in forecast_methods(comparison.task, comparison.with_optimizers, comparison.memory):
        if isinstance(forecast, str):
            reasons[name] = forecast
            on_event(MethodRefused(name, forecast))
        else:
            forecasts[name] = forecast
            on_event(MethodForecast(name, forecast))
    return started, forecasts, reasons


def default_folder(comparison: Comparison, task: str, model: str) -> Path:
    """Return the results folder that is used if the caller names none."""
    return RUNS / f"{task}-{model if model.isidentifier() else 'model'}-{comparison.name[:4]}"


def _run(comparison: Comparison, executor: Executor, work: Work, labels: Collection[str], on_event: OnEvent) -> int:
    """Run all phases of the methods in `labels`; return the number of failed trials."""
    finished = [trial.method for trial in read(work.folder).trials if trial.status != "failed"]
    names = [name for name, _ in comparison.methods if name in labels]
    done = {name: finished.count(name) for name in names}
    on_event(TrialsStarted(dict.fromkeys(names, comparison.trials), done, task_metric(comparison.task)))
    tally = Tally(on_event)
    with closing(run_trials(comparison.study(labels), executor, work)) as trials:
        for trial in trials:
            tally.add(trial)
    tally.end(work.folder)
    return tally.failed
