"""The quantities of the headline claims of Panchal et al. 2025, from records whose values are known."""

from __future__ import annotations

from math import inf

import pytest

from gradcost.papers.claims import Verdict, verdict
from gradcost.papers.panchal2025.headline import ACCURACY, COMPUTATIONS, CONVERGENCE, values
from gradcost.results.records import TrialRecord, trial_record

FORWARDS = {"BP-Vanilla": 2.0, "BP-Checkpointing": 3.0, "FmAD-Vanilla": 2.0, "MeZO": 2.0}


def record(method: str, seed: int, accuracy: float, reached: int | None) -> TrialRecord:
    test = {"loss": 1.0, "accuracy": accuracy, "targets": 500, "of": 500}
    return trial_record(
        {"trial": f"{method}{seed}", "method": method, "estimator": "-", "optimizer": "-", "phase": "final"}
        | {"lr": 0.1, "seed": seed, "status": "finished", "steps": 900, "test": test, "reached": reached}
        | {"curve": {"step": [900], "loss": [1.0]}}
    )


def test_each_quantity_is_the_largest_over_methods_for_each_seed():
    trials = [
        record("BP-Vanilla", 1, 0.99, 10),
        *(record("BP-Checkpointing", seed, 0.9, 100) for seed in (1, 2)),
        *(record("FmAD-Vanilla", seed, 0.8, 125) for seed in (1, 2)),
        record("MeZO", 1, 0.7, 300),
        record("MeZO", 2, 0.85, None),
    ]
    found = values(trials, FORWARDS)
    assert found["accuracy"] == pytest.approx((20.0, 10.0))
    assert found["convergence"] == pytest.approx((100 * (1 - 100 / 300), 100.0))
    assert found["computations"] == pytest.approx((2.0, inf))  # 300 * 2 / (100 * 3)


def test_without_the_target_there_is_no_speed_and_without_rivals_nothing():
    alone = values([record("BP-Checkpointing", 1, 0.9, 100)], FORWARDS)
    assert alone == {"accuracy": (), "convergence": (), "computations": ()}
    slow = values([record("BP-Checkpointing", 1, 0.3, None), record("MeZO", 1, 0.2, None)], FORWARDS)
    assert slow == {"accuracy": pytest.approx((10.0,)), "convergence": (), "computations": ()}


def test_the_published_numbers_hold_against_themselves_and_fail_on_the_other_side():
    for claim, number in ((ACCURACY, 31.1), (CONVERGENCE, 34.8), (COMPUTATIONS, 3.8)):
        assert verdict(claim, [number] * 3) == Verdict.HOLDS
        assert claim.reference is not None
        assert verdict(claim, [claim.reference - 0.5] * 3) == Verdict.FAILS
        assert verdict(claim, [number + 20] * 3) == Verdict.DIRECTION
