"""The summary of a study and its verdict, on constructed records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_records import METHODS, PROBING, cost, results_of, trial, write_folder

from gradcost.core.metric import Metric
from gradcost.report import tables
from gradcost.results import summary, tuning
from gradcost.results import verdict as recommended
from gradcost.results.rankings import rankings
from gradcost.results.records import Results, read
from gradcost.results.tuning import chosen, finals
from gradcost.results.verdict import certainty


@pytest.fixture
def whole(tmp_path: Path) -> Results:
    return read(write_folder(tmp_path / "whole"))


# ---- the summary


def test_the_interval_is_of_the_median_and_a_run_that_diverged_is_its_worst_value(tmp_path: Path):
    """Student's interval of the mean would reach beyond 100% here, and lose the run that diverged."""
    skewed = results_of(
        tmp_path, {"method": "a()", "accuracies": [0.99, 0.9, 0.995, None, 0.98]}, seeds=[0, 1, 2, 3, 4]
    )
    (row,) = summary.summarise(skewed)
    assert row.accuracies == (0.99, 0.9, 0.995, -math.inf, 0.98)
    assert row.accuracy is not None
    assert (row.accuracy.median, row.accuracy.low, row.accuracy.high) == (0.98, -math.inf, 0.995)
    assert (row.accuracy.confidence, row.accuracy.n) == (0.9375, 5)
    assert tables.accuracy(row) == "98.0 [diverged, 99.5]"
    assert row.loss is not None
    assert row.loss.high == math.inf
    assert tables.loss(row) == "0.0200 [0.0050, diverged]"


def test_a_row_is_json_where_runs_diverged(tmp_path: Path):
    (row,) = summary.summarise(results_of(tmp_path, {"method": "a()", "accuracies": [0.99, None, None]}))
    record = json.loads(json.dumps(summary.plain(row), allow_nan=False))
    assert record["accuracies"] == [0.99, None, None]
    assert record["accuracy"] == {"median": None, "low": None, "high": 0.99, "confidence": 0.75, "n": 3}


def tried(lr: float, accuracy: float | None, loss: float | None, status: str = "finished") -> dict[str, Any]:
    return trial("a", "tune", lr, status=status, validation={"loss": loss, "accuracy": accuracy})


def test_tuning_takes_the_best_accuracy_then_the_lower_loss_then_the_smaller_rate(tmp_path: Path):
    lines = [tried(0.1, 0.9, 0.5), tried(1.0, 0.9, 0.3), tried(0.3, 0.9, 0.3), tried(3.0, 0.99, 0.1, "diverged")]
    for order in (lines, lines[::-1]):
        assert chosen(read(write_folder(tmp_path, order)).trials, "a") == 0.3
    assert chosen([], "a") is None
    unscored = [tried(0.1, None, 0.5), tried(1.0, None, 0.3)]
    assert chosen(read(write_folder(tmp_path, unscored)).trials, "a") == 1.0


@pytest.mark.parametrize(("lr", "edge"), [(0.1, "smallest"), (1.0, None), (10.0, "largest"), (None, None)])
def test_an_edge_of_the_grid(lr: float | None, edge: str | None):
    assert tuning.edge((0.1, 1.0, 10.0), lr) == edge
    assert tuning.edge((0.1,), lr) is None


def test_final_runs_at_another_rate_than_the_chosen_one_are_left_out(tmp_path: Path):
    best = {"loss": 0.1, "accuracy": 0.9}
    lines = [trial("a", "final", lr, s, test=best) for lr in (0.1, 1.0) for s in range(2)]
    chose = read(write_folder(tmp_path, [tried(0.1, 0.9, 0.1), tried(1.0, 0.8, 0.1), *lines]))
    assert {t.lr for t in finals(chose.trials, "a")} == {0.1}
    (row,) = summary.summarise(chose)
    assert (row.lr, row.seeds, row.edge) == (0.1, 2, "smallest")
    overridden = read(write_folder(tmp_path, [tried(0.1, 0.9, 0.1), tried(1.0, 0.8, 0.1), *lines[2:]]))
    assert summary.summarise(overridden)[0].lr == 1.0
    assert "not at the rate that tuning chose" in tables.audit(overridden).rows[0][-1]


def test_steps_to_target_are_the_median_of_the_seeds_that_reached_it(tmp_path: Path):
    best = {"loss": 0.1, "accuracy": 0.9}
    lines = [cost("a", 1024, 2.0, "Reverse()")]
    lines += [trial("a", seed=s, test=best, reached=at) for s, at in enumerate([100, None, 300])]
    (row,) = summary.summarise(read(write_folder(tmp_path, lines)))
    assert (row.steps_to_target, row.reached, row.seconds_to_target) == (200, 2, pytest.approx(0.4))
    assert tables.to_target(row) == "200 steps, 0.4 s (2 of 3)"
    assert tables.to_target(replace(row, doubt="busy")) == "200 steps, ~0.4 s (2 of 3)"


def test_rows_follow_the_study_and_leave_out_the_refused(whole: Results):
    assert [row.method for row in summary.summarise(whole)] == [label for label, *_ in METHODS]


@pytest.mark.parametrize(
    ("estimator", "exact", "expected"),
    [
        ("Reverse(saving=Everything())", True, True),
        ("Reverse(saving=Everything())", None, True),  # a record of an older version
        ("Accumulated(estimator=Reverse(saving=Blocks()), parts=4)", None, True),
        ("VarianceReduced(estimator=mezo(), every=100, anchor=Reverse(saving=Everything()))", False, False),
        ("VarianceReduced(estimator=mezo(), every=100, anchor=Reverse(saving=Everything()))", None, False),
        ("Probing(slope=Jvp(), probes=8)", None, False),
    ],
)
def test_a_row_is_exact_if_its_records_say_so(tmp_path: Path, estimator: str, exact: bool | None, expected: bool):
    changes: dict[str, Any] = {} if exact is None else {"exact": exact}
    records = [trial("a", estimator=estimator, **changes)]
    (row,) = summary.summarise(read(write_folder(tmp_path / "results", records)))
    assert row.exact is expected


# ---- the verdict


def test_the_verdict_of_a_whole_study(whole: Results):
    verdict = recommended(whole)
    assert verdict.startswith("Use checkpointed(): 97.2% test accuracy [97.0, 97.4] after 600 steps in 33 KiB")
    assert "backprop() (97.2%, 64.5 KiB) is within its interval and needs more memory" in verdict
    assert "The best method with an estimated gradient, forward_gradient(probes=8), is 6.9 points behind" in verdict
    assert "in 40.5 KiB, 3.4 ms per step instead of 0.83." in verdict


def test_a_clear_winner_alone(tmp_path: Path):
    verdict = recommended(results_of(tmp_path, {"method": "only()", "accuracies": [0.9, 0.91, 0.92], "peak": 2048}))
    assert verdict == "Use only(): 91.0% test accuracy [90.0, 92.0] after 600 steps in 2 KiB beyond the weights."


def test_equal_accuracy_and_memory_goes_to_the_faster(tmp_path: Path):
    slow = {"method": "slow()", "accuracies": [0.9, 0.91, 0.92], "ms": 2.0}
    fast = {"method": "fast()", "accuracies": [0.9, 0.91, 0.92], "ms": 1.0}
    verdict = recommended(results_of(tmp_path, slow, fast))
    assert verdict.startswith("Use fast(): ")
    assert verdict.endswith("slow() (91.0%, 1 KiB) is within its interval.")


@pytest.mark.parametrize("ms", [1.0, 9.0])
def test_an_unreliable_timing_does_not_choose_between_equal_methods(tmp_path: Path, ms: float):
    few = {"method": "few()", "accuracies": [0.9, 0.91, 0.92], "ms": 2.0, "flops": 2_000}
    many = {"method": "many()", "accuracies": [0.9, 0.91, 0.92], "ms": ms, "flops": 3_000, "doubt": "busy"}
    assert recommended(results_of(tmp_path / "a", few, many)).startswith("Use few(): ")
    assert recommended(results_of(tmp_path / "b", many, few)).startswith("Use few(): ")


def test_an_unreliable_timing_of_a_method_with_more_memory_changes_nothing(tmp_path: Path):
    slow = {"method": "slow()", "accuracies": [0.9, 0.91, 0.92], "ms": 2.0, "flops": 2_000}
    fast = {"method": "fast()", "accuracies": [0.9, 0.91, 0.92], "ms": 1.0, "flops": 3_000}
    large = {"method": "large()", "accuracies": [0.9, 0.91, 0.92], "peak": 9216, "doubt": "busy"}
    assert recommended(results_of(tmp_path, slow, fast, large)).startswith("Use fast(): ")


def test_a_method_that_does_not_fit_is_not_recommended(tmp_path: Path):
    big = {"method": "big()", "accuracies": [0.97, 0.98, 0.97], "peak": 9216, "fits": False}
    small = {"method": "small()", "accuracies": [0.8, 0.81, 0.8], "estimator": PROBING, "fits": True}
    verdict = recommended(results_of(tmp_path, big, small, memory=4096))
    assert verdict.startswith("Use small(): 80.0% test accuracy [80.0, 81.0]")
    assert verdict.endswith("No method with the exact gradient fits 4 KiB; the smallest, big(), needs 9 KiB.")


def test_nothing_fits(tmp_path: Path):
    big = {"method": "big()", "accuracies": [0.97], "peak": 9216, "fits": False}
    less = {"method": "less()", "peak": 8192, "fits": False}
    verdict = recommended(results_of(tmp_path, big, less, memory=4096))
    assert verdict == "No method can be recommended: none fits 4 KiB; the smallest, less(), needs 8 KiB."


def test_nothing_finished_yet(tmp_path: Path):
    verdict = recommended(results_of(tmp_path, {"method": "a()"}))
    assert verdict.startswith("No method can be recommended: none has finished yet; run the same command again")


def test_everything_diverged(tmp_path: Path):
    verdict = recommended(results_of(tmp_path, {"method": "a()", "accuracies": [None, None, None]}))
    assert verdict == "No method can be recommended: none finished (3 runs diverged)."


def test_every_method_was_refused(tmp_path: Path):
    lines = [{"schema": 1, "kind": "refused", "method": "a", "estimator": "", "reason": "it cannot."}]
    assert recommended(read(write_folder(tmp_path, lines))).startswith("No method can be used here. a: it cannot.")


def test_a_seed_that_diverged_counts_as_guessing(tmp_path: Path):
    wild = {"method": "wild()", "accuracies": [0.99, 0.99, None]}
    calm = {"method": "calm()", "accuracies": [0.9, 0.91, 0.9]}
    verdict = recommended(results_of(tmp_path, wild, calm))
    assert verdict.startswith("Use calm(): ")
    alone = recommended(results_of(tmp_path, wild))
    assert alone.startswith("Use wild(): 99.0% test accuracy [diverged, 99.0] (1 of 3 seeds diverged)")


def test_forward_only_that_diverged_and_forward_only_that_wins(tmp_path: Path):
    exact = {"method": "backprop()", "accuracies": [0.97, 0.98, 0.97], "peak": 4096}
    lost = {"method": "mezo()", "accuracies": [None, None, None], "estimator": PROBING}
    assert recommended(results_of(tmp_path, exact, lost)).endswith(
        "No method with an estimated gradient finished (3 runs diverged)."
    )
    alike = {"method": "mezo()", "accuracies": [0.97, 0.98, 0.97], "estimator": PROBING, "ms": 3.0}
    verdict = recommended(results_of(tmp_path, exact, alike))
    assert verdict.startswith("Use mezo(): ")
    assert "The best method with the exact gradient is backprop(): 97.0%" in verdict
    assert verdict.endswith("in 4 KiB, 1 ms per step instead of 3.")


def test_nothing_learned(tmp_path: Path):
    verdict = recommended(results_of(tmp_path, {"method": "a()", "accuracies": [0.1, 0.11, 0.1]}))
    assert verdict.startswith("Nothing learned: the best method, a(), has 10.0%")
    assert verdict.endswith("guessing gives 10.0%.")


def test_the_most_frequent_class_always_given_has_learned_nothing(tmp_path: Path):
    def verdict(name: str, **study: float) -> str:
        lines = [
            trial("a()", "final", seed=seed, validation=score, test=score)
            for seed in (0, 1, 2)
            for score in [{"loss": 0.3, "accuracy": 0.92}]
        ]
        return recommended(read(write_folder(tmp_path / name, lines, chance=0.5, **study)))

    uneven = verdict("uneven", majority=0.92)
    assert uneven.startswith("Nothing learned: the best method, a(), has 92.0%")
    assert uneven.endswith("always giving the most frequent answer gives 92.0%.")
    assert verdict("even").startswith("Use a(): 92.0%")


def test_a_few_labels_that_guessing_may_give_are_nothing_learned(tmp_path: Path):
    """48 labels of six classes, drawn at random, are right in up to 1/6 + 3 sqrt(5/36/48) = 32.8% of the cases."""

    def verdict(targets: int) -> str:
        score = {"loss": 1.7, "accuracy": 0.29, "targets": targets, "of": targets}
        lines = [trial("a()", "final", seed=seed, validation=score, test=score) for seed in (0, 1, 2)]
        return recommended(read(write_folder(tmp_path / str(targets), lines, chance=1 / 6)))

    assert verdict(48).startswith("Nothing learned: the best method, a(), has 29.0%")
    assert verdict(480).startswith("Use a(): 29.0%")


def test_methods_at_one_rate_each_were_not_tuned(tmp_path: Path):
    score = {"loss": 0.3, "accuracy": 0.9}
    lines = [
        trial(name, "final", seed=seed, validation=score, test=score) for name in ("a()", "b()") for seed in (1, 2)
    ]
    once, often = (recommended(read(write_folder(tmp_path / str(points), lines, points=points))) for points in (1, 5))
    assert once == f"{often} No learning rate was tuned: with other ones, the order of the methods may be another."


def test_one_seed_has_no_interval_and_missing_seeds_are_counted(tmp_path: Path):
    one = results_of(tmp_path, {"method": "a()", "accuracies": [0.9]})
    assert "90.0% test accuracy (one seed, no interval) (2 of 3 seeds missing)" in recommended(one)


def test_the_points_between_two_methods_are_those_between_the_medians_beside_them(tmp_path: Path):
    steady = {"method": "a()", "accuracies": [0.97] * 5, "estimator": "Reverse()"}
    risky = {"method": "b()", "accuracies": [0.95] * 4 + [None], "estimator": PROBING}
    assert "b(), is 2.0 points behind: 95.0% test accuracy" in recommended(results_of(tmp_path, steady, risky))


def test_a_method_whose_median_run_diverged_is_not_recommended(tmp_path: Path):
    verdict = recommended(results_of(tmp_path, {"method": "a()", "accuracies": [0.97, None, None]}))
    assert verdict.startswith("No method can be recommended: none finished on most of its seeds (2 runs diverged)")


def test_the_verdict_names_a_study_that_is_scored_by_its_loss_alone(tmp_path: Path):
    lines = [trial("a()", seed=seed, test={"loss": 0.1, "accuracy": None}) for seed in range(3)]
    results = read(write_folder(tmp_path / "losses", lines))
    assert "scored by their loss alone" in recommended(results)
    assert rankings(results) == []


def test_what_was_not_measured_is_left_out_of_the_sentences(tmp_path: Path):
    lines = [
        trial(name, seed=seed, estimator=estimator, test={"loss": 0.1, "accuracy": accuracy + seed / 1000})
        for name, estimator, accuracy in (("a()", "Reverse()", 0.9), ("b()", PROBING, 0.5))
        for seed in range(3)
    ]
    verdict = recommended(read(write_folder(tmp_path / "bare", lines)))
    assert "\N{EN DASH}" not in verdict
    assert verdict.startswith("Use a(): 90.1% test accuracy [90.0, 90.2] after 600 steps.")


def test_estimated_gradients_that_are_alike_are_named_together(tmp_path: Path):
    exact = {"method": "bp()", "accuracies": [0.97, 0.975, 0.98], "estimator": "Reverse()"}
    one = {"method": "fg()", "accuracies": [0.85, 0.87, 0.88], "estimator": PROBING}
    other = {"method": "zo()", "accuracies": [0.84, 0.86, 0.89], "estimator": PROBING}
    verdict = recommended(results_of(tmp_path / "alike", exact, one, other))
    assert "The best methods with an estimated gradient, fg() (87.0%" in verdict
    assert "zo() (86.0%" in verdict
    assert "are alike and 10.5 to 11.5 points behind." in verdict
    verdict = recommended(results_of(tmp_path / "apart", exact, one, {**other, "accuracies": [0.3] * 3}))
    assert "The best method with an estimated gradient, fg(), is 10.5 points behind" in verdict


def test_alike_methods_that_diverge_on_some_seeds_may_be_ahead(tmp_path: Path):
    exact = {"method": "bp()", "accuracies": [0.84, 0.85, 0.85, 0.85, 0.85, 0.86], "estimator": "Reverse()"}
    one = {"method": "fg()", "accuracies": [0.9] * 4 + [None] * 2, "estimator": PROBING}
    other = {**one, "method": "zo()"}
    verdict = recommended(results_of(tmp_path / "ahead", exact, one, other))
    assert "fg() (90.0%, 1 KiB; 2 of 6 seeds diverged) and zo() (" in verdict
    assert "are alike and 5.0 points ahead." in verdict
    wide = {**one, "accuracies": [0.86, 0.94, 0.94, 0.94, None, None]}
    verdict = recommended(
        results_of(tmp_path / "both", exact, wide, {**other, "accuracies": [0.87] * 4 + [None] * 2})
    )
    assert "are alike and 2.0 to 5.0 points ahead." in verdict
    verdict = recommended(
        results_of(tmp_path / "mixed", exact, wide, {**other, "accuracies": [0.84] * 4 + [None] * 2})
    )
    assert "are alike and 5.0 points ahead to 1.0 point behind." in verdict


def test_a_method_whose_seeds_are_all_equal_can_be_recommended(tmp_path: Path):
    """Rounding puts the interval of six times 0.85 above 0.85."""
    exact = {"method": "bp()", "accuracies": [0.85] * 6, "estimator": "Reverse()"}
    assert recommended(results_of(tmp_path, exact)).startswith("Use bp(): 85.0% test accuracy")


def test_before_the_first_final_run_the_answer_is_that_of_validation(tmp_path: Path):
    score = {"loss": 1.0, "accuracy": 0.5}
    lines = [trial("a()", "tune", validation=score), trial("a()", "tune", lr=1.0, status="diverged")]
    lines += [trial("b()", "tune", validation=score)]
    verdict = recommended(read(write_folder(tmp_path / "r", lines)))
    assert verdict.startswith("So far, by validation accuracy at 2 learning rates each: a() 50.0%, b() 50.0%. Not")
    failed = [*lines, trial("b()", "tune", lr=1.0, status="failed", reason="RuntimeError: no luck")]
    verdict = recommended(read(write_folder(tmp_path / "f", failed)))
    assert verdict == "No method can be recommended: 1 run failed. The first: RuntimeError: no luck."


def test_final_runs_of_unequal_length_are_told(tmp_path: Path):
    def lines(steps: int) -> list[dict[str, Any]]:
        score = {"loss": 1.0, "accuracy": 0.9}
        return [
            trial(name, "final", seed=seed, validation=score, test=score) | {"steps": length}
            for name, length in (("a()", 600), ("b()", steps))
            for seed in (1, 2)
        ]

    told = recommended(read(write_folder(tmp_path / "r", lines(20))))
    assert told.endswith(
        "The final runs are not equally long: b() was trained for 20 steps, but a() for 600 steps; their FLOPs "
        "are not all on record."
    )
    assert "equally long" not in recommended(read(write_folder(tmp_path / "s", lines(600))))


def test_a_winner_at_an_edge_of_the_rates_is_named(tmp_path: Path):
    lines = [trial("a()", "tune", lr=lr, validation={"loss": 1.0, "accuracy": lr}) for lr in (0.1, 0.5)]
    score = {"loss": 1.0, "accuracy": 0.9}
    lines += [trial("a()", "final", lr=0.5, seed=seed, validation=score, test=score) for seed in (1, 2)]
    assert recommended(read(write_folder(tmp_path / "r", lines))).startswith(
        "Nothing can be said yet: the best learning rate of a(), 0.5, is the largest that was tried, so a better one "
        "may lie beyond it (compare: --lr-range, --extra-points). So far a() leads: 90.0% test accuracy"
    )
    score = {"loss": 1.0, "accuracy": 0.95}
    lines += [trial("b()", "final", lr=0.5, seed=seed, validation=score, test=score) for seed in (1, 2)]
    assert recommended(read(write_folder(tmp_path / "r2", lines))).endswith(
        "Tuning is not complete: the best learning rate of a() is at the edge of those that were tried, so a better "
        "one may lie beyond it."
    )


STARTS = ("Nothing can be said yet: the test loss of a(), 2.0e+17, is above its training loss", "Use a(): 90.0%")


def test_a_loss_above_its_start_is_no_ground_for_a_recommendation(tmp_path: Path):
    """The first try of many users: few steps, two learning rates, and a test loss of 2e17."""
    runs = [{"loss": loss, "accuracy": 0.9} for loss in (2e17, 2.1)]
    for number, (test, start) in enumerate(zip(runs, STARTS, strict=True)):
        curve = {"step": [1, 2], "loss": [2.3, 2.2]}
        lines = [trial("a()", "final", seed=seed, test=test, curve=curve) for seed in (1, 2)]
        assert recommended(read(write_folder(tmp_path / str(number), lines))).startswith(start)


def test_a_final_run_that_diverged_makes_the_difference_infinite(tmp_path: Path):
    lines = []
    for method, estimator, accuracy in (("bp()", "Reverse()", 0.9), ("zo()", PROBING, 0.5)):
        for seed in range(6):
            gone = method == "bp()" and seed == 3
            score = {"loss": 1.0, "accuracy": accuracy}
            common = {"seed": seed, "estimator": estimator, "validation": score}
            end = {"test": None, "status": "diverged"} if gone else {"test": score}
            lines += [trial(method, "final", **end, **common), trial(method, "tune", **common)]
    (known,) = certainty(read(write_folder(tmp_path / "made", lines)))
    assert "is 40 [-infinite, 40] points of accuracy, where a run that diverged is infinitely bad." in known


def test_any_metric_has_the_planned_comparison_and_a_loss_must_fall(tmp_path: Path):
    """Own models are ranked by a loss: the difference is tested, and an untrained model recommends nothing."""
    lines = []
    for method, estimator, loss in (("bp()", "Reverse()", 2.0), ("zo()", PROBING, 4.0)):
        for seed in range(6):
            score = {"loss": loss + seed / 100, "accuracy": None, "score": -loss - seed / 100}
            curve = {"step": [1, 2], "loss": [4.1, 4.0]}
            common = {"seed": seed, "estimator": estimator, "validation": score}
            lines += [trial(method, "final", test=score, curve=curve, **common), trial(method, "tune", **common)]
    results = read(write_folder(tmp_path / "loss", lines))
    results = replace(results, study=replace(results.study, metric=Metric("loss", lower_is_better=True), chance=None))
    assert "The planned comparison, bp() against zo(), is significant (p 0.0312, 6 seeds)." in recommended(results)
    (known,) = certainty(results)
    assert "On the test split bp() less zo() is -2 [-2, -2] of loss." in known
    assert known.endswith("A run of bp() is better than one of zo() with probability 1.00.")
    untrained = tuple(
        replace(run, test=replace(run.test, loss=4.08, score=-4.08)) if run.test else run for run in results.trials
    )
    assert recommended(replace(results, trials=untrained)).startswith("Nothing can be said yet: the test loss of ")


def test_the_interval_is_that_of_the_most_accurate_method(tmp_path: Path):
    """The advice was "Use small(): 96.5% [96.5, 96.6]; best() is within its interval (97.5%)"."""
    best = {"method": "best()", "accuracies": [0.955, 0.97, 0.975, 0.98, 0.99], "peak": 9216}
    small = {"method": "small()", "accuracies": [0.965, 0.965, 0.965, 0.966, 0.966], "peak": 1024}
    other = {"method": "other()", "accuracies": [0.96, 0.96, 0.96, 0.96, 0.96], "peak": 4096}
    verdict = recommended(results_of(tmp_path / "two", best, small))
    assert verdict == (
        "Use small(): 96.5% test accuracy [96.5, 96.6] after 600 steps in 1 KiB beyond the weights; it is within the "
        "interval of the best, best(), with 97.5% test accuracy [95.5, 99.0] in 9 KiB and needs the least memory."
    )
    verdict = recommended(results_of(tmp_path / "three", best, small, other))
    assert (
        "of the best, best(), with 97.5% test accuracy [95.5, 99.0] in 9 KiB, as is other() (96.0%, 4 KiB) and"
        in verdict
    )
