"""Looking into a results folder: how far it is, one trial of it, and why that one ran, failed or was chosen.

Reads files alone: neither torch nor what the trials need has to be there.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcost.core.errors import BadInput
from gradcost.results import ledger
from gradcost.results.records import Results, read
from gradcost.results.tuning import Score, best, chosen, scores


@dataclass(frozen=True)
class Kept:
    """A trial that was kept half-finished: it is running, or goes on from there when it is performed again."""

    trial: str
    step: int | None  # None where its file cannot be read


@dataclass(frozen=True)
class Status:
    """How far a study is.

    done: how many trials of each phase ended. failed: the ids of those that are to be tried again. kept: those that
    have a checkpoint. pid: of the process that works in the folder, None where none does.
    """

    folder: str
    done: dict[str, int]
    failed: tuple[str, ...]
    kept: tuple[Kept, ...]
    pid: int | None
    torn: int


def status(folder: Path) -> Status:
    """How far the study of a folder is. Raises: ValueError where it is no results folder."""
    results = read(folder)
    ended = {run.trial for run in results.trials if run.status != "failed"}
    return Status(
        str(folder),
        dict(Counter(run.phase for run in results.trials if run.status != "failed")),
        tuple(run.trial for run in results.trials if run.status == "failed"),
        tuple(
            Kept(path.parent.name, _step(path))
            for path in sorted(folder.glob("trials/*/checkpoint"))
            if path.parent.name not in ended
        ),
        _holder(folder),
        results.torn,
    )


def _holder(folder: Path) -> int | None:
    try:
        with (folder / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not meet
            except BlockingIOError:
                return int(file.read().strip() or 0)
    except FileNotFoundError:
        pass
    return None


def _step(path: Path) -> int | None:
    """How many steps a checkpoint holds, from the head of its file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, path.stat().st_size)))
        return _item(_item(json.loads(head["__metadata__"]["tree"]), "steps"), "taken")
    except (OSError, ValueError, KeyError, TypeError):  # replaced or removed meanwhile, or none of ours
        return None


def _item(tree: Any, name: str) -> Any:
    return dict(tree[1])[name]


def record(folder: Path, trial: str) -> dict[str, Any]:
    """The last record of the trial whose id begins like this.

    Raises: ValueError where there is none or more than one, or no results folder.
    """
    read(folder)
    found = {
        r["trial"]: r for r in ledger.records(folder) if r.get("kind") == "trial" and r["trial"].startswith(trial)
    }
    if len(found) > 1:
        raise BadInput(f"{len(found)} trials of {folder} begin with {trial!r}: give more of the id.")
    if not found:
        raise BadInput(
            f"no trial of {folder} that has ended begins with {trial!r}: `gradcost status` tells of those that run, "
            f"and {folder}/records.jsonl holds the others."
        )
    return next(iter(found.values()))


def why(folder: Path, trial: str) -> tuple[str, ...]:
    """Why a trial ran, why it ended as it did, and why its learning rate was or was not chosen: a sentence each.

    Raises: ValueError as `record`.
    """
    asked = record(folder, trial)
    results = read(folder)
    return tuple(_reasons(asked, results))


def _reasons(asked: dict[str, Any], results: Results) -> Iterator[str]:
    method, phase, lr, seed = asked["method"], asked["phase"], asked["lr"], asked["seed"]
    tuned = scores((run for run in results.trials if run.phase == "tune"), method)
    confirmed = scores((run for run in results.trials if run.phase == "confirm"), method)
    winner = chosen(results.trials, method)
    match phase:
        case "tune":
            yield f"It ran to tune {method}: {lr:.3g} is one of the {len(tuned)} learning rates that were tried."
        case "confirm":
            yield f"It ran to confirm {lr:.3g}, {_place(tuned, lr)} in the tuning of {method}, on fresh seed {seed}."
        case _ if winner is None:
            yield f"It ran for the study itself: no learning rate of {method} was tuned."
        case _ if winner == lr:
            by = "the mean over the confirming seeds" if confirmed else "the tuning"
            yield f"It ran because {lr:.3g} is the learning rate that {by} chose for {method}, on fresh seed {seed}."
        case _:
            yield f"It ran with {lr:.3g} because the study says so: by its tuning {method} would take {winner:.3g}."
    match asked["status"]:
        case "failed":
            yield f"It failed: {asked.get('reason')}. The next call tries it again."
        case "diverged":
            yield f"It diverged: {asked.get('reason')}. It counts as the worst and is not run again."
    if phase in ("tune", "confirm") and asked["status"] != "failed":
        yield from _choice(lr, tuned, confirmed, winner)


def _choice(
    lr: float, tuned: dict[float, Score], confirmed: dict[float, Score], winner: float | None
) -> Iterator[str]:
    if winner is None:
        yield "No learning rate was chosen: every one diverged."
        return
    found, where = (confirmed, "on the confirming seeds") if best(confirmed) else (tuned, "in the tuning")
    if lr == winner:
        yield f"It was chosen: {_told(found[lr])} {where}, {_place(found, lr)} of {len(found)}."
    elif lr not in found:
        yield f"It was not chosen: {_place(tuned, lr)} in the tuning, it was not confirmed; {winner:.3g} was chosen."
    else:
        yield f"It was not chosen: {_told(found[lr])} {where}, where {winner:.3g} had {_told(found[winner])}."


def _place(found: dict[float, Score], lr: float) -> str:
    """Its place among all, the diverged last: `number 2`."""
    order = sorted(found, key=lambda rate: found[rate], reverse=True)
    return f"number {order.index(lr) + 1}" if lr in found else "not tried"


def _told(merit: Score) -> str:
    accuracy, loss, _ = merit
    if accuracy == float("-inf"):
        return "no accuracy (diverged)" if loss == float("-inf") else f"validation loss {-loss:.4g}"
    return f"validation accuracy {accuracy:.4f} and loss {-loss:.4g}"
