"""Run a study: each trial runs once, in a worker process, and its record is on disk before it is yielded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.user_modules import source_file
from gradcost.core.files import locked
from gradcost.core.metric import Metric
from gradcost.core.value import digest
from gradcost.estimators.estimator import Estimator
from gradcost.planning.forecast import Forecast
from gradcost.results import ledger
from gradcost.results.records import TrialRecord, read_lines, trial_record
from gradcost.studies.costs import Methods, forecast_methods, time_methods
from gradcost.studies.environment import fingerprint, plug_in_code
from gradcost.studies.events import (
    EstimatesAssessed,
    MethodForecast,
    OnEvent,
    StepTimed,
    TrialFinished,
    TrialsEnded,
    TrialsWarned,
    warn_of_failures,
)
from gradcost.studies.executors import Executor, local_or
from gradcost.studies.folder import make_folder, open_folder
from gradcost.studies.output import warned
from gradcost.studies.processes import Record, Work
from gradcost.studies.quality import assess_methods
from gradcost.studies.study import Stage, Study, first_stage
from gradcost.studies.task_check import check_splits
from gradcost.studies.task_info import (
    check_task,
    device_of,
    guessing_fields,
    metric_fields,
    task_metric,
    task_name,
    weights,
)
from gradcost.studies.user_code import refuse_while_importing
from gradcost.training.optimizers import Optimizer

RUNS = Path("gradcost-runs")  # parent of the results folders that the caller does not name


def run_study(
    study: Study,
    folder: str | Path | None = None,
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    every: float = 30.0,
    trial_timeout: float | None = None,
    measure: bool = True,
    on_event: OnEvent = warn_of_failures,
) -> Iterator[TrialRecord]:
    """Run a study, or resume it, and yield the record of each trial as soon as the trial ends.

    - A trial that finished or diverged is never run again, and is not yielded again.
    - A trial that failed is yielded with status "failed". The study stops after the stage of that trial. The next
      call runs the trial again.
    - The folder receives `study.json`, `environment.json` and `records.jsonl`.
    - After the last trial, each method is measured: one step is timed, and its estimates are compared with the
      gradient.

    Args:
        study: the study to run. All its trials must have the same task.
        folder: the results folder. None: `gradcost-runs/NAME`, where NAME.py is the study's file.
        executor: where trials run. None: in processes of this machine.
        workers: the number of trials that run at the same time on this machine. None: one per CPU core.
        every: seconds between two training checkpoints of a trial.
        trial_timeout: seconds after which a trial is ended and recorded as failed. None: no limit.
        measure: whether to measure the methods after the last trial.
        on_event: called with each event (`gradcost.studies.events`). The default warns when trials failed.
    Yields:
        The record of each trial that this call ran.
    Raises:
        BadInput: the folder contains another study, another process uses the folder, a method cannot be used with
            the task, or the trials have different tasks.
        OSError: the folder cannot be written.
    """
    refuse_while_importing()
    file = study.file or source_file(study.trials)
    work = Work(fingerprint(file), study_folder(study, folder), file, every, trial_timeout)
    return _run_study(study, work, local_or(executor, workers), measure, on_event)


def study_folder(study: Study, folder: str | Path | None) -> Path:
    """Return `folder`; if None, `gradcost-runs/NAME`, where NAME.py is the study's file (without a file: "study")."""
    file = study.file or source_file(study.trials)
    return Path(folder) if folder is not None else RUNS / (Path(file).stem if file else "study")


def _run_study(
    study: Study, work: Work, executor: Executor, measure: bool, on_event: OnEvent
) -> Generator[TrialRecord]:
    forecasts = _Forecasts(on_event)
    make_folder(work.folder)
    with locked(work.folder):
        stage = first_stage(study)
        first = stage[0]
        check_splits(first.task)
        open_folder(work.folder, study_document(study, stage, work.code), work.code, device_of(first.task))
        tally = Tally(on_event, task_metric(first.task))
        with closing(run_trials(study, executor, work, forecasts.before_stage)) as trials:
            for trial in trials:
                tally.add(trial)
                yield trial
        tally.end(work.folder)
        if measure and not tally.failed:
            measure_methods(
                first.task,
                forecasts.methods,
                memory=None,
                folder=work.folder,
                forecasts=forecasts.known,
                on_event=on_event,
            )


def study_document(study: Study, stage: Stage, code: str) -> dict[str, Any]:
    """Return the content of `study.json`; `stage` is the study's first stage."""
    first = stage[0]
    own = plug_in_code(*((trial.task, trial.estimator, trial.optimizer) for trial in stage))
    return {
        "schema": 1,
        "comparison": digest((code, *own)) if own else code,  # for a study: its code
        "question": study.question,
        "task": repr(first.task),
        "task_name": task_name(first.task),
        "model_name": repr(getattr(first.task, "model", "model")),
        "methods": list(dict.fromkeys(trial.method for trial in stage)),
        **weights(first.task),
        "batch": getattr(first.task, "batch", None),
        "target": first.target,
        "optimizer": type(first.optimizer).__name__,
        **guessing_fields(first.task),
        **metric_fields(first.task),
    }


@dataclass
class _Forecasts:
    """The forecasts of a study's methods. A method is forecast before the first stage that uses it."""

    on_event: OnEvent
    task: Any = None
    methods: dict[str, tuple[Estimator, Optimizer]] = field(default_factory=dict)
    known: dict[str, Forecast] = field(default_factory=dict)

    def before_stage(self, stage: Stage) -> None:
        for trial in stage:
            if self.task is None:
                check_task(trial.task)
                self.task = trial.task
            if trial.task != self.task:
                raise BadInput(
                    f"a study has one task, and this one has {self.task} and {trial.task}: make a study for each."
                )
        new = {t.method: (t.estimator, t.optimizer) for t in stage if t.method not in self.methods}
        if not new:
            return
        self.methods.update(new)
        for label, forecast in forecast_methods(self.task, new, memory=None):
            if isinstance(forecast, str):
                raise BadInput(f"{label} cannot be used here: {forecast}")
            self.known[label] = forecast
            self.on_event(MethodForecast(label, forecast))


@dataclass
class Tally:
    """Count the trials of one call, and send their events to `on_event`."""

    on_event: OnEvent
    metric: Metric
    ran: int = 0
    failed: int = 0
    reason: str | None = None  # why the first failed trial failed
    trials: list[str] = field(default_factory=list)  # their ids

    def add(self, trial: TrialRecord) -> None:
        self.ran += 1
        self.trials.append(trial.trial)
        if trial.status == "failed":
            self.failed += 1
            self.reason = self.reason or trial.reason
        self.on_event(TrialFinished(trial, self.metric))

    def end(self, folder: Path) -> None:
        self.on_event(TrialsEnded(folder, self.ran, self.failed, self.reason))
        found = warned(folder, self.trials)
        if found is not None:
            self.on_event(TrialsWarned(found))


def measure_methods(
    task: Any, methods: Methods, memory: int | None, folder: Path, forecasts: dict[str, Forecast], on_event: OnEvent
) -> None:
    """For each method in `forecasts`: time one step, compare the estimates with the gradient, record the results."""
    for label in time_methods(task, methods, memory, folder, forecasts):
        on_event(StepTimed(label))
    for label in assess_methods(task, {label: methods[label] for label in methods if label in forecasts}, folder):
        on_event(EstimatesAssessed(label))


def run_trials(
    study: Study,
    executor: Executor,
    work: Work,
    before_stage: Callable[[Stage], None] = lambda stage: None,
    is_over: Callable[[], bool] = lambda: False,
) -> Generator[TrialRecord]:
    """Run the trials of a study that are not on record; yield each new record when it is on disk.

    - A trial that finished or diverged is never run again. The next call runs a failed trial again.
    - The study stops after a stage with a failed trial, because later stages may depend on its result.

    Args:
        study: the study to run.
        executor: where trials run.
        work: the settings that all trials share.
        before_stage: called with each stage before it runs.
        is_over: whether to stop, asked after each new trial. Running trials keep their training checkpoints.
    """
    stages = study.stages()
    previous: list[TrialRecord] | None = None
    with executor.ready():
        while True:
            try:
                # The study's generator receives the records of the previous stage.
                stage = next(stages) if previous is None else stages.send(previous)
            except StopIteration:
                return
            before_stage(stage)
            records: dict[str, Record] = {}
            # closing: an error while this generator is suspended in `yield` also stops the workers.
            with closing(_run_stage(stage, executor, work)) as ended:
                for record, is_new in ended:
                    records[record["trial"]] = record
                    if is_new:
                        yield trial_record(record)
                        if is_over():
                            return
            if not all(_is_done(record) for record in records.values()):
                return
            previous = [trial_record(records[trial.name(work.code)]) for trial in stage]


def _run_stage(trials: Stage, executor: Executor, work: Work) -> Generator[tuple[Record, bool]]:
    """Yield (record, is_new) of each trial: first the trials on record, then each other trial as soon as it ends."""
    path = work.folder / ledger.RECORDS
    lines = read_lines(path) if path.exists() else ()
    known = {item.trial: raw for _, raw, item in lines if isinstance(item, TrialRecord) and _is_done(raw)}
    by_name = {trial.name(work.code): trial for trial in trials}
    for name in by_name:
        if name in known:
            shutil.rmtree(work.folder / "trials" / name, ignore_errors=True)  # a killed run left it
            yield known[name], False
    todo = [trial for name, trial in by_name.items() if name not in known]
    with executor.ready(), closing(executor.perform(todo, work)) as performed:
        for record in performed:
            ledger.append(work.folder, record)
            if _is_done(record):
                shutil.rmtree(work.folder / "trials" / record["trial"], ignore_errors=True)
            yield record, True


def _is_done(record: Record) -> bool:
    """Whether a trial is complete. If it raised an exception or its process was killed, it must run again."""
    return record["status"] in ("finished", "diverged")


def open_study(study: Study, folder: Path) -> None:
    """Create the folder of a study without running it, or check that an existing folder belongs to the study.

    Args:
        study: the study; it has a file.
        folder: the results folder.
    Raises:
        BadInput: the folder contains another study, or another process uses it.
        OSError: the folder cannot be written.
    """
    code = fingerprint(study.file)
    make_folder(folder)
    with locked(folder):
        stage = first_stage(study)
        open_folder(folder, study_document(study, stage, code), code, device_of(stage[0].task))
