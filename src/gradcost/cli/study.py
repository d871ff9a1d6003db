"""`gradcost study`: a study of the user's own, from a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gradcost.cli import console, spec
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.estimators.estimator import Estimator
from gradcost.planning.forecast import Forecast
from gradcost.report import html
from gradcost.results import ledger
from gradcost.results.records import document, read
from gradcost.studies import costs, quality
from gradcost.studies.environment import describe, fingerprint
from gradcost.studies.executors import Executor, Local, Ray, Work
from gradcost.studies.study import Stage, Study, alone, conduct
from gradcost.training.optimizers import Optimizer

EXECUTORS = {"local": Local, "ray": Ray}


def run_study(
    where: str, workers: int | None, executor: str, output: Path | None, every: float, as_json: bool, dry_run: bool
) -> int:
    """Run or resume a study and write its report. Returns the exit code."""
    file, _, name = where.partition(":")
    made = _found(file, name)
    if executor not in EXECUTORS:
        raise BadInput(f"no executor {executor!r}.{spec.hint(executor, EXECUTORS)} Executors: local, ray.")
    if dry_run:
        stage = first_stage(made)
        rows = [[trial.method, trial.phase, f"{trial.optimizer.lr:.3g}", str(trial.seed)] for trial in stage]
        console.show(f"{made.question} First {len(stage)} trials; what comes after depends on them:")
        console.show_table(["method", "phase", "lr", "seed"], rows)
        return 0
    folder = output or Path("gradcost-runs") / Path(file).stem
    work = Work(fingerprint(file), folder, os.path.abspath(file), every)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        open_folder(folder, made, work)
        done = conducted(made, EXECUTORS[executor](workers or os.cpu_count() or 1), work)
        if not done.failed and done.task:
            measure(done.task[0], done.methods, None, folder, done.costs)
    failed, ran = done.failed, done.ran
    results = read(folder)
    answer = {"folder": str(folder), "ran": ran, "failed": failed, "known": len(results.trials)}
    if failed:
        console.complain(f"{failed} runs failed; their tracebacks are in {folder}/records.jsonl. Again to retry.")
    else:
        answer["report"] = str(html.write(folder))
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        console.show(f"{made.question} {ran} trials were run and {len(results.trials) - ran} known already.")
        console.show(f"report   {answer.get('report', 'none: some runs failed')}")
        console.show("again    the same command goes on where it stopped; nothing is run twice")
    return 1 if failed else 0


def measure(task: Any, methods: costs.Methods, memory: int | None, folder: Path, known: dict[str, Forecast]) -> None:
    """What a step of each method takes, alone on the machine, and how good its estimates are."""
    for label in costs.clock(task, methods, memory, folder, known):
        console.say(f"timed a step of {label}")
    for label in quality.assess_methods(task, {label: methods[label] for label in methods if label in known}, folder):
        console.say(f"judged the estimates of {label}")


def _found(file: str, name: str) -> Study:
    studies = {label: thing for label, thing in vars(spec.loaded(file)).items() if isinstance(thing, Study)}
    if name:
        if name not in studies:
            raise BadInput(f"{file} holds no study {name!r}.{spec.hint(name, studies)}")
        return studies[name]
    if len(studies) != 1:
        known = ", ".join(studies) or 'none: put @study("your question") before a generator of trials'
        raise BadInput(f"{file} must hold one study, or FILE.py:NAME must say which. It holds {known}.")
    return next(iter(studies.values()))


def open_folder(folder: Path, made: Study, work: Work) -> None:
    """Make the folder of a study, or take up the one that is there. Raises: ValueError when it holds another."""
    if (folder / "study.json").exists():
        held = document(folder / "study.json") or {}
        if (held.get("question"), held.get("comparison")) != (made.question, work.code):
            raise BadInput(
                f"{folder} holds another study, or the same one made by other code. Give another folder with -o."
            )
        return
    first = first_stage(made)[0]
    objective = first.task.objective(Key(0))
    ledger.write_document(folder / "environment.json", dict(describe(torch.get_num_threads(), work.code)))
    (folder / "records.jsonl").touch()
    asked: dict[str, Any] = {
        "schema": 1,
        "comparison": work.code,
        "question": made.question,
        "task": repr(first.task),
        "task_name": type(first.task).__name__.lower(),
        "model_name": repr(getattr(first.task, "model", "model")),
        "weights": objective.dimension,
        "weights_bytes": sum(leaf.parameter.nbytes for leaf in objective.leaves),
        "batch": getattr(first.task, "batch", None),
        "target": first.target,
        "optimizer": type(first.optimizer).__name__,
        "chance": 1 / first.task.classes,
    }
    ledger.write_document(folder / "study.json", asked)


def first_stage(made: Study) -> Stage:
    """The first trials that a study asks for. Raises: ValueError where it asks for none."""
    plan = made.trials()
    try:
        stage = next(plan)
        while not stage:
            stage = plan.send([])
    except StopIteration:
        raise BadInput(f"{made.question} The study yields no trial, so there is nothing to run.") from None
    return stage


@dataclass
class Conducted:
    """What came of a study: how many trials ran and how many of those failed, what its methods are and cost."""

    ran: int = 0
    failed: int = 0
    task: list[Any] = field(default_factory=list)
    methods: dict[str, tuple[Estimator, Optimizer]] = field(default_factory=dict)
    costs: dict[str, Forecast] = field(default_factory=dict)


def conducted(made: Study, executor: Executor, work: Work) -> Conducted:
    """Run what is still to be run of a study, a line each on standard error; each method's costs are told first.

    Raises: ValueError when a method cannot serve, or the trials are of several tasks.
    """
    done = Conducted()

    def ahead(stage: Stage) -> None:
        new = {t.method: (t.estimator, t.optimizer) for t in stage if t.method not in done.methods}
        done.task = done.task or [trial.task for trial in stage[:1]]
        if any(trial.task != done.task[0] for trial in stage):
            raise BadInput("a study has one task: make one for each, so that its methods can be compared.")
        done.methods.update(new)
        for label, cost in costs.forecast_methods(done.task[0], new, None):
            if isinstance(cost, str):
                raise BadInput(f"{label} cannot serve here: {cost}")
            done.costs[label] = cost

    for record in conduct(made, executor, work, ahead):
        done.ran += 1
        done.failed += record["status"] == "failed"
        console.say(f"{done.ran}  {record['method']}  {console.run_line(record)}")
    return done
