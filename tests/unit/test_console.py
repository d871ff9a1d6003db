"""The progress that a comparison prints."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from gradcost.cli import console
from gradcost.cli.answer import _doubts
from gradcost.core.metric import ACCURACY
from gradcost.results.records import Cost, TrialRecord

TRIAL = TrialRecord("id", "a", "backprop()", "SGD(0.1)", "tune", 0.1, 0, "finished", 5)


def test_what_is_left_is_estimated_from_each_methods_own_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board = console.Board(None, {"a": 4, "b": 3}, {"a": 1}, ACCURACY)
    for method, seconds, now, left in (
        ("a", 10.0, 110.0, "2/7"),  # b is unknown
        ("b", 30.0, 120.0, "3/7, about 40 s left"),  # 2 x 10 s and 2 x 30 s, two at once
    ):
        clock[0] = now
        board.finished(replace(TRIAL, method=method, seconds=seconds))
        assert f"(all trials {left})" in capsys.readouterr().err


def test_a_trial_without_seconds_is_no_error(capsys: pytest.CaptureFixture[str]):
    console.Board(None, {"a": 1}, {}, ACCURACY).finished(TRIAL)
    assert "a  1/1  tune lr 0.1 seed 0: finished   (all trials 1/1, about 0 s left)" in capsys.readouterr().err


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int) -> list[str]:
    monkeypatch.setattr(console, "out", Console(soft_wrap=True, highlight=False, emoji=False, width=columns))
    console.show_table(
        ["method", "test acc", "beyond weights"], [["forward_gradient()", "88.0 [84.7, 88.3]", "64 KiB"]]
    )
    return capsys.readouterr().out.splitlines()


def test_a_narrow_screen_gets_one_block_a_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert shown(monkeypatch, capsys, 40) == [
        "forward_gradient()",
        "    test acc        88.0 [84.7, 88.3]",
        "    beyond weights  64 KiB",
    ]
    assert [line.rstrip() for line in shown(monkeypatch, capsys, 79)] == [
        "method                        test acc   beyond weights",
        "forward_gradient()   88.0 [84.7, 88.3]           64 KiB",
    ]


def test_piped_output_obeys_columns():
    code = "from gradcost.cli import console\nprint(console.out.width)"
    command = [sys.executable, "-c", code]
    for columns, width in (("110", "110"), ("", "240")):
        environment = os.environ | {"COLUMNS": columns}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == width


def test_doubtful_timings_are_one_line():
    busy = "other programs used {} cores during the timing; time it again on an idle machine"
    costs = [Cost("a", "", doubt=busy.format("1.4")), Cost("b", "", doubt=busy.format("0.9"))]
    assert _doubts(costs) == (
        "~ a and b: other programs used 0.9 to 1.4 cores during the timing. On an idle machine, the same command "
        "times them again."
    )
    one = busy.format("1.0").replace("cores", "core")
    assert "used 0.9 to 1.0 cores" in _doubts([Cost("a", "", doubt=one), Cost("b", "", doubt=busy.format("0.9"))])
    assert _doubts([Cost("a", "", doubt="the samples are too few")]).startswith("~ a: the samples are too few. On an")


def test_a_failed_trial_says_why_in_its_line():
    failed = replace(TRIAL, status="failed", reason="RuntimeError: no luck\nmore")
    assert console.trial_line(failed) == "tune lr 0.1 seed 0: failed, RuntimeError: no luck"
