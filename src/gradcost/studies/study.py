"""A study: a generator of trials that learns what came of them, and the engine that runs each one once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradcost.core.errors import BadInput
from gradcost.results import ledger
from gradcost.results.records import TrialRecord, trial_record
from gradcost.studies.executors import Executor, Record, Work
from gradcost.studies.trial import Trial

Stage = Sequence[Trial]
Plan = Generator[Stage, list[TrialRecord], None]


@dataclass(frozen=True)
class Study:
    """A question, and the trials that answer it.

    trials: a generator function. It yields a list of trials, which run side by side, and is sent what came of them,
    in the same order, when all have ended. What it yields next may depend on them, and on nothing else: a study
    that is started again runs it from its beginning, with the results that are known already.
    """

    question: str
    trials: Callable[[], Plan]


def study(question: str) -> Callable[[Callable[[], Plan]], Study]:
    """Make a study of a generator function of trials: `@study("Which gradient wins on digits?")`."""
    return lambda trials: Study(question, trials)


def conduct(
    made: Study, executor: Executor, work: Work, ahead: Callable[[Stage], None] = lambda stage: None
) -> Iterator[Record]:
    """Run what is still to be run of a study; each record is on disk before it is yielded.

    ahead: told of each stage before it runs.

    A trial that finished or diverged is never run again; one that failed is tried again by the next call, and the
    study stops after its stage: what comes next might depend on it.
    """
    plan = made.trials()
    ran: list[TrialRecord] | None = None
    with executor.ready():
        while True:
            try:
                stage = next(plan) if ran is None else plan.send(ran)
            except StopIteration:
                return
            ahead(stage)
            records: dict[str, Record] = {}
            with closing(run(stage, executor, work)) as ended:  # whatever happens here, its workers are stopped
                for record, fresh in ended:
                    records[record["trial"]] = record
                    if fresh:
                        yield record
            if not all(done(record) for record in records.values()):
                return
            ran = [trial_record(records[trial.name(work.code)]) for trial in stage]


def run(trials: Stage, executor: Executor, work: Work) -> Generator[tuple[Record, bool]]:
    """The record of each trial, and whether it is fresh: first those that are known, then each as it ends."""
    known = {r["trial"]: r for r in ledger.records(work.folder) if r.get("kind") == "trial" and done(r)}
    names = {trial.name(work.code): trial for trial in trials}
    for name in names:
        if name in known:
            shutil.rmtree(work.folder / "trials" / name, ignore_errors=True)  # a kill may have come before that
            yield known[name], False
    todo = [trial for name, trial in names.items() if name not in known]
    with executor.ready(), closing(executor.perform(todo, work)) as performed:
        for record in performed:
            ledger.append(work.folder, record)
            if done(record):
                shutil.rmtree(work.folder / "trials" / record["trial"], ignore_errors=True)
            yield record, True


def done(record: Record) -> bool:
    """Whether a trial came to an end of its own: an exception, or a process that was killed, is none."""
    return record["status"] in ("finished", "diverged")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within, no other process conducts a study in this folder. The lock goes with its holder, however that ends.

    Raises: ValueError with the other one's pid; OSError where the folder cannot be written.
    """
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadInput(
                f"{folder} is being worked in by process {file.read().strip() or '(unknown)'}. Wait for it, or "
                "give another folder with -o."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
