"""Law 6. The same key gives the same estimate, bit for bit: in every process, on any thread count, on either path."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import sphere
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import Probing
from gradcost.noise import add as noise
from gradcost.slopes.slope import CentralDifference, Jvp
from snapshot import bits
from tables import DIRECTIONS, ESTIMATORS, OBJECTIVES, REPRESENTATIVE, grid, pairs

KEY = Key(6)
TESTS = Path(__file__).parent.parent
# What two processes estimate: every row on one objective, and a row of each kind on its others.
BOTH = [(estimator, of) for estimator, of in pairs() if of == "mlp" or estimator in REPRESENTATIVE]


def digest(estimator: str, objective: str, key: Key = KEY) -> str:
    """Return a hash of all bits of an estimate: loss, slopes and every leaf."""
    made, batch = OBJECTIVES[objective].make()
    found = ESTIMATORS[estimator].estimator.estimate(made, batch, key)
    seen = hashlib.blake2b(digest_size=8)
    for tensor in (found.loss, found.slopes, *(leaf for _, leaf in found.gradient.leaves())):
        seen.update(bits(tensor) or b"none")
    return seen.hexdigest()


@functools.cache
def digest_after_seed_1(estimator: str, objective: str) -> str:
    torch.manual_seed(1)
    return digest(estimator, objective)


def test_two_processes_make_the_same_estimates():
    """With another seed of Python's hashes, and the estimates in another order."""
    code = (
        "from laws.test_law_06_same_key import BOTH, digest\n"
        "for e, o in reversed(BOTH): print(f'{e} of {o}', digest(e, o), sep='\\t')"
    )
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "271828", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    there = dict(line.split("\t") for line in ran.stdout.splitlines())
    assert there == {f"{e} of {o}": digest_after_seed_1(e, o) for e, o in BOTH}


@grid()
def test_the_global_generators_do_not_matter(estimator: str, objective: str):
    one = digest_after_seed_1(estimator, objective)
    torch.manual_seed(2)
    assert digest(estimator, objective) == one


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name.split("-")[0] in DIRECTIONS])
def test_another_key_is_another_estimate(estimator: str):
    assert digest(estimator, "mlp", Key(0)) != digest(estimator, "mlp", Key(1))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def wide(dtype: torch.dtype = torch.float32) -> Objective:
    """Leaves below and above the size from which several threads make noise, at odd offsets."""
    model = nn.Module()
    for number, size in enumerate([(3,), (700, 401), (5, 7), (300_001,)]):
        model.register_parameter(f"p{number}", nn.Parameter(torch.zeros(size, dtype=dtype)))
    return Objective(model, lambda model, batch: torch.zeros(()))


REPLAYS = {  # constants: a change here changes every seeded gradient that was ever logged
    "gaussian": "526d7306d572fbdb",
    "rademacher": "79869869127b3890",
    "sphere": "0160da8257d8950b",
    "coordinates": "0cc6ca4856cdae03",
    "orthogonal": "b0621163d025ecc0",
    "lowrank": "02efa321408724a9",
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_replay_is_the_same_bits_on_any_number_of_threads(name: str, threads: int):
    objective = wide()
    seeds = DIRECTIONS[name].seeds(KEY, 3, objective.dimension)
    gradient = Seeded(objective, DIRECTIONS[name], seeds, (0.5, -0.25, 3.0))
    seen = hashlib.blake2b(b"".join(bits(leaf) or b"" for _, leaf in gradient.leaves()), digest_size=8)
    assert seen.hexdigest() == REPLAYS[name]


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_is_the_same_bits_on_the_fused_and_the_reference_path(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    objective = wide(dtype)
    seeds = DIRECTIONS[name].seeds(KEY, 2, objective.dimension)
    gradient = Seeded(objective, DIRECTIONS[name], seeds, (0.5, -0.3))
    assert noise.has_fused_path(), "the tests need numba: without it both paths are one"
    fused = [bits(leaf) for _, leaf in gradient.leaves()]
    monkeypatch.setattr(noise, "has_fused_path", lambda: False)
    sphere._norm.cache_clear()
    assert [bits(leaf) for _, leaf in gradient.leaves()] == fused


@pytest.mark.parametrize("slope", [CentralDifference(), Jvp(together=3)], ids=repr)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_an_estimate_is_the_same_bits_on_the_fused_and_the_reference_path(
    name: str, slope: CentralDifference | Jvp, monkeypatch: pytest.MonkeyPatch
):
    def estimate() -> list[bytes | None]:
        made, batch = OBJECTIVES["transformer"].make()
        found = Probing(slope, DIRECTIONS[name], 3).estimate(made, batch, KEY)
        return [bits(found.loss), bits(found.slopes)] + [bits(leaf) for _, leaf in found.gradient.leaves()]

    fused = estimate()
    monkeypatch.setattr(noise, "has_fused_path", lambda: False)
    sphere._norm.cache_clear()
    assert estimate() == fused
