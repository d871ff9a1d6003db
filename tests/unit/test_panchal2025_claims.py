"""The quantities of the headline claims of Panchal et al. 2025, from records whose values are known."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest

from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo
from gradcost.papers.claims import Verdict, verdict
from gradcost.papers.intervals import Between
from gradcost.papers.panchal2025.headline import ACCURACY, COMPUTATIONS, CONVERGENCE, Found, compared
from gradcost.papers.panchal2025.page import HEADERS, common_loss, common_loss_rows, page, table_rows
from gradcost.papers.panchal2025.study import Length, Reproduction
from gradcost.results.records import Cost, Results, Scores, StudyRecord, TrialRecord, trial_record
from gradcost.tasks import Digits

LENGTHS = (
    Length("BP-Vanilla", backprop(), 2.0, 900),
    Length("BP-Checkpointing", checkpointed(), 3.0, 600),
    Length("FmAD-Vanilla", forward_gradient(), 2.0, 900),
    Length("MeZO", mezo(), 2.0, 900),
    Length("MeZO, as coded", mezo(), 2.0, 900),
)
ELEVEN = (LENGTHS[1], *(Length(f"ZO-{number}", mezo(), 2.0, 900) for number in range(10)))


def record(
    method: str, seed: int, accuracy: float, reached: int | None, phase: str = "final", status: str = "finished"
) -> TrialRecord:
    score = {"loss": 1.0, "accuracy": accuracy, "targets": 500, "of": 500}
    return trial_record(
        {"trial": f"{method}{seed}{phase}", "method": method, "estimator": "-", "optimizer": "-", "phase": phase}
        | {"lr": 0.1, "seed": seed, "status": status, "steps": 900 if method != "BP-Checkpointing" else 600}
        | {"reached": reached, "validation": score, "test": score if phase == "final" else None}
        | {"curve": {"step": [900], "loss": [1.0]}}
    )


def tuned(method: str, accuracy: float, reached: int | None) -> TrialRecord:
    return record(method, 0, accuracy, reached, "tune")


def test_each_quantity_is_that_of_the_method_that_lost_most_in_the_tuning_runs():
    trials = [
        *(tuned("FmAD-Vanilla", 0.8, 200), tuned("MeZO", 0.7, 100), tuned("MeZO, as coded", 0.1, None)),
        record("BP-Vanilla", 1, 0.99, 10),
        *(record("BP-Checkpointing", seed, 0.9, 100) for seed in (1, 2)),
        *(record("FmAD-Vanilla", seed, 0.5, 125) for seed in (1, 2)),  # worse in its final runs alone
        *(record("MeZO", seed, 0.75, 300) for seed in (1, 2)),
        *(record("MeZO, as coded", seed, 0.1, None) for seed in (1, 2)),
    ]
    found = compared(trials, LENGTHS)
    assert found["accuracy"].rival == "MeZO"
    assert found["accuracy"].values == pytest.approx((15.0, 15.0))
    assert found["convergence"].rival == "FmAD-Vanilla"
    assert found["convergence"].values == pytest.approx((20.0, 20.0))
    assert found["computations"].rival == "FmAD-Vanilla"
    assert found["computations"].values == pytest.approx((250 / 300,) * 2)  # 125 * 2 / (100 * 3)


def test_a_run_that_does_not_reach_the_target_gives_bounds_and_no_seed_is_dropped():
    trials = [
        *(record("BP-Checkpointing", 1, 0.9, 100), record("MeZO", 1, 0.6, None)),
        *(record("BP-Checkpointing", 2, 0.7, None), record("MeZO", 2, 0.9, 300)),
        *(record("BP-Checkpointing", 3, 0.7, None), record("MeZO", 3, 0.6, None)),
        *(record("BP-Checkpointing", 4, 0.9, 100), record("MeZO", 4, 0.1, None, status="diverged")),
    ]
    found = compared(trials, LENGTHS)
    saved = found["convergence"].values
    assert saved[0] == Between(100 * (1 - 100 / 900), 100.0)
    assert saved[1] == Between(-inf, 100 * (1 - 600 / 300))
    assert saved[2:] == (Between(-inf, 100.0), 100.0)
    flops = found["computations"].values
    assert flops == (Between(6.0, inf), Between(0.0, 600 / 1800), Between(0.0, inf), inf)
    assert found["accuracy"].values == pytest.approx((30.0, -20.0, 10.0, 80.0))
    cut_short = [replace(run, steps=120) if run.method == "MeZO" else run for run in trials[:2] * 3]
    seeds = [replace(run, seed=1 + index // 2) for index, run in enumerate(cut_short)]
    values = compared(seeds, LENGTHS)["convergence"].values
    assert len(values) == 3
    assert verdict(CONVERGENCE, values) == Verdict.INCONCLUSIVE, "between 17 and 100% are saved, published are 34.8"


def test_equal_methods_show_no_effect():
    numbers = random.Random(0)
    wrong = 0
    for _ in range(200):
        trials = [tuned(each.name, numbers.gauss(0.9, 0.01), None) for each in ELEVEN]
        trials += [record(each.name, seed, numbers.gauss(0.9, 0.01), None) for each in ELEVEN for seed in (1, 2, 3)]
        wrong += verdict(ACCURACY, compared(trials, ELEVEN)["accuracy"].values) == Verdict.DIRECTION
    assert wrong <= 12, "5% of 200 are 10, half of them on this side"  # the largest over methods per seed: 85 of 300


def test_without_the_target_there_is_no_speed_and_without_rivals_nothing():
    nothing = Found((), None)
    alone = compared([record("BP-Checkpointing", 1, 0.9, 100)], LENGTHS)
    assert alone == {"accuracy": nothing, "convergence": nothing, "computations": nothing}
    slow = compared([record("BP-Checkpointing", 1, 0.3, None), record("MeZO", 1, 0.2, None)], LENGTHS)
    assert slow["accuracy"].rival == "MeZO"
    assert slow["accuracy"].values == pytest.approx((10.0,))
    assert (slow["convergence"], slow["computations"]) == (nothing, nothing)


def test_a_run_that_failed_is_no_result():
    trials = [record("BP-Checkpointing", 1, 0.9, 100), record("MeZO", 1, 0.4, None, status="failed")]
    assert compared(trials, LENGTHS)["accuracy"] == Found((), None)


def test_the_first_full_gradient_of_svrg_counts_before_the_first_step():
    svrg = Length("ZO-SVRG", mezo(), 4.0, 250, snapshot=40.0, every=100)
    assert [svrg.until(steps) for steps in (1, 100, 101)] == [44.0, 440.0, 484.0]
    assert svrg.forwards == (250 * 4 + 3 * 40) / 250


def test_the_published_numbers_hold_against_themselves_and_fail_on_the_other_side():
    for claim, number in ((ACCURACY, 31.1), (CONVERGENCE, 34.8), (COMPUTATIONS, 3.8)):
        assert verdict(claim, [number] * 3) == Verdict.HOLDS
        assert claim.reference is not None
        assert verdict(claim, [claim.reference - 0.5] * 3) == Verdict.FAILS
        assert verdict(claim, [number + 20] * 3) == Verdict.DIRECTION


def recorded() -> Results:
    trials = [
        *(record("BP-Checkpointing", seed, 0.9, 100) for seed in (1, 2, 3)),
        *(record("FmAD-Vanilla", seed, 0.7 + seed / 100, 450) for seed in (1, 2, 3)),
        *(tuned("FmAD-Vanilla", 0.7, 450), tuned("MeZO", 0.5, None)),
        record("MeZO", 1, 0.5, 600),
        *(record("MeZO", seed, 0.5, None) for seed in (2, 3)),
    ]
    study = StudyRecord("Trec()", "trec", "minilm", (), (1, 2, 3), 1, 900, 0.8, "AdamW", 32)
    return Results(study, {"torch": "0"}, tuple(trials), (Cost("MeZO", "mezo()", peak_bytes=2**20),), ())


def test_the_table_has_a_row_per_method_and_a_ratio_only_where_all_runs_reach_the_target():
    rows = {row[0]: dict(zip(HEADERS, row, strict=True)) for row in table_rows(recorded(), LENGTHS)}
    assert set(rows["BP-Vanilla"].values()) == {"BP-Vanilla", "2.00", "900", "–"}, "not run"
    assert rows["FmAD-Vanilla"]["test accuracy"].startswith("72 [")
    assert rows["FmAD-Vanilla"]["step at target"] == "450"
    assert rows["FmAD-Vanilla"]["FLOPs"].startswith("3 [")  # 450 * 2 / (100 * 3)
    assert rows["MeZO"]["step at target"] == "not reached (1 of 3)"
    assert rows["MeZO"]["FLOPs"] == "at least 6 [2.93, infinite], 3 seeds"  # 900 * 2 / (100 * 3)
    assert rows["MeZO"]["memory"] == "1 MiB"


def test_the_page_has_a_verdict_per_claim_and_is_marked_as_reduced():
    methods = ("BP-Checkpointing", "FmAD-Vanilla", "ZO-SVRG, as coded")
    reproduction = Reproduction(task=Digits(), methods=methods, seeds=3)
    text = page(recorded(), reproduction, LENGTHS, "gradcost reproduce", "`folder`")
    for claim in (ACCURACY, CONVERGENCE, COMPUTATIONS):
        assert f"### {claim.name}" in text
    assert text.count("(reduced scale)") >= 3
    assert "40 [40, 40], 3 seeds" in text, "accuracy: 90% less 50% of MeZO"
    assert "- ZO-SVRG: It updates along eps z, not z." in text
    assert "- FmAD-Vanilla:" not in text
    assert text.startswith("# Panchal et al. 2025: the headline claims on Digits, 6,000 forward passes per run\n")
    assert "SVRG: a full gradient every 100 steps (the public code: every five epochs)" in text
    assert "multiple:" not in text
    assert "- In the records and the core-hours, and in no other figure of this page: MeZO (4 runs)." in text
    labels = Digits().splits().test.y.tolist()
    share = max(map(labels.count, set(labels))) / len(labels)
    assert f"always given, has an accuracy of {100 * share:.1f}%." in text
    assert "The value here is larger than the published one." in text


def test_the_page_names_the_learning_rates_that_the_loss_would_choose():
    score = {"BP-Checkpointing": ((0.8, 0.5), (0.9, 0.4)), "MeZO": ((0.26, 1.7), (0.25, 1.6))}
    trials = tuple(
        replace(
            record(name, 0, 0.0, None, "tune"),
            lr=lr,
            trial=f"{name} {lr}",
            validation=Scores(loss, accuracy, score=accuracy),
        )
        for name, scores in score.items()
        for lr, (accuracy, loss) in zip((0.1, 0.3), scores, strict=True)
    )
    results, reproduction = replace(recorded(), trials=trials), Reproduction(task=Digits(), seeds=1)
    text = page(results, reproduction, LENGTHS, "gradcost reproduce", "`folder`")
    assert "these methods would have another learning rate: MeZO 0.3 (loss 1.6 instead of 1.7)." in text
    agreed = replace(results, trials=trials[:2])
    assert "another learning rate" not in page(agreed, reproduction, LENGTHS, "gradcost reproduce", "`folder`")


def test_of_methods_that_miss_the_target_the_one_with_the_most_steps_or_flops_is_compared():
    lengths = (LENGTHS[1], replace(LENGTHS[2], name="FmAD-Multiple", step=90.0, steps=20), LENGTHS[3])
    few = replace(tuned("FmAD-Multiple", 0.1, None), steps=20)
    trials = [few, tuned("MeZO", 0.2, None), record("BP-Checkpointing", 1, 0.9, 100)]
    trials += [replace(record("FmAD-Multiple", 1, 0.1, None), steps=20), record("MeZO", 1, 0.2, None)]
    found = compared(trials, lengths)
    assert found["accuracy"].rival == "FmAD-Multiple"
    assert found["convergence"].rival == "MeZO"
    assert found["convergence"].values == (Between(100 * (1 - 100 / 900), 100.0),)
    assert found["computations"].rival == "FmAD-Multiple"  # equal FLOPs: the lowest accuracy


def test_the_page_says_that_the_target_was_not_reached():
    trials = tuple(record(name, 1, 0.3, None) for name in ("BP-Checkpointing", "MeZO"))
    for tried, expected in ((trials, "BP-Checkpointing did not reach the target"), (trials[:1], "not run")):
        text = page(
            replace(recorded(), trials=tried),
            Reproduction(task=Digits(), seeds=1),
            LENGTHS,
            "gradcost reproduce",
            "`folder`",
        )
        assert f"| *convergence* | **inconclusive ({expected})** |" in text
        assert f"| measured here | {expected} |" in text


def with_losses(run: TrialRecord, *losses: float) -> TrialRecord:
    steps = tuple(range(1, len(losses) + 1))
    curve = replace(
        run.curve, validation_step=steps, validation_loss=losses, validation_accuracy=(0.1,) * len(losses)
    )
    return replace(run, curve=curve)


def test_a_loss_that_every_run_reaches_compares_methods_that_miss_the_target():
    trials = (
        with_losses(record("BP-Checkpointing", 1, 0.9, None), 1.5, 0.5, 0.2),
        with_losses(record("FmAD-Vanilla", 1, 0.3, None), 1.9, 1.8, 1.5),
        with_losses(record("MeZO", 1, 0.3, None), 1.9, 1.6, 1.7),
    )
    results = replace(recorded(), trials=trials)
    assert common_loss(results) == 1.6
    rows = common_loss_rows(results, LENGTHS)
    assert rows == [
        ["BP-Checkpointing", "1", "1, 1 seed"],
        ["FmAD-Vanilla", "3", "2, 1 seed"],  # 3 * 2 / (1 * 3)
        ["MeZO", "2", "1.33, 1 seed"],
    ]
    text = page(results, Reproduction(task=Digits(), seeds=1), LENGTHS, "gradcost reproduce", "`folder`")
    assert "A validation loss of 1.6, the least one that every final run reaches." in text
    assert common_loss_rows(replace(results, trials=trials[:1]), LENGTHS) == []
    early = with_losses(record("MeZO", 1, 0.3, None), 1.6, 1.9, 1.9)
    assert common_loss_rows(replace(results, trials=(*trials[:2], early)), LENGTHS) == [], "no fall"


def test_a_run_that_reached_the_target_and_diverged_later_reached_it():
    trials = [record("BP-Checkpointing", 1, 0.9, 100), record("MeZO", 1, 0.6, 300, status="diverged")]
    found = compared(trials, LENGTHS)
    assert found["computations"].values == (2.0,)  # 300 * 2 / (100 * 3)
    rows = {row[0]: row for row in table_rows(replace(recorded(), trials=tuple(trials)), LENGTHS)}
    assert rows["MeZO"][HEADERS.index("step at target")] == "300"
    assert rows["MeZO"][HEADERS.index("FLOPs")] == "2, 1 seed"


def test_where_no_method_reached_the_target_the_rival_is_not_the_one_that_lost_most():
    finals = [record("BP-Checkpointing", 1, 0.9, 100), record("MeZO", 1, 0.9, None)]
    missed = compared([*finals, tuned("MeZO", 0.5, None)], LENGTHS)
    assert missed["accuracy"].choice == "lost most in the tuning runs"
    assert missed["convergence"].choice.startswith("took the most steps in the tuning runs, of which none without")
    assert missed["computations"].choice.startswith("spent the most FLOPs in the tuning runs, of which none without")
    reached = compared([*finals, tuned("MeZO", 0.5, 300)], LENGTHS)
    assert {each.choice for each in reached.values()} == {"lost most in the tuning runs"}


def test_the_least_loss_of_a_run_that_diverged_is_one_of_its_targets():
    """Its loss was least at the last evaluation, where it had diverged, and the page ended in an OverflowError."""
    exact = with_losses(record("BP-Checkpointing", 1, 0.9, None), 1.5, 0.5, 0.2)
    diverged = with_losses(record("MeZO", 1, 0.3, None, status="diverged"), 1.9, 1.6, 0.1)
    results = replace(recorded(), trials=(exact, replace(diverged, steps=3)))
    assert common_loss(results) == 1.6
    assert [row[1] for row in common_loss_rows(results, LENGTHS)] == ["1", "2"]
