"""Return the progress of a results folder, the record of one trial, and the reasons why it ran, failed or was chosen.

These functions only read files. They require neither torch nor the packages that trials need.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.core.files import holder, regular, try_lock
from gradcost.core.metric import Metric
from gradcost.core.units import count
from gradcost.results import ledger
from gradcost.results.records import Results, TrialRecord, read, read_lines
from gradcost.results.tuning import Score, best, chosen, confirmed_scores, scores

_ATTEMPTS = 5  # to lock a folder, before it counts as in use


@dataclass(frozen=True)
class UnfinishedTrial:
    """A trial that has a training checkpoint and has not ended. It is running, or resumes from there on the next run.

    Args:
        trial: id of the trial.
        step: number of steps taken before the checkpoint; None if its file cannot be read.
    """

    trial: str
    step: int | None


@dataclass(frozen=True)
class Status:
    """Progress of a study.

    Args:
        folder: the results folder.
        done: number of trials that finished or diverged, for each phase.
        failed: ids of the failed trials; the next run repeats them.
        kept: unfinished trials with a training checkpoint.
        pid: id of the process that runs the study; 0 if unknown, None if there is no such process.
        torn: number of incomplete lines in the records.
    """

    folder: str
    done: dict[str, int]
    failed: tuple[str, ...]
    kept: tuple[UnfinishedTrial, ...]
    pid: int | None
    torn: int


def status(folder: Path) -> Status:
    """Return the progress of the study in a folder.

    Raises:
        BadInput: `folder` is not a results folder.
    """
    results = read(folder)
    ended = {run.trial for run in results.trials if run.status != "failed"}
    return Status(
        str(folder),
        dict(Counter(run.phase for run in results.trials if run.status != "failed")),
        tuple(run.trial for run in results.trials if run.status == "failed"),
        tuple(
            UnfinishedTrial(path.parent.name, _step(path))
            for path in sorted(folder.glob("trials/*/checkpoint"))
            if path.parent.name not in ended
        ),
        _running_process(folder),
        results.torn,
    )


def notes_on(results: Results) -> str | None:
    """Return a sentence on records that are missing or damaged; None if there is nothing to say."""
    damaged = f"{count(results.torn, 'damaged line')} of records.jsonl skipped; such a trial runs again."
    if not results.trials:
        return "the folder has no trial on record" + (f": {damaged}" if results.torn else ".")
    return damaged if results.torn else None


def _running_process(folder: Path) -> int | None:
    """The id of the process that has locked the folder; 0 if unknown, None if the folder is not locked."""
    try:
        with open(folder / "lock", "rb", opener=regular) as file:
            for _ in range(_ATTEMPTS):  # another reader holds the lock for a moment only
                if try_lock(file):
                    return None
                time.sleep(0.01)
            return holder(file)
    except FileNotFoundError:
        pass
    return None


def _step(path: Path) -> int | None:
    """The number of steps taken before a training checkpoint, from the header of its file; None if unreadable."""
    try:
        with open(path, "rb", opener=regular) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return _item(_item(json.loads(header["__metadata__"]["tree"]), "steps"), "taken")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        RecursionError,
    ):  # the file was replaced or removed, or has another format
        return None


def _item(tree: Any, name: str) -> Any:
    """The value of `name` in a mapping that the checkpoint stores as (type, pairs)."""
    return dict(tree[1])[name]


def record(folder: Path, trial: str) -> dict[str, Any]:
    """Return the last record of a trial.

    Args:
        folder: a results folder.
        trial: the trial's id, or its first characters.
    Returns:
        The record as JSON.
    Raises:
        BadInput: not exactly one id starts with `trial`, or the folder is not a results folder.
    """
    read(folder)
    matches = {
        item.trial: raw
        for _, raw, item in read_lines(folder / ledger.RECORDS)
        if isinstance(item, TrialRecord) and item.trial.startswith(trial)
    }
    if len(matches) > 1:
        raise BadInput(f"{len(matches)} trials of {folder} begin with {trial!r}: give more of the id.")
    if not matches:
        raise BadInput(
            f"no trial of {folder} begins with {trial!r}. {folder}/{ledger.RECORDS} lists the "
            "recorded trials, and `gradcost status` the running ones."
        )
    return dict(next(iter(matches.values())))


def why(folder: Path, trial: str) -> tuple[str, ...]:
    """Explain why a trial ran, why it ended as it did, and why its learning rate was or was not chosen.

    Args:
        folder: a results folder.
        trial: the trial's id, or its first characters.
    Returns:
        Sentences.
    Raises:
        BadInput: not exactly one id starts with `trial`, or the folder is not a results folder.
    """
    return tuple(_reasons(record(folder, trial), read(folder)))


def _reasons(record: dict[str, Any], results: Results) -> Iterator[str]:
    method, phase, lr, seed = record["method"], record["phase"], record["lr"], record["seed"]
    tuned = scores((run for run in results.trials if run.phase == "tune"), method)
    confirmed = confirmed_scores(results.trials, method)
    winner = chosen(results.trials, method)
    match phase:
        case "tune":
            yield f"It ran to tune {method}: {lr:.3g} is one of the {len(tuned)} learning rates that were tried."
        case "confirm":
            yield f"It ran to confirm {lr:.3g}, {_rank(tuned, lr)} in tuning {method}, on fresh seed {seed}."
        case _ if winner is None:
            yield f"It is a final run: no learning rate of {method} was tuned."
        case _ if winner == lr:
            selector = "the mean over the tuning and confirming seeds" if confirmed else "tuning"
            yield f"It is a final run with {lr:.3g}, which {selector} chose for {method}, on fresh seed {seed}."
        case _:
            yield f"It is a final run with {lr:.3g}, as the study sets it. Tuning of {method} chose {winner:.3g}."
    match record["status"]:
        case "failed":
            yield f"It failed: {str(record.get('reason')).rstrip('.')}. The same command again repeats it."
        case "diverged":
            yield f"It diverged: {record.get('reason')}. It counts as the worst result and is not repeated."
    if phase in ("tune", "confirm") and record["status"] != "failed":
        yield from _choice(lr, tuned, confirmed, winner, results.study.metric)


def _choice(
    lr: float, tuned: dict[float, Score], confirmed: dict[float, Score], winner: float | None, metric: Metric
) -> Iterator[str]:
    if winner is None:
        yield "No learning rate was chosen: every one diverged."
        return
    tried, where = (confirmed, "on the tuning and confirming seeds") if best(confirmed) else (tuned, "in tuning")
    if lr == winner:
        yield f"It was chosen: {_described(tried[lr], metric)} {where}, {_rank(tried, lr)} of {len(tried)}."
    elif lr not in tried:
        yield f"It was not chosen: {_rank(tuned, lr)} in tuning, so it was not confirmed. {winner:.3g} was chosen."
    else:
        winner_score = _described(tried[winner], metric)
        yield f"It was not chosen: {_described(tried[lr], metric)} {where}. {winner:.3g} was chosen: {winner_score}."


def _rank(tried: dict[float, Score], lr: float) -> str:
    """The rank of a learning rate, such as `number 2`; diverged learning rates come last."""
    order = sorted(tried, key=lambda rate: tried[rate], reverse=True)
    return f"number {order.index(lr) + 1}" if lr in tried else "not tried"


def _described(score: Score, metric: Metric) -> str:
    ranked, loss, _ = score
    if ranked == float("-inf"):
        return f"no {metric.name} (diverged)" if loss == float("-inf") else f"validation loss {-loss:.4g}"
    if metric.name == "loss":
        return f"validation loss {-loss:.4g}"
    value = f"{ranked:.4f}" if metric.is_accuracy else metric.text(ranked)
    return f"validation {metric.name} {value} and loss {-loss:.4g}"
