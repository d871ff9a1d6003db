"""How a study judges the estimates of its methods: against the gradient, beside the theory, once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gradcost import SGD, Clipped, backprop, forward_gradient, mezo
from gradcost.directions import Orthogonal
from gradcost.estimators.probing import Probing
from gradcost.results.records import Quality, read
from gradcost.slopes.slope import Jvp
from gradcost.studies import Comparison, quality
from gradcost.studies.folder import open_folder
from gradcost.tasks import Digits

METHODS = {
    "backprop": backprop(),
    "forward 1": forward_gradient(1),
    "forward 16": forward_gradient(16),
    "orthogonal 16": Probing(Jvp(), Orthogonal(), 16),
    "clipped": Clipped(forward_gradient(4), 1e-4),
    "mezo": mezo(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    comparison = Comparison(Digits(), tuple(METHODS.items()), (0.1,), 1, (1,), 0.9)
    made = tmp_path_factory.mktemp("judged")
    open_folder(made, comparison.document("digits", "mlp"), comparison.code)
    assert list(quality.assess_methods(Digits(), comparison.with_optimizers, made)) == [
        name for name in METHODS if name != "backprop"
    ]
    return made


def judged(folder: Path) -> dict[str, Quality]:
    return {found.method: found for found in read(folder).qualities}


@pytest.mark.parametrize("method", ["forward 1", "forward 16", "orthogonal 16", "mezo"])
def test_cosine_and_error_are_what_theory_expects(folder: Path, method: str):
    found = judged(folder)[method]
    theory = found.theory
    assert theory is not None
    at = theory["probes"].index(found.probes)
    for what in ("cosine", "error"):
        value, spread, expected = getattr(found, what), getattr(found, f"{what}_se"), theory[what][at]
        assert expected is not None
        # A share of the variance that theory leaves open: the spread of 32 draws is itself uncertain by an eighth.
        assert abs(value - expected) < 4 * max(spread, expected * math.sqrt(2 / (found.probes * found.draws)))


def test_what_theory_does_not_know_is_measured_alone(folder: Path):
    clipped = judged(folder)["clipped"]
    assert clipped.theory is None
    assert clipped.error == pytest.approx(1.0, abs=0.05), "slopes cut to 1e-4 leave the gradient itself as the error"


def test_estimates_that_are_not_finite_are_on_record_and_stop_nothing(tmp_path: Path):
    comparison = Comparison(Digits(), (("far", mezo(eps=1e30)), ("mezo", mezo())), (0.1,), 1, (1,), 0.9)
    open_folder(tmp_path, comparison.document("digits", "mlp"), comparison.code)
    assert list(quality.assess_methods(Digits(), comparison.with_optimizers, tmp_path, draws=3)) == ["far", "mezo"]
    far, near = read(tmp_path).qualities
    assert far.error is None
    assert near.error is not None


def test_a_method_is_judged_once(folder: Path):
    before = (folder / "records.jsonl").read_bytes()
    methods = {name: (estimator, SGD(1.0)) for name, estimator in METHODS.items()}
    assert list(quality.assess_methods(Digits(), methods, folder)) == []
    assert (folder / "records.jsonl").read_bytes() == before
    methods["forward 2"] = (forward_gradient(2), SGD(1.0))
    assert list(quality.assess_methods(Digits(), methods, folder, draws=2)) == ["forward 2"]
