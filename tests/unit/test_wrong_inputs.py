"""Wrong inputs of a newcomer to the command line: for each, the exit code and what the message says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from report_records import write_folder
from torch import nn

import gradcost
from gradcost.tasks.catalogue import DATASETS
from in_process import inside

ROOT = Path(__file__).parents[2]
BAD = """
import torch
from torch import nn
import torch.nn.functional as F
from gradcost import Objective
from gradcost.core.value import value
from gradcost.tasks import Digits
from gradcost.tasks.task import Split, Splits

@value
class Meta(Digits):
    def objective(self, key):
        made = super().objective(key)
        return Objective(made.model.to("meta"), made.loss)

@value
class Raises(Digits):
    def score(self, model, split):
        raise RuntimeError("no more data in the shard")

@value
class NoTraining(Digits):
    def splits(self):
        train, *others = super().splits()
        return Splits(Split(train.x[:0], train.y[:0]), *others)

@value
class NoValidation(Digits):
    def splits(self):
        train, held, test = super().splits()
        return Splits(train, Split(held.x[:0], held.y[:0]), test)

def regression():
    return nn.Linear(4, 1), lambda model, batch: F.mse_loss(model(batch[0]).squeeze(-1), batch[1])

def mapping():
    return nn.Linear(4, 1), lambda model, batch: model(batch["x"]).square().mean()

def pairs():
    return {part: [(torch.ones(4, 4) * n, torch.ones(4))] for n, part in enumerate(("train", "validation", "test"))}

def mappings():
    return {part: [{"x": torch.ones(4, 4) * n}] for n, part in enumerate(("train", "validation", "test"))}
"""
ONE = ("--points", "1", "--more", "0", "--confirm", "0", "--seeds", "1", "--steps", "2", "--method", "backprop()")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "file").touch()
    write_folder(tmp_path / "torn")
    records = tmp_path / "torn" / "records.jsonl"
    lines = records.read_text().splitlines()
    records.write_text("\n".join([*lines[:2], lines[2][: len(lines[2]) // 2], *lines[3:]]) + "\n")
    write_folder(tmp_path / "emptied")
    (tmp_path / "emptied" / "records.jsonl").write_text("")
    return tmp_path


ACCURACY = "--metric FILE.py:FUNCTION --higher-is-better"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ("compare", "--task", "bad.py:Meta", *ONE),
            2,
            "of the model of Meta is on the meta device, which stores no numbers: make the model on the CPU",
        ),
        (
            ("compare", "--task", "bad.py:Raises", *ONE, "-o", "r"),
            1,
            "1 trial failed. The first: RuntimeError: no more data in the shard",
        ),
        (("compare", "--task", "bad.py:NoTraining", *ONE), 2, "the train split of NoTraining has no examples"),
        (
            ("compare", "--task", "bad.py:NoValidation", *ONE),
            2,
            "the validation split of NoValidation has no examples",
        ),
        (("compare", "--task", "bad.py", *ONE), 2, "'bad.py' names a file and no task in it: write bad.py:NAME."),
        (("compare", *ONE, "--target", "90"), 2, "an accuracy from 0 to 1, not 90: write 0.9 for 90%"),
        (("compare", *ONE, "-o", "/proc/x"), 2, "/proc/x cannot be a results folder (No such file or directory)"),
        (
            ("compare", "--model", "bad.py:mapping", "--data", "bad.py:mappings", "--metric", "accuracy", *ONE),
            2,
            ACCURACY,
        ),
        (
            ("compare", "--model", "bad.py:regression", "--data", "bad.py:pairs", "--metric", "accuracy", *ONE),
            2,
            "Use the metric loss, or give a function metric(model, batch)",
        ),
        (
            ("report", "torn", "-o", "torn.html"),
            0,
            "1 damaged line of records.jsonl skipped; such a trial runs again.",
        ),
        (("lint", "torn"), 0, "1 damaged line of records.jsonl skipped; such a trial runs again."),
        (("report", "emptied"), 0, "the folder has no trial on record."),
        (("lint", "emptied", "--json"), 0, "the folder has no trial on record."),
        (("report", "torn", "-o", "/proc/x.html"), 2, "/proc/x.html cannot be written (No such file or directory)"),
        (("report", "file"), 2, "There is no folder file. Give a results folder"),
        (("data", "fetch", "minst"), 2, "Did you mean mnist"),
    ],
    ids=lambda a: " ".join(a[:3]) if isinstance(a, tuple) else "",
)
def test_a_wrong_input_has_a_sentence_and_an_exit_code(here: Path, arguments: tuple[str, ...], code: int, said: str):
    ran = inside(*arguments, folder=here)
    assert (ran.returncode, "Traceback" in ran.stderr) == (code, False), ran.stderr
    assert said in ran.stderr


def test_a_task_that_is_refused_leaves_no_folder(here: Path):
    assert inside("compare", "--task", "bad.py:NoValidation", *ONE, "-o", "new", folder=here).returncode == 2
    assert not (here / "new").exists()


def test_the_page_of_a_damaged_folder_says_so(here: Path):
    inside("report", "torn", folder=here)
    assert "1 line of records.jsonl could not be read and was skipped." in (here / "torn" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (("report", "torn"), "altair", "report"),
        (("plan", "--model", "hf:docs/models/llama-7b.json", "--memory", "1GiB"), "transformers", "transformers"),
        (("export", "torn", "-o", "t.parquet"), "pyarrow.parquet", "export"),
    ],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_a_missing_extra_is_a_command_to_paste(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], module: str, extra: str
):
    """zsh refuses the brackets without quotes."""
    (here / "docs").symlink_to(ROOT / "docs")
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    ran = inside(*arguments, folder=here)
    assert ran.returncode == 2
    assert f'pip install "gradcost[{extra}]"' in ran.stderr


def test_every_extra_that_a_text_names_is_quoted_for_the_shell():
    texts = [*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    wrong = [(path, m[0]) for path in texts for m in re.finditer(r"pip install [^\n\"'`]*\[\w+\]", path.read_text())]
    assert wrong == []


def test_the_configurations_that_the_documentation_names_exist():
    """`hf:config.json` is the reader's own file."""
    texts = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
    named = {m[1] for path in texts for m in re.finditer(r"hf:([\w/.-]+\.json)", path.read_text())} - {
        "config.json",
        "CONFIG.json",
    }
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("compare",), "Default: backprop, checkpointed, forward_gradient, spsa, mezo."),
        (("check",), "Default: all presets that need no argument, one line each."),
        (("check",), "With --model: FILE.py:FUNCTION. FUNCTION(batch_size) or FUNCTION() returns one batch"),
        (("plan",), "Budget for the peak memory of a step, weights included"),
        (("compare",), "without parameters, buffers and batch: 64MiB"),
        (("data",), "Download a data set or a model, verify it, and store it in the cache folder"),
        (("tasks",), "List the tasks and their models."),
    ],
)
def test_the_help_is_true(tmp_path: Path, command: tuple[str, ...], said: str):
    words = re.sub(r"[\s│]+", " ", inside(*command, "--help", folder=tmp_path).stdout)
    assert said in words


def test_the_help_of_fetch_names_what_can_be_fetched(tmp_path: Path):
    text = inside("data", "fetch", "--help", folder=tmp_path).stdout
    assert [name for name in DATASETS if name not in text] == []


def test_a_budget_may_be_a_float():
    """`8e9` is how a number of bytes is typed."""
    model = nn.Linear(4, 3)
    objective = gradcost.Objective(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    batch = (torch.ones(2, 4), torch.tensor([0, 1]))
    budgets: list[Any] = [8e9, 8 * 10**9]
    plans = [gradcost.plan(objective, batch, budget, [gradcost.mezo()]) for budget in budgets]
    assert str(plans[0]) == str(plans[1])
