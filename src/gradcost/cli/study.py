"""`gradcost study`: run the study of a Python file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gradcost.cli import console, spec
from gradcost.cli.answer import show_answer
from gradcost.cli.options import StudyOptions
from gradcost.cli.progress import RESUME, EventPrinter
from gradcost.core.errors import BadInput
from gradcost.core.user_errors import user_errors
from gradcost.report import html
from gradcost.results.records import Results, read
from gradcost.results.wording import count, duration
from gradcost.studies.costs import seconds_per_step
from gradcost.studies.environment import fingerprint
from gradcost.studies.folder import on_record
from gradcost.studies.run import run_study, study_document, study_folder
from gradcost.studies.study import Study, first_stage
from gradcost.studies.task_check import check_splits


def run_file(options: StudyOptions) -> int:
    """Run or resume a study, write its report, and return the exit code."""
    file, _, name = options.file.partition(":")
    study = dataclasses.replace(_find(file, name), file=os.path.abspath(file)).on(options.device)
    with user_errors(f'the study "{study.question}" failed'):
        return _run(study, options)


def _run(study: Study, options: StudyOptions) -> int:
    executor = spec.executor(options.executor, options.workers)
    folder = study_folder(study, options.output)
    if options.dry_run:
        _show_dry_run(study, folder, executor.workers, options.as_json)
        return 0
    with EventPrinter() as printer:
        settings = {"executor": executor, "every": options.every, "trial_timeout": options.trial_timeout}
        for _ in run_study(study, folder, **settings, on_event=printer):
            pass
    results = read(folder)
    report = None if printer.failed else html.write(folder, results=results)
    if options.as_json:
        answer = {"folder": str(folder), "ran": printer.ran, "failed": printer.failed, "known": len(results.trials)}
        console.print_json(answer if report is None else answer | {"report": str(report)})
    else:
        _show(study, results, printer.ran, report)
    return 1 if printer.failed else 0


def _find(file: str, name: str) -> Study:
    studies = {label: thing for label, thing in vars(spec.loaded(file)).items() if isinstance(thing, Study)}
    if name:
        if name not in studies:
            raise BadInput(f"{file} holds no study {name!r}.{spec.hint(name, studies)}")
        return studies[name]
    if len(studies) != 1:
        found = ", ".join(studies) or 'none: put @study("your question") before a generator of trials'
        raise BadInput(f"{file} must hold one study, or FILE.py:NAME must name one. It holds {found}.")
    return next(iter(studies.values()))


def _show_dry_run(study: Study, folder: Path, workers: int, as_json: bool) -> None:
    stage = first_stage(study)
    check_splits(stage[0].task)
    code = fingerprint(study.file)
    known = on_record(folder, study_document(study, stage, code))
    done = [trial.name(code) in known for trial in stage]
    seconds = seconds_per_step(stage)
    left = [trial for trial, is_done in zip(stage, done, strict=True) if not is_done]
    total = sum(trial.steps * seconds[trial.method] for trial in left) / workers
    headers = ("method", "phase", "lr", "seed")
    if as_json:
        trials = [
            dict(zip(headers, (trial.method, trial.phase, trial.optimizer.lr, trial.seed), strict=True))
            for trial in stage
        ]
        answer = {"question": study.question, "folder": str(folder), "on record": len(known), "seconds": total}
        console.print_json(answer | {"trials": trials})
        return
    rows = [[trial.method, trial.phase, f"{trial.optimizer.lr:.3g}", str(trial.seed)] for trial in stage]
    if known:
        console.show(f"{folder} has {count(len(known), 'trial')} on record, {sum(done)} of the first {len(stage)}.")
    which = (
        f"the {len(left)} missing ones of the first {len(stage)} trials"
        if any(done)
        else f"the first {len(stage)} trials"
    )
    console.show(
        f"{study.question} The steps of {which} take about {duration(total)} with -j {workers}."
        " Later trials depend on the results of these:"
    )
    console.show_table(headers, rows)


def _show(study: Study, results: Results, ran: int, report: Path | None) -> None:
    console.show(f"{study.question} {ran} trials ran now, {len(results.trials) - ran} earlier.")
    show_answer(results)
    console.show(f"report   {report or 'none: some trials failed'}")
    console.show(RESUME)
