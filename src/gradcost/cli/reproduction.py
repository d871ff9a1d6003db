"""What the commands `gradcost reproduce PAPER` share: which options a paper has, the run, and the page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from gradcost.cli import spec
from gradcost.cli.progress import EventPrinter
from gradcost.cli.reproduce_options import ReproduceOptions
from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.files import write_whole
from gradcost.results import ledger
from gradcost.results.records import read
from gradcost.results.wording import listed
from gradcost.studies.run import run_study
from gradcost.studies.study import Study
from gradcost.studies.task_info import first_step
from gradcost.tasks import TASKS
from gradcost.tasks.task import Task

# The papers that read an option; the other options are for all papers. A paper that reads an option only to explain
# what to write instead is among them.
PAPERS_OF = {
    **dict.fromkeys(("protocol", "uncapped", "points"), ("rike2022",)),
    "times_only": ("baydin2022",),
    **dict.fromkeys(("forwards", "rates", "more", "costs", "target", "probes", "snapshot_every"), ("panchal2025",)),
    **dict.fromkeys(("epochs", "tuned_epochs", "steps", "tuned_steps", "tuning_points"), ("rike2022", "baydin2022")),
}


def refuse_options_of_other_papers(options: ReproduceOptions) -> None:
    for name, papers in PAPERS_OF.items():
        if options.paper not in papers and getattr(options, name) != getattr(ReproduceOptions, name):
            others = listed(list(papers))
            raise BadInput(f"{option(name)} is an option of {others}; {options.paper} does not have it.")


def option(name: str) -> str:
    """Return the option of a field: --snapshot-every for snapshot_every."""
    return f"--{name.replace('_', '-')}"


def run_or_resume(study: Study, folder: Path, options: ReproduceOptions, measure: bool = False) -> EventPrinter:
    """Run or resume the study; with --records run nothing. Return the events: how many trials ran, and failed.

    Raises:
        BadInput: the folder holds another study, or the page cannot be written.
    """
    check_page(options.page)
    study = study.on(options.device)
    executor = spec.executor(options.executor, options.workers)
    settings = {"executor": executor, "every": options.every, "trial_timeout": options.trial_timeout}
    with EventPrinter() as printer:
        if options.records:
            read(folder)  # it explains what is wrong with a folder
            found = json.loads((folder / "study.json").read_text("utf-8"))["question"]
            if found != study.question:
                raise BadInput(f"{folder} holds another study: {found} With these options: {study.question}")
        else:
            for _ in run_study(study, folder, **settings, measure=measure, on_event=printer):
                pass
    return printer


def other_task(options: ReproduceOptions, with_model: Callable[[type[Task]], Task]) -> tuple[Task | None, str | None]:
    """Return the task of --task or None, and the user's file that defines it or None.

    Args:
        options: the options.
        with_model: makes a task of the class that a name stands for, with the model of the paper.
    """
    if options.task is None:
        return None, None
    if options.task in TASKS:
        task = with_model(TASKS[options.task])
        if not options.records:
            _check_model(task, options)
        return task, None
    task, _, _, file = spec.task(options.task)
    return task, file


def _check_model(task: Task, options: ReproduceOptions) -> None:
    """Raise BadInput if the model of the paper does not accept the examples of the task."""
    objective, batch = first_step(task)
    try:
        with torch.no_grad():
            objective.loss(objective.model, batch)
    except GradcostError:
        raise
    except Exception as error:
        raise BadInput(
            f"{type(objective.model).__name__}, the model of these rows of {options.paper}, does not accept the "
            f"examples of {options.task}: {error}. Name a task with images, or write an expression with a model of "
            "its own, such as Cifar10(model=Vgg(8))."
        ) from None


def with_file(study: Study, file: str | None) -> Study:
    """Return the study, whose workers also import the user's file."""
    return study if file is None else dataclasses.replace(study, file=file)


def check_page(page: Path | None) -> None:
    """Raise BadInput if the page cannot be written, before the runs."""
    if page is None:
        return
    ledger.refuse_own(page.parent, page)
    if page.is_dir():
        raise BadInput(f"--page {page} is a folder: name a file in it, such as {page / 'page.md'}.")
    existing = next(folder for folder in page.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(f"--page {page} cannot be written: {existing} is no folder that you may write to.")


def write_page(page: Path, text: str) -> None:
    ledger.refuse_own(page.parent, page)
    write_whole(page, text)
