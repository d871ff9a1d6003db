"""The progress that a comparison prints."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gradcost.cli import console
from gradcost.core.metric import ACCURACY
from gradcost.results.records import TrialRecord

TRIAL = TrialRecord("id", "a", "backprop()", "SGD(0.1)", "tune", 0.1, 0, "finished", 5)


def test_what_is_left_is_estimated_from_each_methods_own_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board = console.Board(None, {"a": 4, "b": 3}, {"a": 1}, ACCURACY)
    for method, seconds, now, left in (
        ("a", 10.0, 110.0, "2/7, about 50 s left"),  # 2 of a and 3 of b at 10 s, as b is unknown
        ("b", 30.0, 120.0, "3/7, about 40 s left"),  # 2 x 10 s and 2 x 30 s, two at once
    ):
        clock[0] = now
        board.finished(replace(TRIAL, method=method, seconds=seconds))
        assert f"(all trials {left})" in capsys.readouterr().err


def test_a_trial_without_seconds_is_no_error(capsys: pytest.CaptureFixture[str]):
    console.Board(None, {"a": 1}, {}, ACCURACY).finished(TRIAL)
    assert "a  1/1  tune lr 0.1 seed 0: finished   (all trials 1/1, about 0 s left)" in capsys.readouterr().err
