"""Read a results folder: `study.json`, `environment.json` and `records.jsonl`.

Incomplete and repeated data are read as follows:

- an incomplete or damaged line, or one without a required field, is skipped; its number is in `Results.torn_lines`;
- if a trial ran more than once, its last record is used;
- a missing optional field is None;
- if `environment.json` is damaged, a `Note` is issued and it counts as empty: every record has its own environment;
- a folder without results raises BadInput.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.metric import ACCURACY, Metric
from gradcost.core.printable import all_printable
from gradcost.results import ledger
from gradcost.results.field_types import checked
from gradcost.results.ledger import document
from gradcost.results.outcome import judged, last_old_line

SCHEMA = 1


@dataclass(frozen=True)
class StudyRecord:
    """What a study compares: one task, one model, and methods.

    Args:
        task: repr of the task.
        task_name: short name of the task.
        model_name: short name of the model.
        methods: labels of the methods, in the order of the study.
        seeds: seeds of the final runs.
        points: number of learning rates tried per method.
        steps: number of training steps of a run.
        target: value of the metric to reach; `TrialRecord.reached` is the first step that does. None: no target.
        optimizer: name of the optimizer.
        batch: examples per batch. None if the task has no fixed batch size.
        comparison: hash of the comparison and of its code.
        weights: number of trained weights.
        weights_bytes: bytes of the trained weights.
        memory: budget in bytes, beyond the weights. None without a budget.
        chance: accuracy of guessing, 1 / classes.
        majority: share of the most frequent class, or right answer, in the test split.
        confirm: number of fresh seeds on which the best three learning rates run again.
        metric: what ranks the runs.
    """

    task: str
    task_name: str
    model_name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    points: int
    steps: int
    target: float | None
    optimizer: str
    batch: int | None = None
    comparison: str | None = None
    weights: int | None = None
    weights_bytes: int | None = None
    memory: int | None = None
    chance: float | None = None
    majority: float | None = None
    confirm: int = 0
    metric: Metric = ACCURACY


@dataclass(frozen=True)
class Scores:
    """One evaluation of a model. A value that is not finite, or that the task does not compute, is None."""

    loss: float | None
    accuracy: float | None
    targets: int | None = None  # number of examples or tokens over which the scores are averaged
    of: int | None = None  # number of examples or tokens in the split
    further: Mapping[str, float | None] = field(default_factory=dict, hash=False)  # the task's other scores
    score: float | None = None  # ranks the runs, the greater the better (`Metric.score`)


@dataclass(frozen=True)
class Curve:
    """The training loss of one run at each recorded step, and its evaluations on the validation split."""

    step: tuple[int, ...] = ()
    loss: tuple[float | None, ...] = ()
    slope: tuple[float | None, ...] = ()  # the largest |slope| since the previous recorded step
    validation_step: tuple[int, ...] = ()
    validation_loss: tuple[float | None, ...] = ()
    validation_accuracy: tuple[float | None, ...] = ()
    validation_score: tuple[float | None, ...] = ()  # `Scores.score` of each evaluation


@dataclass(frozen=True)
class TrialRecord:
    """One run of one method, with one learning rate and one seed.

    Args:
        trial: id of the trial.
        method: label of the method.
        estimator: repr of the estimator.
        optimizer: repr of the optimizer.
        phase: "tune", "confirm" or "final".
        lr: learning rate.
        seed: seed of the run.
        status: "finished", "diverged" (`core.divergence`) or "failed".
        steps: number of steps taken.
        curve: training and validation curves.
        validation: last evaluation on the validation split.
        test: evaluation on the test split.
        clip_rate: fraction of the slopes that were clipped.
        reached: first evaluated step at which the target accuracy was reached.
        slopes: the number of slopes, the largest slope, and the spikes.
        seconds: wall-clock time of the run.
        reason: why it diverged or failed.
        task: repr of the task.
        environment: versions, machine and code of the run.
        exact: whether the estimator computes the exact gradient of the batch. None in records of older versions.
        note: what the run had to work around, such as a damaged training checkpoint.
    """

    trial: str
    method: str
    estimator: str
    optimizer: str
    phase: str
    lr: float
    seed: int
    status: str
    steps: int
    curve: Curve = field(default=Curve(), repr=False)
    validation: Scores | None = None
    test: Scores | None = None
    clip_rate: float | None = None
    reached: int | None = None
    slopes: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    seconds: float | None = None
    reason: str | None = None
    task: str | None = field(default=None, repr=False)
    environment: Mapping[str, str | int] | None = field(default=None, repr=False, hash=False)
    exact: bool | None = None
    note: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Cost:
    """The measured cost of one step of one method. Values that were not measured are None."""

    method: str
    estimator: str
    peak_bytes: int | None = None  # beyond the weights: without parameters, buffers and batch
    flops: int | None = None
    forwards: float | None = None  # `flops` divided by the FLOPs of one forward pass without gradient
    matmuls: int | None = None
    elementwise: int | None = None  # element-wise operations, beside the FLOPs of matrix products
    drawn: int | None = None  # random numbers drawn
    ms: float | None = None  # the median; `ms_low` and `ms_high` are the quartiles
    ms_low: float | None = None
    ms_high: float | None = None
    doubt: str | None = None  # why the timing is not reliable
    fits: bool | None = None  # whether the peak is within the study's budget
    breakdown: Mapping[str, int] | None = None  # bytes at the peak for each purpose; includes weights and batch
    operator: str | None = None  # the operator that runs at the peak, in `module`
    module: str | None = None
    exact: bool | None = None  # as in TrialRecord


@dataclass(frozen=True)
class Quality:
    """How close the estimates of one method are to the gradient, at the initial weights and on one batch.

    cosine: mean cosine of the estimate g and the gradient grad. error: mean of |g - grad|^2 / |grad|^2.
    cosine_se, error_se: standard errors of these means.
    theory: three lists of equal length. "cosine" and "error" are the expected values for the numbers in "probes".
    """

    method: str
    estimator: str
    dimension: int
    probes: int
    draws: int
    cosine: float | None = None
    cosine_se: float | None = None
    error: float | None = None
    error_se: float | None = None
    theory: Mapping[str, tuple[float | None, ...]] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Refused:
    """A method that does not run in this study, and the reason."""

    method: str
    estimator: str
    reason: str


@dataclass(frozen=True, eq=False)  # compared by identity, so that `summarise` can cache its rows
class Results:
    """The content of a results folder.

    Args:
        study: what is compared.
        environment: versions and machine where the folder was created.
        trials: the last record of each trial.
        costs: the last measured cost of each method.
        refused: methods that do not run, with the reasons.
        torn_lines: numbers of the damaged lines that were skipped, from 1.
        qualities: how close each method's estimates are to the gradient.
    """

    study: StudyRecord
    environment: dict[str, str | int | float]
    trials: tuple[TrialRecord, ...]
    costs: tuple[Cost, ...]
    refused: tuple[Refused, ...]
    torn_lines: tuple[int, ...] = ()
    qualities: tuple[Quality, ...] = ()

    @property
    def torn(self) -> int:
        """Number of damaged lines that were skipped. If one was the record of a trial, that trial runs again."""
        return len(self.torn_lines)


def read(folder: str | Path) -> Results:
    """Read the results in a folder.

    Args:
        folder: the folder that `gradcost compare -o` or `gradcost study -o` wrote.
    Returns:
        Results. Damaged lines are skipped; their numbers are in `torn_lines`.
    Raises:
        BadInput: the folder is missing, holds no results, or has another schema, or its study.json is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}. Give a results folder, written by `gradcost compare -o`.")
    try:
        study = document(folder / "study.json")
    except BadInput as error:
        raise BadInput(f"{error} No record is lost: delete it, and run the study again to write a new one.") from None
    if study is None:
        raise BadInput(
            f"{folder} is not a results folder: it holds no study.json. Give one of `gradcost compare -o`."
        )
    _check_schema(study, str(folder / "study.json"))
    path = folder / ledger.RECORDS
    if not path.exists():
        raise BadInput(f"{folder} holds no {ledger.RECORDS}: no trial has run there yet.")
    return results(study, ledger.environment(folder / "environment.json"), path)


def results(study: Mapping[str, Any], environment: Mapping[str, Any], path: Path) -> Results:
    """Read the records in `path`. If a trial has several records, or a method several costs, the last one is used."""
    found: dict[type, dict[str, Any]] = {TrialRecord: {}, Cost: {}, Refused: {}, Quality: {}}
    torn: list[int] = []
    for number, _, item in read_lines(path):
        if item is None:
            torn.append(number)
        elif type(item) in found:
            found[type(item)][item.trial if isinstance(item, TrialRecord) else item.method] = item
    trials, costs, refused, qualities = (tuple(each.values()) for each in found.values())
    try:
        record = _study(study, trials)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path.with_name('study.json')} is damaged: {error}") from None
    return Results(record, all_printable(dict(environment)), trials, costs, refused, tuple(torn), qualities)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Yield (line number, JSON record, value) of each line of a records file. Trials are those of `outcome.judged`.

    The value is a TrialRecord, Cost, Refused or Quality; None if the line is damaged; `...` if only a later version
    knows its kind.

    Raises:
        BadInput: a record has another schema.
    """
    makers = {
        "trial": trial_record,
        "cost": functools.partial(checked, Cost),
        "refused": functools.partial(checked, Refused),
        "quality": functools.partial(checked, Quality),
    }
    old = last_old_line(path)
    for number, record in ledger.numbered_lines(path):
        if record is None:
            yield number, {}, None
            continue
        _check_schema(record, f"{path} line {number}")
        kind = record.get("kind")
        try:  # a line without a checksum may hold anything
            record = judged(record) if kind == "trial" and number <= old else record
            item = makers[kind](record) if isinstance(kind, str) and kind in makers else ...
        except (BadInput, TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError):
            item = None
        yield number, record, item


def _study(document: Mapping[str, Any], trials: tuple[TrialRecord, ...]) -> StudyRecord:
    """The study's record. Fields that study.json lacks, as in a user's own study, are derived from the trials."""
    tuned = Counter((run.method, run.lr) for run in trials if run.phase == "tune")
    points = Counter(method for method, _ in tuned)
    methods = tuple(dict.fromkeys(run.method for run in trials))
    seeds = tuple(sorted({run.seed for run in trials if run.phase == "final"}))
    steps, most = max((run.steps for run in trials), default=0), max(points.values(), default=0)
    from_trials = {"methods": methods, "seeds": seeds, "points": most, "steps": steps, "target": None}
    stated = {name: tuple(item) if isinstance(item, list) else item for name, item in document.items()}
    stated["metric"] = Metric(str(stated.get("metric", ACCURACY.name)), bool(stated.get("lower_is_better")))
    record = checked(StudyRecord, from_trials | {name: item for name, item in stated.items() if item is not None})
    return replace(record, methods=tuple(dict.fromkeys((*record.methods, *methods))))


def trial_record(record: Mapping[str, Any]) -> TrialRecord:
    """Convert a JSON record of kind "trial" to a TrialRecord."""
    curve = {name: tuple(values) for name, values in (record.get("curve") or {}).items()}
    curve.setdefault("validation_score", curve.get("validation_accuracy", ()))
    return checked(
        TrialRecord,
        {
            **record,
            "curve": checked(Curve, curve),
            "validation": _scores(record.get("validation")),
            "test": _scores(record.get("test")),
        },
    )


def _scores(record: Mapping[str, Any] | None) -> Scores | None:
    if record is None:
        return None
    further = {name: number for name, number in record.items() if name not in Scores.__dataclass_fields__}
    scores = {"loss": None, "accuracy": None, **record, "further": further}
    return checked(Scores, {"score": scores["accuracy"], **scores})


def _check_schema(record: Mapping[str, Any], place: str) -> None:
    schema = record.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise BadInput(f"{place} has schema {schema}, but this version of gradcost reads {SCHEMA}: upgrade gradcost.")
