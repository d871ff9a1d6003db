"""`compare` under a time limit: equal effort for every method whenever it ends, and one learning rate once tested."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import gradcost
from gradcost import Trial, backprop, mezo
from gradcost.cli.quantities import seconds_of
from gradcost.core.errors import BadInput
from gradcost.results import read
from gradcost.results.facts import facts
from gradcost.results.lint import lint
from gradcost.results.records import Results
from gradcost.studies import Executor, events, timed
from gradcost.studies.processes import Record, Work
from gradcost.studies.worker import empty_record

METHODS = {"exact": backprop(), "estimated": mezo()}


@dataclass
class Clock:
    """What stands for the module `time`: a clock that only `Fast` moves."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@dataclass(frozen=True)
class Fast(Executor):
    """This process, on a clock of its own: each trial takes a second, and its accuracy depends on method and rate."""

    clock: Clock
    workers: int = field(default=1, init=False)

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        for trial in trials:
            self.clock.now += 1.0
            best = 0.1 if trial.method == "exact" else 0.01
            accuracy = (0.9 if trial.method == "exact" else 0.6) / (1 + abs(trial.optimizer.lr - best))
            score = {"loss": 1.0, "accuracy": accuracy, "targets": 300, "of": 300}
            result = {"status": "finished", "validation": score, "seconds": 1.0, "steps": trial.steps}
            yield empty_record(trial, work.code) | result | {"test": score if trial.phase == "final" else None}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timed, "time", fake)
    monkeypatch.setattr(sys.modules["gradcost.studies.compare"], "measure_methods", lambda *args: None)  # it is slow
    return fake


def run(clock: Clock, folder: Path, seconds: float, seen: list[events.Event] | None = None) -> Results:
    settings: Any = {
        "steps": 20,
        "executor": Fast(clock),
        "on_event": (lambda event: None) if seen is None else seen.append,
    }
    return gradcost.compare("digits", METHODS, time=seconds, folder=folder, **settings)


def phases(results: Results, method: str) -> dict[str, int]:
    runs = [trial.phase for trial in results.trials if trial.method == method]
    return {phase: runs.count(phase) for phase in dict.fromkeys(runs)}


def unfair(results: Results) -> set[str]:
    return {finding.code for finding in lint(facts(results)) if finding.severity == "error"} - {"E101"}


@pytest.mark.parametrize("seconds", [1, 10, 40])
def test_whenever_the_time_is_up_every_method_has_had_the_same_effort(clock: Clock, tmp_path: Path, seconds: float):
    results = run(clock, tmp_path / "r", seconds)
    assert phases(results, "exact") == phases(results, "estimated") or seconds < 6
    assert clock.now <= max(seconds + 2, 2)
    if seconds >= 6:
        assert not unfair(results)
        assert phases(results, "exact")["tune"] >= timed.COARSE


def test_the_first_round_is_reported_and_then_the_verdict(clock: Clock, tmp_path: Path):
    seen: list[events.Event] = []
    run(clock, tmp_path / "r", 12, seen)
    texts = [event.text for event in seen if isinstance(event, events.RoundEnded)]
    assert texts[0].startswith("So far, by validation accuracy at 3 learning rates each: exact 8")
    assert texts[0].endswith("Not tested yet.")
    assert "Use exact" in texts[-1]
    (up,) = [event for event in seen if isinstance(event, events.TimeIsUp)]
    assert up.finished == len(read(tmp_path / "r").trials) < up.most == 2 * (11 + 6 + 6)


def test_the_same_call_continues_and_ends_with_the_whole_comparison(clock: Clock, tmp_path: Path):
    first = run(clock, tmp_path / "r", 8)
    assert phases(first, "exact") == {"tune": 4, "final": 1} or "final" not in phases(first, "exact")
    seen: list[events.Event] = []
    whole = run(clock, tmp_path / "r", 1000, seen)
    assert phases(whole, "exact")["final"] == 6
    assert not unfair(whole)
    assert not [event for event in seen if isinstance(event, events.TimeIsUp)]
    before = clock.now
    assert run(clock, tmp_path / "r", 1000).trials == whole.trials
    assert clock.now == before


def test_once_tested_the_learning_rate_stays(clock: Clock, tmp_path: Path):
    """Otherwise more time would score the test split at several learning rates."""
    first = run(clock, tmp_path / "r", 12)
    assert phases(first, "exact")["final"] < 6
    tuned = phases(first, "exact")["tune"]
    later = run(clock, tmp_path / "r", 1000)
    assert phases(later, "exact") == {"tune": tuned, "final": 6}
    assert len({trial.lr for trial in later.trials if trial.phase == "final" and trial.method == "exact"}) == 1
    assert not unfair(later)


def test_an_interrupted_round_is_completed_first(clock: Clock, tmp_path: Path):
    def stop(event: events.Event) -> None:
        if isinstance(event, events.TrialFinished) and clock.now == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradcost.compare(
            "digits", METHODS, steps=20, time=40, folder=tmp_path / "r", executor=Fast(clock), on_event=stop
        )
    assert len(read(tmp_path / "r").trials) == 3
    results = run(clock, tmp_path / "r", 40)
    assert phases(results, "exact") == phases(results, "estimated")
    assert not unfair(results)


def test_a_folder_without_a_time_limit_is_another_comparison(clock: Clock, tmp_path: Path):
    run(clock, tmp_path / "r", 7)
    with pytest.raises(BadInput, match="holds another comparison"):
        gradcost.compare("digits", METHODS, steps=20, folder=tmp_path / "r", executor=Fast(clock))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400)])
def test_a_duration_has_a_unit(text: str, seconds: float):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["10", "m", "", "0s", "10 minutes", "-5m", "1e3s", "10m!", "9999999999h"])
def test_what_is_no_duration_is_a_sentence(text: str):
    with pytest.raises(BadInput, match="is not a duration above 0: write 90s, 10m or 1h30m"):
        seconds_of(text)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_time_above_0_is_needed(clock: Clock, tmp_path: Path, seconds: float):
    with pytest.raises(BadInput, match="the time is a number of seconds above 0"):
        run(clock, tmp_path / "r", seconds)
