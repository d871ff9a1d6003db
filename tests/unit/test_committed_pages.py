"""Pages of results state what their committed records say."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gradcost.results.records import read
from gradcost.results.tuning import final_runs

FOLDER = Path(__file__).parents[2] / "docs" / "results"


def page(name: str) -> str:
    return (FOLDER / name).read_text("utf-8")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"results_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_long_sequences():
    assert script("long_sequences").table(FOLDER / "long-sequences") in page("long_sequences.md")


@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_size_scaling():
    module, text = script("size_scaling"), page("size_scaling.md")
    assert module.ratios(FOLDER) in text
    assert module.slopes(FOLDER) in text


@pytest.mark.filterwarnings("ignore")
def test_more_runs_of_the_same_widths_do_not_narrow_the_slopes(monkeypatch: pytest.MonkeyPatch):
    """The runs of a width share a learning rate and an architecture: they are no independent points."""
    module = script("size_scaling")
    table, final_runs = module.slopes(FOLDER), module.final_runs

    def twice(results: Any, method: str) -> list[Any]:
        runs = final_runs(results, method)
        return [*runs, *(dataclasses.replace(run, seed=run.seed + len(runs)) for run in runs)]

    monkeypatch.setattr(module, "final_runs", twice)
    assert module.slopes(FOLDER) == table


@pytest.mark.filterwarnings("ignore")
def test_the_table_of_clipping():
    assert script("clipping").table(FOLDER / "clipping") in page("clipping.md")


@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_the_questions():
    module, text = script("questions"), page("questions.md")
    for name in module.STUDIES:
        assert module.table(FOLDER / name) in text
    assert script("updates").table(FOLDER / "updates.json") in text
    assert script("workers").table(FOLDER / "workers.json") in text


@pytest.mark.filterwarnings("ignore")
def test_the_runs_of_updates_are_the_final_runs():
    """They ran on another processor, whose rounding may change single answers."""
    results = read(FOLDER / "panchal2025")
    changes = json.loads(page("updates.json"))["changes"]
    final = [run for name in dict.fromkeys(run.method for run in results.trials) for run in final_runs(results, name)]
    settings = [(run.method, run.lr, run.steps, run.seed) for run in final]
    assert [(each["method"], each["lr"], each["steps"], each["seed"]) for each in changes] == settings
    tested = [100 * run.test.accuracy for run in final if run.test is not None and run.test.accuracy is not None]
    assert [each["accuracy"] for each in changes] == pytest.approx(tested, abs=1.0)


@pytest.mark.filterwarnings("ignore")
def test_the_findings_of_the_linter():
    module, text = script("lint_findings"), page("lint_findings.md")
    assert module.table() in text
    codes = {code.split(" ")[0] for found in module.found().values() for code in found}
    assert all(f"- **{code}, " in text for code in codes)


def test_trec_by_backprop():
    runs = json.loads(page("trec-backprop.json"))["test"]
    low, high = (pick(run["accuracy"] for run in runs) for pick in (min, max))
    assert f"{100 * low:.1f} to {100 * high:.1f}% of the test questions" in page("index.md")
    assert low > 0.92


def test_the_vision_language_model_by_backprop():
    test = json.loads(page("vqa-backprop.json"))["test"]
    text = page("index.md")
    assert f"it answers {test['accuracy']:.0%} of {test['questions']} questions" in text
    assert f"{test['animal']:.0%} of the questions" in text
    assert f"{test['shown']:.0%} of the questions" in text
