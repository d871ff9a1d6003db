"""`gradcost.compare` and `gradcost.run_study` as a script calls them: own model, no guard, no output of their own."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gradcost
from gradcost import SGD, AdamW, Key, Trial, VarianceReduced, backprop, forecast, mezo
from gradcost.cli.progress import EventPrinter
from gradcost.core.errors import BadInput
from gradcost.core.notes import Note
from gradcost.instruments.timing import Timing
from gradcost.planning.forecast import Forecast
from gradcost.results.records import read
from gradcost.studies import Comparison, Customary, Executor, Study, costs, events
from gradcost.studies.comparison import make_comparison
from gradcost.studies.costs import forecast_methods
from gradcost.studies.folder import make_folder
from gradcost.studies.processes import Record, Work
from gradcost.studies.study import first_stage
from gradcost.studies.worker import empty_record
from gradcost.tasks import Digits
from gradcost.tasks.architectures import Mlp
from gradcost.training import Adam, Master

NET = """
import gradcost
from gradcost import SGD, Trial, backprop, mezo
from gradcost.core import value
from gradcost.tasks import Digits
from torch import nn

print("a script prints once")

@value
class Net:
    def build(self, inputs, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, classes))
"""
QUICK = "steps=20, tuning_points=2, extra_points=0, confirm_seeds=0, seeds=1, workers=2"
COMPARE = f"""
results = gradcost.compare(Digits(Net()), [gradcost.backprop(), gradcost.mezo()], {QUICK})
print(gradcost.results.verdict(results))
print([trial.status for trial in results.trials])
"""
STUDY = """
@gradcost.study("Which learning rate does each method need?")
def rates():
    methods = {"backprop": backprop(), "mezo": mezo()}
    yield [Trial(Digits(Net()), name, methods[name], SGD(lr), 20) for name in methods for lr in (0.01, 0.1)]

for trial in gradcost.run_study(rates, workers=2):
    print(trial.method, trial.lr, trial.status)
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_script_without_a_guard_compares_methods_on_its_own_model(tmp_path: Path):
    (tmp_path / "script.py").write_text(NET + COMPARE)
    ran = python(tmp_path, "script.py")
    assert ran.returncode == 0, ran.stderr
    first, verdict, statuses = ran.stdout.splitlines()
    assert first == "a script prints once"
    assert verdict
    assert statuses == str(["finished"] * 6)
    assert ran.stderr == ""
    (folder,) = (tmp_path / "gradcost-runs").iterdir()
    assert json.loads((folder / "study.json").read_text())["task"] == "Digits(model=Net(), batch=64)"


@pytest.mark.slow
def test_a_study_of_a_script_and_of_the_command_line_is_one(tmp_path: Path):
    (tmp_path / "script.py").write_text(NET + STUDY)
    ran = python(tmp_path, "script.py")
    assert ran.returncode == 0, ran.stderr
    lines = {f"{method} {lr} finished" for method in ("backprop", "mezo") for lr in (0.01, 0.1)}
    assert set(ran.stdout.splitlines()) == lines | {"a script prints once"}
    again = python(tmp_path, "-m", "gradcost.cli.main", "study", "script.py", "--json")
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)  # what the script prints goes to standard error
    assert (answer["folder"], answer["ran"], answer["known"]) == ("gradcost-runs/script", 0, 4)


@pytest.mark.slow
def test_an_interactive_session_uses_a_model_from_a_module_and_refuses_one_of_its_own(tmp_path: Path):
    (tmp_path / "mine.py").write_text(NET)
    ran = python(tmp_path, "-c", "from mine import *" + COMPARE)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith(f"{['finished'] * 6}\n")
    refused = python(tmp_path, "-c", NET + COMPARE)
    assert refused.returncode == 1
    assert "Net is defined in an interactive session" in refused.stderr
    assert "put it in a .py file" in refused.stderr


@pytest.mark.slow
def test_a_class_that_a_worker_cannot_import_is_a_sentence(tmp_path: Path):
    guarded = "\n".join("    " + line for line in (NET + COMPARE).splitlines())
    (tmp_path / "script.py").write_text(f'if __name__ == "__main__":\n{guarded}\n')
    ran = python(tmp_path, "script.py")
    assert ran.returncode == 0, ran.stderr
    assert "4 of 4 trials failed" in ran.stderr
    assert "define classes and functions above it" in ran.stderr
    assert ran.stdout.endswith(f"{['failed'] * 4}\n")


@pytest.mark.slow
def test_what_is_under_the_main_guard_runs_in_no_worker(tmp_path: Path):
    guarded = "\n".join("    " + line for line in ('open("ran", "a").write("once")' + COMPARE).splitlines())
    (tmp_path / "script.py").write_text(f'{NET}\nif __name__ == "__main__":\n{guarded}\n')
    ran = python(tmp_path, "script.py")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "ran").read_text() == "once"
    assert ran.stdout.endswith(f"{['finished'] * 6}\n")


@dataclass(frozen=True)
class Here(Executor):
    """This process; every trial reaches 0.5, or fails."""

    status: str = "finished"

    def ready(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def perform(self, trials: Sequence[Trial], work: Work) -> Generator[Record]:
        for trial in trials:
            score = {"loss": 1.0, "accuracy": 0.5}
            yield empty_record(trial, work.code) | {"status": self.status, "validation": score, "reason": "no luck"}


def test_a_comparison_reports_events_in_order_and_returns_its_records(tmp_path: Path):
    reported: list[events.Event] = []
    results = gradcost.compare(
        "digits",
        {"exact": backprop(), "big": mezo(probes=2)},
        seeds=1,
        tuning_points=2,
        extra_points=0,
        confirm_seeds=0,
        folder=tmp_path / "r",
        executor=Here(),
        on_event=reported.append,
    )
    kinds = list(dict.fromkeys(type(event) for event in reported))
    assert kinds == [
        events.ComparisonStarted,
        events.MethodForecast,
        events.TrialsStarted,
        events.TrialFinished,
        events.TrialsEnded,
        events.StepTimed,
        events.EstimatesAssessed,
    ]
    assert [trial.method for trial in results.trials] == ["exact", "exact", "big", "big", "exact", "big"]
    assert {cost.method for cost in results.costs} == {"exact", "big"}
    assert [quality.method for quality in results.qualities] == ["big"]
    assert results.study.task_name == "digits"
    assert results.study.model_name == "mlp"


def test_an_interrupt_names_the_folder_and_how_to_resume(tmp_path: Path):
    def interrupted(event: events.Event) -> None:
        if isinstance(event, events.TrialFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as held:
        gradcost.compare("digits", [backprop()], folder=tmp_path / "r", executor=Here(), on_event=interrupted)
    (note,) = held.value.__notes__
    assert note == f"{tmp_path / 'r'} keeps the finished trials. The same call of gradcost.compare resumes."


def test_failed_trials_are_a_warning_and_stop_the_study(tmp_path: Path):
    def trials():
        yield [Trial(Digits(), "b", backprop(), SGD(0.1), 5)]
        raise AssertionError("the next stage must not be reached")

    with pytest.warns(Note, match=r"1 of 1 trials failed; the first: no luck\. Their tracebacks are in"):
        (failed,) = gradcost.run_study(Study("?", trials), tmp_path, executor=Here("failed"))
    assert failed.status == "failed"


def test_methods_are_named_by_their_shortest_expression_or_by_the_caller():
    def labels(methods: Any) -> list[str]:
        return [label for label, _ in digits(methods).methods]

    assert labels(None) == ["backprop()", "checkpointed()", "forward_gradient()", "spsa()", "mezo()"]
    assert labels([mezo(probes=4)]) == ["mezo(probes=4)"]
    assert labels({"mine": mezo()}) == ["mine"]


def test_a_range_of_one_learning_rate_is_a_grid_of_one_point():
    assert digits(None, lr_range=(1.0, 1.0), tuning_points=5).rates == (1.0,)


def digits(methods: Any, **options: Any) -> Comparison:
    """The comparison on digits, by the defaults of `gradcost.compare`."""
    accepted = inspect.signature(make_comparison).parameters
    defaults = {name: p.default for name, p in inspect.signature(gradcost.compare).parameters.items()}
    return make_comparison(
        "digits",
        methods,
        **{n: v for n, v in defaults.items() if n in accepted and n not in ("task", "methods")} | options,
    )


def test_rates_come_from_a_range_that_suits_the_optimizer():
    """AdamW's first look was at 0.00068, 0.032 and 1.5."""
    sgd, adamw = digits([backprop()], tuning_points=6), digits([backprop()], tuning_points=6, optimizer=AdamW(1.0))
    assert sgd.rates == (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
    assert adamw.rates == (3e-6, 3e-5, 3e-4, 0.003, 0.03, 0.3)
    assert digits([backprop()], optimizer=AdamW(1.0), is_coarse=True).rates == (2e-5, 0.00095, 0.044)
    assert digits([backprop()], tuning_points=6, optimizer=Master(Adam(1.0))).rates == adamw.rates
    given = digits([backprop()], tuning_points=6, optimizer=AdamW(1.0), lr_range=(1e-4, 10.0))
    assert (given.rates, given.own_rates) == (sgd.rates, ())


def test_each_method_has_the_grid_of_its_customary_optimizer():
    both = digits([mezo(), backprop()], tuning_points=6, optimizer=Customary())
    trials = first_stage(both.study(["mezo()", "backprop()"]))
    assert [t.optimizer.lr for t in trials if t.method == "mezo()"] == [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0]
    assert [t.optimizer for t in trials if t.method == "backprop()"] == [
        AdamW(lr) for lr in (3e-6, 3e-5, 3e-4, 0.003, 0.03, 0.3)
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"task": "digts"}, "there is no task 'digts'"),
        ({"task": object()}, "is not a task: it has no `objective`"),
        ({"methods": [mezo(), mezo()]}, "is given twice"),
        ({"methods": []}, "there is no method"),
        ({"methods": ["backprop"]}, "the estimator is 'backprop': write a value"),
        ({"methods": {"b": 3}}, "the estimator is 3: write a value"),
        ({"methods": mezo()}, r"methods is a list, such as \[gradcost.mezo\(\)\], not Probing"),
        ({"methods": "mezo()"}, "methods is a list"),
        ({"lr_range": (1.0, 0.1)}, "0 < LOW <= HIGH"),
        ({"seeds": 10**9}, "seeds is at most 10,000, not 1,000,000,000"),
        ({"tuning_points": 10**12}, "tuning_points is at most 10,000"),
        ({"confirm_seeds": 10**9}, "confirm_seeds is at most 10,000"),
        ({"extra_points": 10**9}, "extra_points is at most 10,000"),
        ({"trial_timeout": -1.0}, "is a number of seconds above 0"),
        ({"executor": Here(), "workers": 2}, "give `executor` or `workers`, not both"),
        ({"workers": -1}, "1 worker or more"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments: dict[str, Any], reason: str, tmp_path: Path):
    with pytest.raises(BadInput, match=reason):
        gradcost.compare(**({"task": "digits", "folder": tmp_path / "r"} | arguments))
    assert not (tmp_path / "r").exists()


def test_a_method_of_a_million_probes_is_forecast_and_announced_at_once(capsys: pytest.CaptureFixture[str]):
    """Before, each probe was simulated: over a minute without a word."""
    methods = {name: (gradcost.fzoo(probes=probes), SGD(0.1)) for name, probes in (("few", 100), ("many", 10**6))}
    forecasts = dict(forecast_methods(Digits(), methods, memory=None))
    assert [each.forwards for each in forecasts.values()] == [101, 1_000_001]  # type: ignore[union-attr]
    printer = EventPrinter()
    for name, found in forecasts.items():
        printer(events.MethodForecast(name, found))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "    many: each step costs 1,000,001 forward passes\n"


def test_the_flops_of_a_step_contain_its_share_of_passes_over_the_data():
    """SVRG: two estimates a step, and every 4 steps an estimate on each batch of the data."""
    task = Digits(model=Mlp(hidden=(8,)), batch=64)
    objective, batch = task.objective(Key(0)), task.batch_at(Key(0), 0)
    svrg = VarianceReduced(mezo(), every=4)
    (found,) = [cost for _, cost in forecast_methods(task, {"svrg": (svrg, SGD(0.1))}, None)]
    assert isinstance(found, Forecast)
    assert objective.data is not None
    examples = sum(len(each.x) for each in objective.data())
    mezos = forecast(mezo(), objective, batch).flops
    assert found.counts.flops == 2 * mezos
    assert found.flops == round(2 * mezos + mezos * examples / 64 / 4)
    assert found.forwards == pytest.approx(4 + 2 * examples / 64 / 4)


def test_the_milliseconds_of_a_step_contain_its_share_of_passes_over_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A pass is timed over four batches. The timed steps themselves take no snapshot after the first."""
    task = Digits(model=Mlp(hidden=(8,)), batch=64)
    objective = task.objective(Key(0))
    assert objective.data is not None
    batches = sum(len(each.x) for each in objective.data()) / 64
    timed: list[Any] = []

    def step(objective: Any, batch: Any, estimator: Any, optimizer: Any) -> Timing:
        timed.append(estimator)
        return Timing((1.0, 1.0, 3.0))

    def steps(work: Any) -> Timing:
        work()
        return Timing((8e6,))  # so long that no load of the machine makes a step of mezo() as slow

    monkeypatch.setattr(costs, "time_step", step)
    monkeypatch.setattr(costs, "time_steps", steps)
    svrg = VarianceReduced(mezo(), every=4)
    methods = {"svrg": (svrg, SGD(0.1)), "mezo": (mezo(), SGD(0.1))}
    forecasts = dict(forecast_methods(task, methods, None))
    make_folder(tmp_path / "r")
    (tmp_path / "r" / "study.json").write_text(
        '{"task": "t", "task_name": "t", "model_name": "m", "optimizer": "SGD"}'
    )
    (tmp_path / "r" / "records.jsonl").touch()
    assert list(costs.time_methods(task, methods, None, tmp_path / "r", forecasts)) == ["svrg", "mezo"]  # type: ignore[arg-type]
    found = {cost.method: cost for cost in read(tmp_path / "r").costs}
    assert found["svrg"].ms == pytest.approx(1 + 8e6 / 4 * batches / 4)
    assert found["mezo"].ms == 1
    assert timed == [VarianceReduced(mezo(), every=1 << 62), mezo()]
    trials = [Trial(task, name, estimator, SGD(0.1), 9) for name, (estimator, _) in methods.items()]
    seconds = costs.seconds_per_step(trials)
    assert seconds["svrg"] > 8e3 / 4 * batches / 4 > seconds["mezo"]
