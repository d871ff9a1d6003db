"""Seconds from counts: the sum that it is, what is calibrated, and what is remembered."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gradcost.cli.main import app
from gradcost.instruments.flops import Counts
from gradcost.noise.philox import Normals, Signs
from gradcost.planning import roofline
from gradcost.planning.roofline import Rates, calibrate, device_name, seconds, store_rates, stored_rates

RATES = Rates("a machine", 2, {"float32": 1e9, "bfloat16": 4e9}, 1e8, 1e-6, 1e7, 4e7)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADCOST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def here() -> Rates:
    return replace(RATES, device=device_name(), threads=torch.get_num_threads())


def test_each_operation_takes_its_overhead_and_the_longer_of_computing_and_moving():
    counts = Counts(work=Counter({(10**9, 10): 2, (10, 10**8): 3, (0, 0): 5}), drawn=10**7)
    assert seconds(counts, RATES, torch.float32) == pytest.approx(2 * 1.0 + 3 * 1.0 + 10 * 1e-6 + 1.0)
    assert seconds(counts, RATES, torch.bfloat16, Normals()) == pytest.approx(2 / 4 + 3 + 10 * 1e-6 + 1)
    assert seconds(counts, RATES, torch.bfloat16, Signs()) == pytest.approx(2 / 4 + 3 + 10 * 1e-6 + 1 / 4)
    assert seconds(Counts(), RATES, torch.float32) == 0


def test_a_dtype_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"float64 matrix products was not measured on a machine.*float32, bfloat16"):
        seconds(Counts(), RATES, torch.float64)


def test_a_calibration_finds_positive_rates_of_this_machine():
    rates = calibrate(seconds=0.06)
    assert (rates.device, rates.threads) == (device_name(), torch.get_num_threads())
    assert set(rates.matmul) == {"float32", "bfloat16"}
    figures = [*rates.matmul.values(), rates.copy, rates.overhead, rates.normals, rates.signs]
    assert all(figure > 0 for figure in figures)
    assert rates.overhead < 1e-2


def test_rates_are_remembered_by_machine_and_thread_count(cache: Path):
    assert stored_rates() is None
    mine, other = here(), replace(here(), device="another machine")
    assert store_rates(other) == store_rates(mine) == cache / "rates.json"
    assert stored_rates() == mine
    assert len(json.loads((cache / "rates.json").read_text())) == 2
    assert [path.name for path in cache.iterdir()] == ["rates.json"]
    store_rates(replace(mine, threads=mine.threads + 1))
    assert stored_rates() == mine


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"a": 1}'])
def test_an_unreadable_file_counts_as_none_and_is_written_anew(cache: Path, damage: str):
    store_rates(here())
    (cache / "rates.json").write_text(damage)
    assert stored_rates() is None
    store_rates(here())
    assert stored_rates() == here()


def test_an_entry_of_another_version_counts_as_none(cache: Path):
    path = store_rates(here())
    document = {place: {"device": "x"} for place in json.loads(path.read_text())}
    path.write_text(json.dumps(document))
    assert stored_rates() is None
    path.write_text(json.dumps(dict.fromkeys(document)))
    assert stored_rates() is None


def test_a_write_that_fails_leaves_what_was_there(cache: Path, monkeypatch: pytest.MonkeyPatch):
    store_rates(here())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        store_rates(replace(here(), copy=1.0))
    assert stored_rates() == here()
    assert [path.name for path in cache.iterdir()] == ["rates.json"]


def test_the_doctor_calibrates_and_remembers(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "calibrate", here)
    ran = CliRunner().invoke(app, ["doctor", "--calibrate"])
    assert ran.exit_code == 0
    assert "1.0 GFLOP/s" in ran.stdout
    assert stored_rates() == here()
    ran = CliRunner().invoke(app, ["doctor", "--calibrate", "--json"])
    assert json.loads(ran.stdout)["rates"]["copy"] == 1e8
    assert "rates" not in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
