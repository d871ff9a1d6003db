"""The page on when anything beats checkpointed backprop is what its script makes of the committed records."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def crossover() -> Any:
    spec = importlib.util.spec_from_file_location("crossover", FOLDER / "crossover.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["crossover"] = module  # typing.NamedTuple looks its module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["crossover"]


@pytest.mark.filterwarnings("ignore")
def test_the_page_is_what_the_records_say(crossover: Any):
    steps, costs = [*crossover.measured()], [*crossover.models()]
    page = (FOLDER / "crossover.md").read_text("utf-8")
    assert page == crossover.page(steps, costs)
    ranks = [
        row.rank for row in steps if row.study in crossover.ADAPTERS and row.directions == 1 and not row.is_bound
    ]
    fewest, widest = crossover.fewest_workers(min(ranks), costs), max(m.exact / m.least for m in costs)
    index = (FOLDER / "index.md").read_text("utf-8")
    assert f"at most {widest:.2f} times it" in index
    assert f"from {fewest:.0f} workers on" in index


@pytest.mark.filterwarnings("ignore")
def test_at_the_number_of_workers_both_take_the_same_time(crossover: Any):
    """Time of a step with the workers, times the steps by the law, is at most that of backprop; one fewer is more."""
    for model in crossover.models():
        for rank in (7.0, 52.85, 165.0):
            workers = model.workers(rank)
            assert 1 + (rank + 1) / workers <= model.advantage * (1 + 1e-12)
            assert 1 + (rank + 1) / (workers - 1) > model.advantage


@pytest.mark.filterwarnings("ignore")
def test_a_method_that_reaches_no_target_gives_a_bound(crossover: Any):
    bounds = [row for row in crossover.measured() if row.is_bound]
    assert {row.study for row in bounds} == {"MiniLM on TREC, 11,526 weights"}
    for row in bounds:
        assert row.ratio.low == row.ratio.median > 1
        assert math.isinf(row.ratio.high)
