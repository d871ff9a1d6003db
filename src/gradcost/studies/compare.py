"""Compare methods: tune each in the same way on validation, train on new seeds, score once on the test split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from gradcost.core.errors import BadInput
from gradcost.core.files import locked
from gradcost.core.metric import Metric
from gradcost.planning.forecast import Forecast
from gradcost.results.records import Results, TrialRecord, read
from gradcost.results.so_far import so_far
from gradcost.results.verdict import verdict
from gradcost.studies.comparison import Comparison, GivenMethods, make_comparison
from gradcost.studies.costs import forecast_methods, record_refusal
from gradcost.studies.events import (
    ComparisonStarted,
    MethodForecast,
    MethodRefused,
    OnEvent,
    RoundEnded,
    TimeIsUp,
    TrialsStarted,
    warn_of_failures,
)
from gradcost.studies.executors import Executor, local_or
from gradcost.studies.folder import make_folder, open_folder
from gradcost.studies.processes import Work
from gradcost.studies.run import RUNS, Tally, measure_methods, run_trials
from gradcost.studies.task_info import device_of, model_name, task_metric, task_name, weights
from gradcost.studies.timed import Pace
from gradcost.studies.user_code import refuse_while_importing
from gradcost.tasks import LoaderTask, Task
from gradcost.training.customary import Customary
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
    lr_range: tuple[float, float] | None = None,
    target: float | None = None,
    memory_beyond_weights: int | None = None,
    optimizer: Optimizer | Customary | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    time: float | None = None,
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
    - Each trial imports the calling script again and runs its top-level code up to this call. Put everything except
      definitions under `if __name__ == "__main__":`.

    Args:
        task: from `gradcost.tasks.from_loaders`, a `gradcost.tasks.Task`, or a name in `gradcost.tasks.TASKS`.
        methods: estimators, or a mapping from labels to estimators. None: backprop, checkpointed, forward_gradient,
            spsa and mezo. If backprop exceeds the memory budget, also backprop with recomputation that fits it.
        steps: the number of training steps of each trial. None: `task.steps`, or 1000 if the task has none.
        seeds: the number of final runs of each method.
        tuning_points: the number of learning rates in the grid of each method.
        extra_points: the number of learning rates tried after the grid: beyond its edge, or next to the best rate.
        confirm_seeds: the number of new seeds on which the best three learning rates run again. 0 skips this.
        lr_range: the smallest and the largest learning rate of the grid. The grid is evenly spaced in log(lr). None:
            `Optimizer.usual_rates` of the method's optimizer, such as 1e-4 to 10 for SGD and 3e-6 to 0.3 for AdamW.
        target: a validation accuracy, or a value of the task's metric. Each trial records the first evaluated step
            that reaches it. None: an accuracy of 0.9; no target for another metric.
        memory_beyond_weights: budget in bytes for the peak memory of a step, without parameters, buffers and batch.
            A method that exceeds it does not run. None: no budget.
        optimizer: the optimizer of every method, such as `AdamW(1e-3, weight_decay=0.1)`. Its learning rate is
            replaced by those of the grid. `gradcost.studies.Customary()`: each method has the optimizer that is
            customary for it. None: SGD.
        device: where trials run: "cpu" or "cuda". None: the CPU.
        dtype: the dtype of the weights and of floating-point inputs. None: unchanged.
        autocast: the dtype of `torch.autocast` around the loss and the score, bfloat16. None: no autocast.
        time: seconds for this call's trials. The first trials give a coarse answer, which the others refine
            (`studies.timed`); the same call continues. None: all trials run, however long that takes.
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
        device=device,
        dtype=dtype,
        autocast=autocast,
        is_coarse=time is not None,
    )
    settings: Any = {"executor": local_or(executor, workers), "every": every, "trial_timeout": trial_timeout}
    return run_comparison(comparison, folder, **settings, time=time, on_event=on_event)


def run_comparison(
    comparison: Comparison,
    folder: str | Path | None = None,
    *,
    executor: Executor,
    every: float = 30.0,
    trial_timeout: float | None = None,
    time: float | None = None,
    on_event: OnEvent = warn_of_failures,
    task: str | None = None,
    model: str | None = None,
) -> Results:
    """Run a comparison, or resume it, and return the records of its folder.

    Args:
        time: seconds for the trials of this call. None: no limit.
        task: the name of the task in reports. None: the name of its class in lower case.
        model: the name of the model in reports. None: its key in `task.models`, or its repr.
    """
    if time is not None and not time > 0:
        raise BadInput(f"the time is a number of seconds above 0, not {time}.")
    task, model = task or task_name(comparison.task), model or model_name(comparison.task)
    started, forecasts, reasons = forecast_comparison(comparison, folder, on_event=on_event, task=task, model=model)
    folder = started.folder
    work = Work(comparison.code, folder, comparison.user_file, every, trial_timeout)
    make_folder(folder)
    with locked(folder), _resume_note(folder):
        open_folder(folder, comparison.document(task, model), comparison.code, device_of(comparison.task))
        for name, reason in reasons.items():
            record_refusal(folder, name, dict(comparison.methods)[name], reason)
        failed = _run(comparison, executor, work, forecasts, time, on_event) if forecasts else 0
        if not failed:
            methods = comparison.with_optimizers
            measure_methods(comparison.task, methods, comparison.memory, folder, forecasts, on_event)
    return read(folder)


@contextmanager
def _resume_note(folder: Path) -> Generator[None]:
    """Add a note to KeyboardInterrupt on the kept trials; Python prints it below the traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"{folder} keeps the finished trials. The same call of gradcost.compare resumes.")
        raise


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


def _run(
    comparison: Comparison,
    executor: Executor,
    work: Work,
    labels: Collection[str],
    time: float | None,
    on_event: OnEvent,
) -> int:
    """Run all phases of the methods in `labels`; return the number of failed trials."""
    recorded = [trial for trial in read(work.folder).trials if trial.status != "failed"]
    finished = [trial.method for trial in recorded]
    names = [name for name, _ in comparison.methods if name in labels]
    totals = dict.fromkeys(names, comparison.trials)
    on_event(TrialsStarted(totals, {name: finished.count(name) for name in names}, task_metric(comparison.task)))
    pace = None
    if time is not None:
        has_final = any(trial.phase == "final" for trial in recorded)
        ids = {trial.trial for trial in recorded}
        on_round = _reporter(work.folder, task_metric(comparison.task), on_event)
        pace = Pace(time, executor.workers, ids, has_final, lambda trial: trial.name(work.code), on_round)
    tally = Tally(on_event, task_metric(comparison.task))
    is_over = (lambda: False) if pace is None else pace.is_over
    with closing(run_trials(comparison.study(labels, pace), executor, work, is_over=is_over)) as trials:
        for trial in trials:
            tally.add(trial)
    if pace is not None and (pace.is_cut or pace.is_over()):
        on_event(TimeIsUp(len(recorded) + tally.ran - tally.failed, sum(totals.values())))
    tally.end(work.folder)
    return tally.failed


def _reporter(folder: Path, metric: Metric, on_event: OnEvent) -> Callable[[Sequence[TrialRecord]], None]:
    """Return a function that sends what is known after a round of trials: the verdict, once there are final runs."""

    def report(records: Sequence[TrialRecord]) -> None:
        is_tested = any(record.phase == "final" for record in records)
        on_event(RoundEnded(verdict(read(folder)) if is_tested else so_far(records, metric)))

    return report
