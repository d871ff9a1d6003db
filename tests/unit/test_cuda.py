"""On a GPU: the noise of a CPU bit for bit, the same estimates up to rounding, and memory as forecast."""

from __future__ import annotations

import copy
import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcost
from gradcost import SGD, AdamW, Key, forecast
from gradcost.core.objective import Objective
from gradcost.core.pytree import tree_map
from gradcost.instruments.cuda_allocator import WORKSPACES
from gradcost.noise import add as noise
from gradcost.noise import philox
from gradcost.tasks import placed
from gradcost.training.train_state import TrainState
from presets_under_test import METHODS, Points
from tables import ESTIMATORS, OBJECTIVES, grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# First index, elements and directions: the ends of blocks and programs, and counters beyond 32 bits.
PIECES = [(0, 1, 1), (0, 5000, 1), (12345, 3000, 3), (2**34 - 3, 2048, 2), (2**45 + 7, 300_001, 4), (5, 0, 1)]


def on_gpu(made: Any) -> Any:
    return tree_map(lambda leaf: leaf.cuda() if isinstance(leaf, Tensor) else leaf, made)


def moved(objective: Objective, batch: Any) -> Objective:
    return Objective(copy.deepcopy(objective.model).cuda(), objective.loss, data=lambda: [batch])


# ---- noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", [philox.Signs(), philox.Normals()], ids=repr)
def test_noise_is_that_of_a_cpu_bit_for_bit(stream: philox.Stream, dtype: torch.dtype):
    assert noise.has_gpu_path()
    generator = random.Random(1)
    for start, count, directions in PIECES:
        seeds = [generator.randrange(2**64) for _ in range(directions)]
        scales = [0.1 * number - 0.0371 for number in range(directions)]
        base = torch.linspace(-1, 1, count, dtype=torch.float64).to(dtype)
        found = noise.add_noise(stream, seeds, scales, start, base.cuda())
        assert torch.equal(found.cpu(), noise.add_noise(stream, seeds, scales, start, base))
        found = noise.noise(stream, seeds, scales, start, base.cuda())
        assert torch.equal(found.cpu(), noise.noise(stream, seeds, scales, start, base))


@pytest.mark.parametrize("stream", [philox.Signs(), philox.Normals()], ids=repr)
def test_the_reference_on_a_gpu_is_the_compiled_kernel(stream: philox.Stream):
    base = torch.linspace(-1, 1, 200_003, device="cuda")
    found, expected = torch.empty_like(base), torch.empty_like(base)
    noise.on_gpu(stream, [3, 4], [0.1, 0.2], 77, base, found)
    noise.reference(stream, [3, 4], [0.1, 0.2], 77, base, expected)
    assert torch.equal(found, expected)


# ---- estimates


@grid(lambda estimator, objective: not OBJECTIVES[objective].draws)
def test_an_estimate_is_that_of_a_cpu(estimator: str, objective: str):
    """In float64, where matrix products differ by rounding only. A loss that draws takes other numbers on a GPU."""
    made, batch = OBJECTIVES[objective].make(torch.float64)
    expected, there = ESTIMATORS[estimator].estimator.estimate(made, batch, Key(6)), on_gpu(batch)
    found = ESTIMATORS[estimator].estimator.estimate(moved(made, there), there, Key(6))
    assert torch.allclose(found.loss.cpu(), expected.loss, rtol=1e-9)
    leaves = [
        (name, leaf, other)
        for (name, leaf), (_, other) in zip(found.gradient.leaves(), expected.gradient.leaves(), strict=True)
    ]
    largest = max(float(other.abs().max()) for _, _, other in leaves if other is not None)
    for name, leaf, other in leaves:
        assert (leaf is None) == (other is None), name
        if leaf is not None and other is not None:
            assert torch.allclose(leaf.cpu(), other, rtol=1e-5, atol=1e-7 * largest), name


def deep() -> tuple[Objective, Any]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)]
    model = nn.Sequential(nn.Linear(8, 64), *layers, nn.Linear(64, 3)).cuda()
    batch = torch.randn(32, 8, device="cuda"), torch.randint(0, 3, (32,), device="cuda")
    return Objective(model, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])), batch


def test_recomputation_gives_the_bits_of_backprop_with_dropout():
    objective, batch = deep()
    one, other = (each.estimate(objective, batch, Key(1)) for each in (gradcost.backprop(), gradcost.checkpointed()))
    for (name, leaf), (_, again) in zip(one.gradient.leaves(), other.gradient.leaves(), strict=True):
        assert leaf is not None, name
        assert again is not None, name
        assert torch.equal(leaf, again), name


def test_an_estimate_leaves_the_generators_of_the_gpu_as_they_were():
    objective, batch = deep()
    before = torch.cuda.get_rng_state()
    for estimator in (gradcost.backprop(), gradcost.checkpointed(), gradcost.forward_gradient(), gradcost.mezo()):
        estimator.estimate(objective, batch, Key(1))
        assert torch.equal(torch.cuda.get_rng_state(), before), estimator


# ---- training


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_trains_as_on_a_cpu(name: str):
    losses = []
    for device in ("cpu", "cuda"):
        task = placed(Points(), device)
        state = TrainState(task.objective(Key(0)), METHODS[name], SGD(1e-3))
        losses.append([float(state.step(task.batch_at(Key(0), step), Key(step)).loss) for step in range(5)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("name", ["backprop", "checkpointed", "forward_gradient", "mezo"])
@pytest.mark.parametrize("optimizer", [SGD(1e-3), AdamW(1e-3)], ids=lambda optimizer: type(optimizer).__name__)
def test_a_step_allocates_what_is_forecast(name: str, optimizer: Any):
    """Beside the workspaces of cuBLAS, one for each thread that multiplies matrices."""
    torch._C._cuda_clearCublasWorkspaces()
    gc.collect()
    before = requested("current")
    objective, batch = deep()
    state = TrainState(objective, METHODS[name], optimizer)
    for step in range(2):
        state.step(batch, Key(step))
    torch.cuda.reset_peak_memory_stats()
    state.step(batch, Key(2))
    found = requested("peak") - before
    held = requested("current")
    torch._C._cuda_clearCublasWorkspaces()
    workspaces = held - requested("current")
    told = forecast(METHODS[name], objective, batch, optimizer, "cuda").cuda
    assert told is not None
    assert found - workspaces - told.requested in (0, 1 << 20)  # cublasLt has a workspace of its own
    assert workspaces + (1 << 20) <= WORKSPACES[1]


def requested(kind: str) -> int:
    return torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]


def test_a_comparison_runs_on_a_gpu(tmp_path: Path):
    methods = [gradcost.backprop(), gradcost.mezo()]
    quick: Any = {"steps": 20, "tuning_points": 2, "extra_points": 0, "confirm_seeds": 0, "seeds": 2}
    results = gradcost.compare(
        Points(), methods, lr_range=(0.01, 0.1), device="cuda", folder=tmp_path / "results", workers=2, **quick
    )
    assert [trial.phase for trial in results.trials].count("final") == 4
