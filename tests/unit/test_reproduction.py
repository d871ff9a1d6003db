"""What the commands `gradcost reproduce PAPER` share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradcost.cli import reproduction
from gradcost.cli.reproduce import PAPERS
from gradcost.core.errors import BadInput
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
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_options_of_other_papers_are_refused(options: tuple[str, ...], message: str, tmp_path: Path):
    ran = inside("reproduce", *options, folder=tmp_path)
    assert ran.returncode == 2
    assert message in " ".join(ran.stderr.split())
    assert list(tmp_path.iterdir()) == []
