"""A results folder, read into values: `study.json`, `environment.json` and `records.jsonl`.

Reading is tolerant where a crash can leave a mark and strict elsewhere. A line that was torn while it was
written is skipped and counted (`Results.torn`), a trial that was tried again counts as its last line, a
field that is absent reads as None. What is not a results folder is a ValueError, in a sentence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput

SCHEMA = 1


@dataclass(frozen=True)
class StudyRecord:
    """What was asked: one task, one model, the methods in the order they were typed."""

    task: str
    task_name: str
    model_name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    points: int
    steps: int
    target: float
    optimizer: str
    batch: int | None = None
    comparison: str | None = None  # what is compared and by which code, as a hash
    weights: int | None = None  # how many
    weights_bytes: int | None = None
    memory: int | None = None  # the budget in bytes beyond the weights
    chance: float | None = None  # the accuracy of guessing
    confirm: int = 0  # fresh seeds on which the best three rates are run again


@dataclass(frozen=True)
class Scores:
    """One evaluation; a value that was not finite is None. further: what else the task's own score told."""

    loss: float | None
    accuracy: float | None
    targets: int | None = None  # how many these are the mean over
    of: int | None = None  # how many the split holds
    further: Mapping[str, float | None] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Curve:
    """What one run did: the training loss against the step, and the evaluations between."""

    step: tuple[int, ...] = ()
    loss: tuple[float | None, ...] = ()
    slope: tuple[float | None, ...] = ()  # the largest |slope| since the last of these steps
    validation_step: tuple[int, ...] = ()
    validation_loss: tuple[float | None, ...] = ()
    validation_accuracy: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class TrialRecord:
    """One run of one method at one learning rate and one seed, in the phase "tune" or "final"."""

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


@dataclass(frozen=True)
class Cost:
    """One step of one method, measured: bytes beyond the weights, FLOPs in bare forwards, milliseconds."""

    method: str
    estimator: str
    peak_bytes: int | None = None
    flops: int | None = None
    forwards: float | None = None
    matmuls: int | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    doubt: str | None = None
    fits: bool | None = None
    breakdown: Mapping[str, int] | None = None  # bytes alive at the peak by purpose, weights and batch included
    operator: str | None = None  # what runs at the peak, and in which module
    module: str | None = None


@dataclass(frozen=True)
class Quality:
    """How good the estimates of one method were, `draws` of them at the initial weights, on one batch.

    cosine: the mean of that with the gradient. error: the mean of |g - grad|^2 / |grad|^2. `_se`: their
    standard errors. theory: lists of probes, and the cosine and the error that they should have.
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
    """A method that cannot serve here, and why."""

    method: str
    estimator: str
    reason: str


@dataclass(frozen=True)
class Results:
    """Everything a results folder holds. `torn` counts the lines that could not be read."""

    study: StudyRecord
    environment: dict[str, str | int | float]
    trials: tuple[TrialRecord, ...]
    costs: tuple[Cost, ...]
    refused: tuple[Refused, ...]
    torn: int = 0
    qualities: tuple[Quality, ...] = ()


def read(folder: str | Path) -> Results:
    """The results in `folder`. Raises ValueError when it is missing, empty, or of another schema."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}: give the one that `gradcost compare -o` wrote.")
    asked = document(folder / "study.json")
    if asked is None:
        raise BadInput(
            f"{folder} holds no study.json, so it is not a results folder: give the one that "
            "`gradcost compare -o` wrote."
        )
    _check(asked, folder / "study.json")
    lines = folder / "records.jsonl"
    if not lines.is_file():
        raise BadInput(f"{folder} holds no records.jsonl: nothing was run there yet.")
    return results(asked, document(folder / "environment.json") or {}, lines)


def results(study: Mapping[str, Any], environment: Mapping[str, Any], lines: Path) -> Results:
    """Gather the records of `lines`, the last one of a trial and of a method's cost winning."""
    trials: dict[str, TrialRecord] = {}
    costs: dict[str, Cost] = {}
    refused: dict[str, Refused] = {}
    qualities: dict[str, Quality] = {}
    torn = 0
    for record in _lines(lines):
        if record is None:
            torn += 1
            continue
        _check(record, lines)
        match record.get("kind"):
            case "trial":
                ran = trial_record(record)
                trials[ran.trial] = ran
            case "cost":
                cost = _make(Cost, record)
                costs[cost.method] = cost
            case "refused":
                refusal = _make(Refused, record)
                refused[refusal.method] = refusal
            case "quality":
                quality = _make(Quality, record)
                qualities[quality.method] = quality
            case _:  # a kind of record that only a later gradcost knows
                pass
    return Results(
        study=_asked(study, tuple(trials.values())),
        environment=dict(environment),
        trials=tuple(trials.values()),
        costs=tuple(costs.values()),
        refused=tuple(refused.values()),
        torn=torn,
        qualities=tuple(qualities.values()),
    )


def _asked(study: Mapping[str, Any], trials: tuple[TrialRecord, ...]) -> StudyRecord:
    """What was asked. A study of the user's own says little of it beforehand: its trials tell the rest."""
    tuned = Counter((run.method, run.lr) for run in trials if run.phase == "tune")
    points = Counter(method for method, _ in tuned)
    told = {
        "methods": tuple(dict.fromkeys(run.method for run in trials)),
        "seeds": tuple(sorted({run.seed for run in trials if run.phase == "final"})),
        "points": max(points.values(), default=0),
        "steps": max((run.steps for run in trials), default=0),
    }
    said = {name: tuple(known) if isinstance(known, list) else known for name, known in study.items()}
    return _make(StudyRecord, told | {name: known for name, known in said.items() if known is not None})


def trial_record(record: Mapping[str, Any]) -> TrialRecord:
    """The trial that a record of kind "trial" describes."""
    curve = {name: tuple(values) for name, values in (record.get("curve") or {}).items()}
    return _make(
        TrialRecord,
        {
            **record,
            "curve": _make(Curve, curve),
            "validation": _scores(record.get("validation")),
            "test": _scores(record.get("test")),
        },
    )


def _scores(record: Mapping[str, Any] | None) -> Scores | None:
    if record is None:
        return None
    further = {name: number for name, number in record.items() if name not in Scores.__dataclass_fields__}
    return _make(Scores, {"loss": None, "accuracy": None, **record, "further": further})


def _make(cls: Any, record: Mapping[str, Any]) -> Any:
    """A `cls` from the fields it knows; those it does not are from a later gradcost and are left out."""
    known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
    try:
        return cls(**known)
    except TypeError as missing:
        raise BadInput(f"A record of {cls.__name__.lower()} is incomplete: {missing}.") from None


def _check(record: Mapping[str, Any], where: Path) -> None:
    schema = record.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise BadInput(f"{where} has schema {schema} and this gradcost reads {SCHEMA}: upgrade gradcost.")


def document(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no file. Raises: ValueError where it holds none."""
    if not path.is_file():
        return None
    found = _parse(path.read_bytes())
    if found is None:
        raise BadInput(f"{path} is not a JSON object: it was cut short or edited.")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """Each line's object; None for a torn one, which is the last of a run that was killed as it wrote."""
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            yield _parse(line)


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return found if isinstance(found, dict) else None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if isfinite(number) else None
