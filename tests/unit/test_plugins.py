"""Plug-ins: the methods, directions, optimizers and tasks of another package are found by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradcost
from gradcost.cli import plugins, spec
from gradcost.core.errors import BadInput
from gradcost.studies import environment
from gradcost.studies.trial import Trial
from gradcost.tasks import Digits
from in_process import inside

METHODS = '''
"""Methods of another package."""
from __future__ import annotations

import gradcost
from gradcost.core import value
from gradcost.directions import Directions, Rademacher
from gradcost.estimators import Estimator, Facts, replayed
from gradcost.tasks import Digits as _Digits
from gradcost.training import SGD, Optimizer


@value
class Halved(Estimator):
    """Backprop, on half of the weights. Law: biased."""

    @property
    def facts(self):
        return Facts()

    def init(self, objective):
        return None

    def estimate(self, objective, batch, key, state=None):
        return gradcost.backprop().estimate(objective, batch, key)

    def stream(self, objective, batch, key, use, state=None):
        return replayed(self.estimate(objective, batch, key), use)

    def objection(self, objective, batch):
        return None


@value
class Flipped(Directions):
    """Rademacher directions with the other sign."""

    unbiased = True

    def seeds(self, key, probes, dimension):
        return Rademacher().seeds(key, probes, dimension)

    def add(self, base, leaf, seeds, scales, in_place=False):
        return Rademacher().add(base, leaf, seeds, [-scale for scale in scales], in_place)


def flipped_spsa(eps: float = 1e-3) -> Estimator:
    """Zero-order with flipped directions. Source: none."""
    return gradcost.Probing(gradcost.CentralDifference(eps), Flipped())


@value
class Slow(Optimizer):
    """A tenth of gradient descent."""

    lr: float
    decay: float = 0.0

    def build(self, leaves):
        return SGD(0.1 * self.lr).build(leaves)


@value
class SmallDigits:
    """Four digits at a time."""

    steps = 5

    def objective(self, key):
        return _Digits(batch=4).objective(key)

    def batch_at(self, key, step):
        return _Digits(batch=4).batch_at(key, step)

    def splits(self):
        return _Digits(batch=4).splits()

    def score(self, model, split):
        return _Digits(batch=4).score(model, split)


def helper():
    return 1
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package: a module, and the metadata with the entry point."""
    (tmp_path / "their_methods.py").write_text(METHODS)
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[gradcost.plugins]\nmine = their_methods\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._modules.cache_clear()
    yield tmp_path
    plugins._modules.cache_clear()
    sys.modules.pop("their_methods", None)


def test_the_parts_of_a_plug_in_parse_and_read_back(package: Path):
    for text in ("Halved()", "flipped_spsa(eps=0.01)", "Clipped(flipped_spsa())"):
        estimator = spec.method(text)
        assert spec.method(repr(estimator)) == estimator
    assert repr(spec.method("flipped_spsa()")).count("Flipped()") == 1
    assert repr(spec.optimizer("Slow(lr=0.5)")) == "Slow(lr=0.5, decay=0.0)"
    task, name, _, _ = spec.task("SmallDigits")
    assert (repr(task), name) == ("SmallDigits()", "smalldigits")
    assert set(plugins.added(["method"], ())) == {"Halved", "Flipped", "flipped_spsa"}
    assert "helper" not in spec.names("method")


def test_check_runs_the_laws_on_it_and_the_lists_contain_it(package: Path):
    ran = inside("check", "flipped_spsa()", "--draws", "8", "--json", folder=package)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert json.loads(ran.stdout)["ok"]
    listed = json.loads(inside("methods", "--json", folder=package).stdout)
    kinds = {entry["name"]: entry["kind"] for entry in listed}
    assert (kinds["Halved"], kinds["Flipped"], kinds["flipped_spsa"]) == ("estimator", "directions", "preset")
    assert "SmallDigits" in inside("tasks", folder=package).stdout


def test_trials_run_again_after_a_change_of_the_plug_in(package: Path):
    def names() -> list[str]:
        for cached in (environment._plug_in_packages, environment._stamp):
            cached.cache_clear()
        estimators = (spec.method("flipped_spsa()"), spec.method("Halved()"), gradcost.backprop())
        return [Trial(Digits(), "a", estimator, gradcost.SGD(0.1), 5).name("code") for estimator in estimators]

    before = names()
    file = package / "their_methods.py"
    file.write_text(file.read_text() + "\n# a comment changes nothing\n")
    assert names() == before
    file.write_text(file.read_text().replace("return 1", "return 2"))
    after = names()
    assert (after[0] != before[0], after[1] != before[1], after[2] == before[2]) == (True, True, True)


def test_without_plug_ins_nothing_is_added():
    assert plugins.added(["method", "optimizer", "task"], ()) == {}


@pytest.mark.parametrize(
    ("content", "entry", "message"),
    [
        (
            "raise RuntimeError('broken')",
            "their_methods",
            r"mine \(their_methods\) could not be imported: RuntimeErr",
        ),
        (METHODS.replace("flipped_spsa", "mezo"), "their_methods", "defines mezo, which exists already"),
        (METHODS, "their_methods:helper", "must name a module"),
        (METHODS, "no_such_module", "ModuleNotFoundError"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_named(package: Path, content: str, entry: str, message: str):
    (package / "their_methods.py").write_text(content)
    (package / "theirs-1.0.dist-info" / "entry_points.txt").write_text(f"[gradcost.plugins]\nmine = {entry}\n")
    with pytest.raises(BadInput, match=message):
        spec.method("mezo()")
