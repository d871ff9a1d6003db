"""Rike and Foerland's Table 1: the numbers, the metric behind them, and the rules of the verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradcost.papers.rike2022.last_batch import SHUFFLES, LastBatch, last_batch_losses
from gradcost.papers.rike2022.page import page
from gradcost.papers.rike2022.study import Reproduction, Tuning
from gradcost.papers.rike2022.table import TABLE, TableRow, counterpart, rows
from gradcost.papers.rike2022.verdicts import (
    Metric,
    RowResult,
    Verdict,
    is_published_setup,
    row_results,
    speedup,
    verdict,
)
from gradcost.results.records import Results, StudyRecord, read, trial_record
from gradcost.tasks import Digits
from gradcost.tasks.architectures import Mlp
from gradcost.tasks.task import Split, score

# The published table, to compare the copied numbers with.
CSV = """\
gradient,model,dataset,optimizer,lr,lr_decay,momentum,beta1,beta2,epochs,test_loss
forward,nn,mnist,sgd,0.000464,1e-5,0,0,0,50,0.332
backprop,nn,mnist,sgd,0.1,0,0,0,0,50,0.000
forward,nn,mnist,nesterov,0.00032,1e-5,0.367,0,0,50,0.270
backprop,nn,mnist,nesterov,0.1,0,0.5,0,0,50,0.000
forward,nn,mnist,adam,0.0005,5e-5,0,0.99,0.999,50,0.283
backprop,nn,mnist,adam,0.0001,0,0,0.9,0.999,50,0.000
forward,cnn,mnist,sgd,0.000398,1e-5,0,0,0,50,0.548
backprop,cnn,mnist,sgd,0.1,0,0,0,0,50,0.000
forward,cnn,mnist,nesterov,0.0001,1e-4,0.9,0,0,50,0.559
backprop,cnn,mnist,nesterov,0.01,0,0.783,0,0,50,0.000
forward,cnn,mnist,adam,0.00025,1e-4,0,0.9,0.9999,50,0.669
backprop,cnn,mnist,adam,0.000236,0,0,0.9,0.999,50,0.000
forward,cnn,cifar10,sgd,0.000433,1e-6,0,0,0,100,6.955
backprop,cnn,cifar10,sgd,0.01,1e-4,0,0,0,100,1.685
"""

FORWARD, BACKPROP = rows("nn")[:2]


def test_the_table_is_the_published_one():
    lines = [line.split(",") for line in CSV.splitlines()[1:]]
    for (*words, lr, decay, momentum, beta1, beta2, epochs, loss), row in zip(lines, TABLE, strict=True):
        assert words == [row.gradient, row.model, row.dataset, row.optimizer]
        numbers = (row.lr, row.decay, row.momentum, row.beta1, row.beta2, row.epochs, row.loss)
        assert tuple(map(float, (lr, decay, momentum, beta1, beta2, epochs, loss))) == numbers
    assert [row.name for row in rows("nn")] == [
        "forward NN SGD",
        "backprop NN SGD",
        "forward NN Nesterov",
        "backprop NN Nesterov",
        "forward NN Adam",
        "backprop NN Adam",
    ]


def test_every_row_is_the_counterpart_of_its_counterpart():
    assert all(counterpart(counterpart(row)) == row and counterpart(row).gradient != row.gradient for row in TABLE)


# ---- the metric


def test_the_last_batch_of_10000_by_64_is_16_examples():
    losses = torch.zeros(10_000, dtype=torch.float64)
    losses[123] = 16.0  # in a batch of 16 this one example is a mean of 1
    last = last_batch_losses(losses, 64)
    assert last.shape == (SHUFFLES,)
    assert set(last.tolist()) <= {0.0, 1.0}
    assert 0 <= last.sum() <= 10  # 1.6 expected of 1,000 shuffles
    spread = last_batch_losses(torch.arange(10_000, dtype=torch.float64), 64)
    assert spread.unique().numel() > 900  # every shuffle its own 16
    assert spread.mean() == pytest.approx(4999.5, abs=5 * 10_000 / 12**0.5 / (16 * SHUFFLES) ** 0.5)
    assert spread.std() == pytest.approx(10_000 / 12**0.5 / 4, rel=0.1)


def test_nothing_left_over_makes_the_last_batch_a_whole_one():
    assert last_batch_losses(torch.arange(8, dtype=torch.float64), 8).unique().tolist() == [3.5]


def test_a_score_has_the_whole_split_and_its_last_batch():
    task = LastBatch(Digits(model=Mlp((8,)), batch=64))
    split = task.splits().test

    class Sure(nn.Module):
        """Right on every example, but for the ten first, where it is sure of another class."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answers = split.y.clone()
            answers[:10] = (answers[:10] + 1) % 10
            return nn.functional.one_hot(answers, 10) * 100.0

    found = task.score(Sure(), split)
    assert (found.loss, found.accuracy, found.targets) == pytest.approx((1000 / 300, 290 / 300, 300))
    assert found[:3] == score(Sure(), split)
    assert found.error == pytest.approx(100 * (10 / 300 * 290 / 300) ** 0.5 / 300**0.5)
    size = 300 % 64
    assert found.last == pytest.approx(100 / size * round(found.last / 100 * size))  # whole examples of 44
    assert found.last_low <= found.loss <= found.last_high
    # Hypergeometric: no one of the ten among the 44 that come last.
    none = torch.tensor([(256 - k) / (300 - k) for k in range(10)], dtype=torch.float64).prod().item()
    assert found.zero == pytest.approx(none, abs=4 * (none * (1 - none) / SHUFFLES) ** 0.5)
    with pytest.raises(ValueError, match="empty split"):
        task.score(Sure(), Split(split.x[:0], split.y[:0]))


# ---- the verdicts


def at(*values: float, width: float = 0.0) -> Metric:
    return Metric(values, min(values) - width, max(values) + width)


@pytest.mark.parametrize(
    ("row", "metric", "other", "expected"),
    [
        (FORWARD, at(0.332), at(0.1), Verdict.DIRECTION_AND_SIZE),
        (FORWARD, at(0.3324), at(0.1), Verdict.DIRECTION_AND_SIZE),  # prints as 0.332
        (FORWARD, at(0.3326), at(0.1), Verdict.DIRECTION_ONLY),  # prints as 0.333
        (FORWARD, at(0.4, width=0.0677), at(0.1), Verdict.DIRECTION_AND_SIZE),
        (FORWARD, at(0.4, width=0.0674), at(0.1), Verdict.DIRECTION_ONLY),
        (FORWARD, at(0.332), at(0.332), Verdict.NOT_REPRODUCED),  # no better is not better
        (FORWARD, at(0.332), at(0.4), Verdict.NOT_REPRODUCED),
        (FORWARD, at(0.3, 0.4), at(0.1, 0.39), Verdict.DIRECTION_AND_SIZE),  # on every seed
        (FORWARD, at(0.3, 0.4), at(0.1, 0.41), Verdict.NOT_REPRODUCED),
        (
            FORWARD,
            Metric((0.3, 0.1), 0.0, 1.0, (1, 2)),
            Metric((0.2,), 0.1, 0.3, (2,)),
            Verdict.NOT_REPRODUCED,
        ),  # paired
        (FORWARD, at(float("inf")), at(0.1), Verdict.DIRECTION_ONLY),
        (FORWARD, at(0.332), at(float("inf")), Verdict.NOT_REPRODUCED),
        (BACKPROP, at(0.0004), at(0.1), Verdict.DIRECTION_AND_SIZE),
        (BACKPROP, at(0.0006), at(0.1), Verdict.DIRECTION_ONLY),
        (BACKPROP, at(0.06), at(0.05), Verdict.NOT_REPRODUCED),
        (BACKPROP, at(0.06), None, Verdict.NONE),
        (BACKPROP, None, at(0.06), Verdict.NONE),
    ],
)
def test_the_verdict_follows_its_rules_to_the_edge(row: TableRow, metric: Metric, other: Metric, expected: Verdict):
    assert verdict(row, metric, other) == expected
    assert verdict(row, metric, other, published=False) == Verdict.NONE


def record(row: TableRow, seed: int, loss: float, **changed: Any) -> dict[str, Any]:
    test = {"loss": loss, "accuracy": 0.9, "error": 0.01, "targets": 10_000, "of": 10_000}
    test |= {"last": loss / 2, "last_low": loss / 4, "last_high": 3 * loss, "zero": 0.25}
    curve = {"step": [10_000, 20_000, 30_000, 39_050], "loss": [4 * loss, 2 * loss, 1.5 * loss, loss]}
    return {
        "trial": f"{row.name}{seed}{changed}",
        "method": row.name,
        "estimator": "-",
        "optimizer": "-",
        "phase": "final",
        "lr": row.lr,
        "seed": seed,
        "status": "finished",
        "steps": 39_050,
        "test": test,
        "curve": curve,
    } | changed


def gathered(*records: dict[str, Any], task: str = "LastBatch(task=Mnist())") -> Results:
    study = StudyRecord(task, "mnist", "nn", (), (1,), 0, 39_050, 0.9, "SGD", 64)
    return Results(study, {"torch": "0"}, tuple(trial_record(one) for one in records), (), ())


def full() -> list[dict[str, Any]]:
    return [
        record(row, seed, {"forward": 0.3, "backprop": 0.05}[row.gradient] + seed / 1000)
        for row in rows("nn")
        for seed in (2, 1)
    ]


def test_results_are_the_final_runs_in_the_order_of_their_seeds():
    tuning = record(FORWARD, 0, 9.0, phase="tune")
    failed = record(FORWARD, 3, 9.0, status="failed")
    found = row_results(gathered(*full(), tuning, failed), rows("nn"))
    assert [run.seed for run in found[0].runs] == [1, 2]
    assert found[0].test_loss is not None
    assert found[0].test_loss.values == (0.301, 0.302)
    assert (found[0].test_loss.low, found[0].test_loss.high) == pytest.approx((0.301 - 0.0196, 0.302 + 0.0196))
    assert found[0].last_batch_loss is not None
    assert (found[0].last_batch_loss.low, found[0].last_batch_loss.high) == pytest.approx((0.301 / 4, 0.302 * 3))
    assert found[0].zero_share == 0.25


def test_a_run_that_diverged_is_infinitely_bad():
    gone = record(BACKPROP, 1, 0.0, status="diverged", steps=17, test=None)
    (result,) = row_results(gathered(gone), [BACKPROP])
    assert result.test_loss is not None
    assert result.last_batch_loss is not None
    assert result.test_loss.median == result.test_loss.low == result.last_batch_loss.high == float("inf")
    assert result.accuracy == 0.0


def test_only_the_papers_own_length_and_data_are_judged():
    table = rows("nn")
    assert is_published_setup(gathered(*full()), table)
    shorter = [
        record(row, 1, 0.2, method=f"{row.name}, tuned", trial=f"{row.name} tuned", steps=781) for row in table
    ]
    assert is_published_setup(gathered(*full(), *shorter), table), "how long the tuned rows are is another matter"
    assert not is_published_setup(gathered(*full(), task="LastBatch(task=Digits())"), table)
    assert not is_published_setup(gathered(*full()[:-1], record(table[-1], 1, 0.1, steps=781)), table)


def test_how_much_earlier_backprop_reaches_the_loss_of_the_forward_gradient():
    (forward,) = row_results(gathered(record(FORWARD, 1, 0.3)), [FORWARD])
    (backward,) = row_results(gathered(record(BACKPROP, 1, 0.15)), [BACKPROP])
    assert speedup(forward, backward) == (39_050 / 20_000, False)
    (quick,) = row_results(gathered(record(BACKPROP, 1, 0.01)), [BACKPROP])
    assert speedup(forward, quick) == (39_050 / 10_000, True)
    assert speedup(backward, forward) is None
    assert speedup(forward, RowResult(BACKPROP, ())) is None


def test_the_page_states_what_reproduces_and_what_does_not():
    table = rows("nn")
    written = page(gathered(*full()), table, "gradcost reproduce rike2022")
    assert "the direction reproduces in 6 of 6 rows and the size in 1. By the paper's metric" in written
    assert "the direction reproduces in 6 and the size in 3." in written
    assert "| forward NN SGD | 0.332 | 0.151 [0.075, 0.906] | 0.301 [0.281, 0.322] |" in written
    assert "direction and size | direction only |" in written
    assert "at least 4 times earlier" in written
    assert "backprop NN Adam: 25.0% of the shuffles give it. The loss over the whole test set is 0.05" in written
    assert "equal tuning" not in written
    tuned = [record(row, 1, 0.2, method=f"{row.name}, tuned", trial=f"{row.name} tuned") for row in table]
    assert "equal tuning" in page(gathered(*full(), *tuned), table, "-")
    assert "| forward NN Adam | 0.283 | - | - | - | none | none |" in page(gathered(*full()[:4]), table, "-")
    assert "No verdicts" in page(gathered(*full(), task="LastBatch(task=Digits())"), table, "-")


def test_the_page_in_the_docs_is_that_of_the_records_beside_it():
    docs = Path(__file__).parents[2] / "docs" / "results"
    written = (docs / "rike2022.md").read_text()
    command = next(line.strip() for line in written.splitlines() if line.startswith("    gradcost reproduce"))
    assert page(read(docs / "rike2022-nn"), rows("nn"), command) == written


# ---- the study


def test_every_row_is_tuned_over_as_many_points_around_its_published_rate():
    assert Tuning(5).rates(0.1) == (0.01, 0.032, 0.1, 0.32, 1.0)
    assert len(Tuning(4).rates(0.000464)) == 4
    with pytest.raises(ValueError, match="points >= 1"):
        Tuning(0)
    with pytest.raises(ValueError, match="epochs of a Tuning is above 0"):
        Tuning(epochs=0.0)
    with pytest.raises(ValueError, match="seeds >= 1"):
        Reproduction(seeds=0)


def test_the_trials_are_the_rows():
    stand_in = Digits(model=Mlp((1024, 1024)), batch=64)
    stage = next(Reproduction(epochs=0.1, seeds=2, task=stand_in).study.trials())
    assert len(stage) == 12
    assert {trial.steps for trial in stage} == {round(0.1 * stand_in.steps_per_epoch)}
    for one, row in zip(stage[::2], rows("nn"), strict=True):
        assert one.method == row.name
        assert (one.optimizer.lr, one.optimizer.decay) == (row.lr, row.decay)
        assert ("Clipped" in repr(one.estimator)) == (row.gradient == "forward")
        betas = f"beta1={row.beta1}, beta2={row.beta2}"
        assert (betas if row.optimizer == "adam" else f"momentum={float(row.momentum)}") in repr(one.optimizer)


def test_tuned_rows_may_be_shorter_than_the_published_ones_and_all_of_them_are_alike():
    stand_in = Digits(model=Mlp((8,)), batch=64)
    reproduction = Reproduction(epochs=0.5, tuning=Tuning(2, more=0, epochs=0.25), task=stand_in)
    assert reproduction.study.question == Reproduction(epochs=0.5, task=stand_in).study.question
    plan = reproduction.study.trials()
    assert {trial.steps for trial in next(plan)} == {round(0.5 * stand_in.steps_per_epoch)}
    tuned = plan.send([])
    assert {trial.steps for trial in tuned} == {round(0.25 * stand_in.steps_per_epoch)}
    assert len(tuned) == 6 * 2


def reproduce(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradcost.cli.main", "reproduce", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_command_runs_the_rows_once_and_writes_the_page_from_their_records(tmp_path: Path):
    options = ["rike2022", "--task", "digits", "--epochs", "0.1", "-o", "out"]
    first = reproduce(tmp_path, *options, "--json", "-j", "2")
    assert first.returncode == 0, first.stderr
    output = json.loads(first.stdout)
    assert (output["ran"], output["published"]) == (6, False)
    assert [row["row"] for row in output["rows"]["as published"]] == [row.name for row in rows("nn")]
    assert {row["on the whole set"] for row in output["rows"]["as published"]} == {"none"}
    again = reproduce(tmp_path, *options, "--records", "--page", "page.md")
    assert again.returncode == 0, again.stderr
    assert "No verdicts" in again.stdout
    assert "--task digits" in (tmp_path / "page.md").read_text()
    (test,) = {
        frozenset(record["test"])
        for record in map(json.loads, (tmp_path / "out" / "records.jsonl").read_text().splitlines())
        if record["kind"] == "trial"
    }
    assert test == {"loss", "accuracy", "targets", "of", "error", "last", "last_low", "last_high", "zero"}
    other = reproduce(tmp_path, *options, "--epochs", "0.2")
    assert other.returncode == 2
    assert "holds another study" in other.stderr


def test_the_command_explains_what_it_refuses(tmp_path: Path):
    wrong = reproduce(tmp_path, "rike2020")
    assert wrong.returncode == 2
    assert "Did you mean rike2022?" in wrong.stderr
    cnn = reproduce(tmp_path, "rike2022", "--rows", "cnn")
    assert cnn.returncode == 2
    assert "Rows: nn" in cnn.stderr
    dry = reproduce(tmp_path, "rike2022", "--task", "digits", "--tuned", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "Then the same rows with equal tuning: 48 more." in dry.stdout
    assert not (tmp_path / "gradcost-runs").exists()
