"""What the commands `gradcost reproduce PAPER` share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradcost.cli import reproduction
from gradcost.cli.reproduce import PAPERS
from gradcost.core.errors import BadInput
from gradcost.papers.panchal2025 import study as panchal2025
from gradcost.papers.panchal2025.methods import Settings
from gradcost.results.records import read
from gradcost.studies.study import Study
from gradcost.tasks import Digits
from gradcost.tasks.architectures import Mlp
from in_process import inside


@pytest.mark.parametrize("paper", PAPERS)
def test_the_time_limit_of_a_trial_reaches_the_study(paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    def run_study(study: Any, folder: Any, **settings: Any) -> Iterator[None]:
        given.update(settings)
        raise BadInput("the study would run now")

    monkeypatch.setattr(reproduction, "run_study", run_study)
    ran = inside("reproduce", paper, "--trial-timeout", "7", "--every", "3", "-o", "out", folder=tmp_path)
    assert "the study would run now" in ran.stderr
    assert (given["trial_timeout"], given["every"]) == (7.0, 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("rike2022", "--forwards", "5"), "--forwards is an option of panchal2025; rike2022 does not have it."),
        (("rike2022", "--times-only"), "--times-only is an option of baydin2022; rike2022 does not have it."),
        (("baydin2022", "--uncapped"), "--uncapped is an option of rike2022; baydin2022 does not have it."),
        (("panchal2025", "--steps", "5"), "--steps is an option of rike2022 and baydin2022; panchal2025 does not"),
        (("panchal2025", "--tuned"), "all its runs are tuned"),
        (("panchal2025", "--forwards", "0"), "gradcost: --forwards is a number of forward passes above 0, not 0."),
        (
            ("panchal2025", "--forwards", "inf"),
            "--forwards is a number of forward passes above 0, not inf.",
        ),
        (
            ("panchal2025", "--target", "80"),
            "gradcost: --target is an accuracy above 0 and at most 1, such as 0.8",
        ),
        (("panchal2025", "--rows", "MeZO; BP"), "gradcost: --rows BP is not known. Choose from: BP-Vanilla, BP-Acc"),
        (("panchal2025", "--rows", "zo-vanila"), "--rows zo-vanila is not known. Did you mean ZO-Vanilla or"),
        (("panchal2025", "--rows", " ; "), "gradcost: --rows ' ; ' names no method. Choose from: BP-Vanilla, BP-Acc"),
        (("panchal2025", "--costs", "--target", "0.3"), "it has no --target"),
        (("panchal2025", "--costs", "--rows", "MeZO"), "it has no --rows"),
        (("panchal2025", "--costs", "--snapshot-every", "9"), "it has no --snapshot-every"),
        (("rike2022", "--snapshot-every", "9"), "--snapshot-every is an option of panchal2025"),
        (("panchal2025", "--task", "mezo()"), "there is no task 'mezo'. Known: AgNews, "),
        (
            ("rike2022", "--task", "charlm"),
            "does not accept the examples of charlm: mat1 and mat2 must have the same",
        ),
        (
            ("baydin2022", "--task", "digits", "--page", "."),
            "--page . is a folder: name a file in it, such as page.md.",
        ),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_options_of_other_papers_are_refused(options: tuple[str, ...], message: str, tmp_path: Path):
    ran = inside("reproduce", *options, folder=tmp_path)
    assert ran.returncode == 2
    assert message in " ".join(ran.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("paper", PAPERS)
def test_another_task_is_a_name_an_expression_or_that_of_a_file(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    studies: list[Study] = []

    def run_study(study: Study, folder: Any, **settings: Any) -> Iterator[None]:
        studies.append(study)
        raise BadInput("the study would run now")

    monkeypatch.setattr(reproduction, "run_study", run_study)
    file = tmp_path / "own.py"
    file.write_text(
        "from gradcost.tasks import Digits\nfrom gradcost.tasks.architectures import Mlp\nmine = Digits(Mlp((7,)), 9)"
    )
    for task in ("digits", "Digits(Mlp((8,)), 16)", f"{file}:mine"):
        ran = inside("reproduce", paper, "--task", task, "-o", "out", folder=tmp_path)
        assert "the study would run now" in ran.stderr
    named, written, own = studies
    assert "Digits(model=" in named.question
    assert f"{Digits(Mlp((8,)), 16)!r}" in written.question
    assert f"{Digits(Mlp((7,)), 9)!r}" in own.question
    assert own.file == str(file)
    assert named.file == written.file != own.file
    wrong = inside("reproduce", paper, "--task", "digit", folder=tmp_path)
    assert (wrong.returncode, "no task 'digit'" in wrong.stderr) == (2, True)


def test_a_folder_of_panchal2025_has_one_target_and_one_number_of_directions():
    questions = {
        each.study.question
        for each in (
            panchal2025.Reproduction(),
            panchal2025.Reproduction(target=0.5),
            panchal2025.Reproduction(settings=Settings(probes=4)),
        )
    }
    assert len(questions) == 3
    assert panchal2025.Reproduction(seeds=2).study.question in questions


def test_the_grid_of_panchal2025_is_a_range_in_half_decades_or_a_number_of_rates(tmp_path: Path):
    options = ("panchal2025", "--task", "digits", "--rows", "MeZO", "--forwards", "8", "--more", "0", "--seeds", "1")
    options += ("-o", "out", "--page", "page.md", "-j", "1", "--rates")
    assert inside("reproduce", *options, "1e-4:1e-3", folder=tmp_path).returncode == 0
    assert [run.lr for run in read(tmp_path / "out").trials if run.phase == "tune"] == [1e-4, 3.2e-4, 1e-3]
    assert "--rates 1e-4:1e-3" in (tmp_path / "page.md").read_text()
    assert inside("reproduce", *options, "2", folder=tmp_path).returncode == 0
    assert {run.lr for run in read(tmp_path / "out").trials if run.phase == "tune"} >= {3.2e-3, 1e-2}
    for wrong in ("0", "6", "two", "1e-3:1e-4", "0:1", "1:2:3", "1e-3:inf", "nan:1"):
        refused = inside("reproduce", *options, wrong, folder=tmp_path)
        assert (refused.returncode, refused.stdout) == (2, ""), wrong


def test_a_row_of_panchal2025_that_is_typed_twice_runs_once(tmp_path: Path):
    options = ("panchal2025", "--task", "digits", "--forwards", "8", "--dry-run", "--json")
    ran = inside("reproduce", *options, "--rows", "MeZO; mezo; MeZO", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [row["method"] for row in json.loads(ran.stdout)["rows"]] == ["MeZO"]


def test_the_target_of_panchal2025_reaches_its_trials_and_page(tmp_path: Path):
    options = ("panchal2025", "--task", "digits", "--rows", "BP-Checkpointing", "--forwards", "20", "--rates", "1")
    options += (
        "--more",
        "0",
        "--seeds",
        "1",
        "--target",
        "0.25",
        "--probes",
        "3",
        "-o",
        "out",
        "--page",
        "page.md",
        "-j",
        "1",
    )
    assert inside("reproduce", *options, folder=tmp_path).returncode == 0
    text = (tmp_path / "page.md").read_text()
    assert "a validation accuracy of 25.0%" in text
    assert "--target 0.25 --probes 3" in text
    other = inside("reproduce", "panchal2025", *options[1:3], "--records", "-o", "out", folder=tmp_path)
    assert (other.returncode, "out holds another study" in other.stderr) == (2, True)
    wrong = inside("reproduce", "panchal2025", "--target", "80", "--dry-run", folder=tmp_path)
    assert (wrong.returncode, "at most 1, such as 0.8, not 80." in " ".join(wrong.stderr.split())) == (2, True)


@pytest.mark.parametrize(
    "options",
    [
        ("rike2022", "--rows", "nn", "--task", "digits", "--epochs", "0.1"),
        ("baydin2022", "--rows", "logistic", "--task", "digits", "--steps", "5"),
        ("panchal2025", "--task", "digits", "--rows", "MeZO", "--forwards", "20", "--rates", "1", "--more", "0"),
    ],
    ids=lambda options: options[0],
)
def test_every_trial_runs_on_the_device_and_the_page_names_it(options: tuple[str, ...], tmp_path: Path):
    given = (*options, "--seeds", "1", "--device", "cpu", "-o", "out", "--page", "page.md")
    ran = inside("reproduce", *given, "-j", "1", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "device='cpu'" in read(tmp_path / "out").study.task
    page = (tmp_path / "page.md").read_text()
    assert "--device cpu" in page
    assert inside("reproduce", *given, "--records", folder=tmp_path).returncode == 0
    assert (tmp_path / "page.md").read_text() == page
    other = inside("reproduce", *options, "--seeds", "1", "--records", "-o", "out", folder=tmp_path)
    assert (other.returncode, "out holds another study" in other.stderr) == (2, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_page_that_cannot_be_written_is_refused_before_the_runs(tmp_path: Path):
    (tmp_path / "read-only").mkdir(mode=0o555)
    ran = inside("reproduce", "baydin2022", "--task", "digits", "--page", "read-only/page.md", folder=tmp_path)
    assert ran.returncode == 2
    assert "read-only is no folder that you may write to" in " ".join(ran.stderr.split())
