"""Backprop of models in DistributedDataParallel and after fully_shard, in two processes; what is refused there."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import gradcost
from gradcost import Accumulated, Key, Objective, backprop, checkpointed
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.isolation import seeded_generators
from gradcost.training import SGD, Adam, TrainState, checkpoint
from processes import Results, in_processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

KEY = Key(5)
OPTIMIZERS = {"SGD": SGD(0.1), "momentum": SGD(0.1, momentum=0.9), "Adam": Adam(0.01)}
Batch = tuple[Tensor, Tensor]
T = TypeVar("T")


class Block(nn.Module):
    """A block; with `recompute`, it is checkpointed by torch."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.linear, self.recompute = nn.Linear(16, 16), recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return torch_checkpoint(lambda x: torch.tanh(self.linear(x)), x, use_reentrant=False)
        return torch.tanh(self.linear(x))


def made(recompute: bool = False) -> nn.Module:
    with seeded_generators(KEY):
        return nn.Sequential(nn.Linear(6, 16), Block(recompute), Block(recompute), nn.Linear(16, 3))


def ddp(**options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(made(), **options)


def fsdp(recompute: bool = False) -> nn.Module:
    model, mesh = made(recompute), init_device_mesh("cpu", (dist.get_world_size(),))
    for part in model.children():
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WAYS: dict[str, Callable[[], nn.Module]] = {
    "ddp": ddp,
    "ddp, gradients in the buckets": lambda: ddp(gradient_as_bucket_view=True),
    "ddp, unused parameters sought": lambda: ddp(find_unused_parameters=True),
    "fsdp": fsdp,
    "fsdp, blocks recomputed": lambda: fsdp(recompute=True),
}


# The targets of each process that are ignored, of four in two micro-batches.
ALIKE = (slice(3, 4), slice(3, 4))  # sharded processes wait for each other in every forward pass
IGNORED = [ALIKE, (slice(0, 1), slice(3, 4)), (slice(3, 4), slice(2, 4)), (slice(0, 2), slice(1, 2))]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches() -> list[Batch]:
    with seeded_generators(KEY.fold("data")):
        return [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]


def flat(tensors: Any) -> list[float]:
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return torch.cat([tensor.detach().flatten() for tensor in whole]).tolist()


def gradient(model: nn.Module, estimator: Any, batch: Batch) -> list[float]:
    """Return the gradient, once from `estimate` and, by the assertion, the same from `write`."""
    objective = Objective(model, loss)
    estimate = estimator.estimate(objective, batch, KEY)
    found = flat(tensor for _, tensor in estimate.gradient.leaves())
    estimate.gradient.write()
    assert flat(p.grad for p in model.parameters()) == found
    estimator.estimate(objective, batch, KEY)
    assert flat(p.grad for p in model.parameters()) == found, "an estimate leaves .grad as it was"
    return found


def trained(model: nn.Module, data: list[Batch], optimizer: Any) -> list[float]:
    for _ in gradcost.train(Objective(model, loss), data, backprop(), optimizer, KEY, 10):
        pass
    return flat(model.parameters())


def with_statistics() -> nn.Module:
    with seeded_generators(KEY):
        return nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))


def plain_loop(data: list[Batch]) -> list[float]:
    """Return weights and buffers after the training of `trained` with SGD, written by hand."""
    model = with_statistics()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(10):
        optimizer.zero_grad()
        loss(model, data[step % len(data)]).backward()
        optimizer.step()
    return flat([*model.parameters(), *model.buffers()])


def own(batch: Batch) -> Batch:
    rank, count = dist.get_rank(), dist.get_world_size()
    return batch[0][rank::count], batch[1][rank::count]


def refused(run: Callable[[], Any]) -> str:
    try:
        run()
    except (BadInput, Unsupported) as error:
        return str(error)
    return "nothing"


def after(run: Callable[[], T]) -> T | str:
    try:
        return run()
    except Unsupported as error:
        return str(error)


def with_ignored(batch: Batch, places: tuple[slice, slice]) -> Batch:
    """Return the part of this process with targets that are ignored."""
    targets = batch[1].clone()
    targets[places[dist.get_rank() if dist.is_initialized() else 0]] = -100
    return batch[0], targets


def work(folder: Path) -> dict[str, Any]:
    data = [own(batch) for batch in batches()]
    found: dict[str, Any] = {}
    for name, make in WAYS.items():
        estimators = [backprop(), Accumulated(backprop(), 2)] + ([checkpointed()] if name == "ddp" else [])
        found[name] = {
            "gradients": [gradient(make(), estimator, data[0]) for estimator in estimators],
            "weights": {one: trained(make(), data, optimizer) for one, optimizer in OPTIMIZERS.items()},
        }
    model = with_statistics()
    trained(model, data, SGD(0.1))
    found["statistics"] = [flat([*model.parameters(), *model.buffers()]), plain_loop(data)]
    model = ddp()
    objective = Objective(model, loss)
    with model.no_sync():  # pyright: ignore[reportCallIssue]
        found["no_sync"] = refused(lambda: backprop().estimate(objective, data[0], KEY))
    for name, make in WAYS.items():
        objective = Objective(make(), loss)
        broken = (data[0][0] * (nan if dist.get_rank() else 1), data[0][1])
        said = refused(lambda o=objective, b=broken: backprop().estimate(o, b, KEY))
        found[f"{name} not finite"] = said, gradient(objective.model, backprop(), data[0])
    for name, make in WAYS.items():
        found[f"{name} ignored"] = [
            after(lambda m=make, i=ignored: gradient(m(), Accumulated(backprop(), 2), with_ignored(data[0], i)))
            for ignored in ([ALIKE] if name.startswith("fsdp") else IGNORED)
        ]
    static = Objective(ddp(static_graph=True), loss)
    found["static graph"] = refused(lambda: backprop().estimate(static, data[0], KEY))
    for name, model in (("ddp refuses", ddp()), ("fsdp refuses", fsdp())):
        objective = Objective(model, loss)
        methods = (gradcost.mezo(), gradcost.forward_gradient(), gradcost.activity_perturbation())
        found[name] = {
            "estimates": [refused(lambda m=m, o=objective: m.estimate(o, data[0], KEY)) for m in methods],
            "training": [
                refused(lambda m=m, o=objective: list(gradcost.train(o, data, m, SGD(0.1), KEY, 1))) for m in methods
            ],
            "forecast": refused(lambda o=objective: gradcost.forecast(backprop(), o, data[0])),
            "surrogate": refused(lambda o=objective: gradcost.surrogate_loss(backprop(), o, data[0], KEY)),
        }
    found["fsdp refuses"] |= {
        "policy": refused(lambda: checkpointed().estimate(objective, data[0], KEY)),
        "in a loop": refused(lambda: gradcost.checkpointing.apply(objective.model, gradcost.checkpointing.Blocks())),
        "file": refused(lambda: checkpoint.write(folder / "file", TrainState(objective, backprop(), SGD(0.1)))),
    }
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return in_processes(work, tmp_path_factory.mktemp("processes"), 2)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_not_finite_in_one_process_is_an_error_in_all_of_them(way: str, results: Results):
    """One process skipped its step alone, and the averages after it were of two steps."""
    (first, after), (second, after_second) = (result[f"{way} not finite"] for result in results)
    assert "the loss that another process has of this batch is nan" in first
    assert "the loss of this batch is nan" in second
    assert after == after_second


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_with_ignored_targets_have_their_weights_in_each_process(way: str, results: Results):
    """The gradient of the first micro-batch was averaged before it was divided anew, or never averaged."""
    for first, second, places in zip(*(result[f"{way} ignored"] for result in results), IGNORED, strict=False):
        if way.startswith("fsdp"):
            assert "count different numbers of targets" in first
            continue
        assert first == second
        x, y = batches()[0]
        parts = []
        for rank, place in enumerate(places):
            targets = y[rank::2].clone()
            targets[place] = -100
            parts.append(torch.tensor(gradient(made(), backprop(), (x[rank::2], targets))))
        torch.testing.assert_close(torch.tensor(first), (parts[0] + parts[1]) / 2, rtol=0, atol=1e-7)


def test_estimates_that_would_stay_in_their_process_are_refused(results: Results):
    for result in results:
        assert "no_sync() of DistributedDataParallel is on" in result["no_sync"]


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_the_whole_batch(way: str, results: Results):
    expected = torch.tensor(gradient(made(), backprop(), batches()[0]))
    for result in results:
        for found in result[way]["gradients"]:
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_training_gives_the_weights_of_one_process_that_has_all_data(way: str, optimizer: str, results: Results):
    expected = torch.tensor(trained(made(), batches(), OPTIMIZERS[optimizer]))
    first, second = (result[way]["weights"][optimizer] for result in results)
    assert first == second
    torch.testing.assert_close(torch.tensor(first), expected, rtol=0, atol=1e-6)


def test_training_of_a_model_with_batch_norm_has_the_bits_of_a_plain_loop(results: Results):
    for result in results:
        ours, plain = result["statistics"]
        assert ours == plain


def test_estimates_that_would_differ_between_processes_are_refused(results: Results):
    for result in results:
        for name, reason in (
            ("ddp refuses", "averages the processes' gradients"),
            ("fsdp refuses", "only backprop()"),
        ):
            for said in (*result[name]["estimates"], *result[name]["training"]):
                assert reason in said
                assert "BatchParallel or DirectionParallel" in said
            assert "static_graph=False" in result["static graph"]
            assert "a forecast simulates one process" in result[name]["forecast"]
            assert "backward pass" in result[name]["surrogate"]


def test_what_needs_whole_parameters_is_refused_for_sharded_ones(results: Results):
    for result in results:
        said = result["fsdp refuses"]
        assert "`0.weight` is sharded over processes" in said["policy"]
        assert "torch.utils.checkpoint" in said["policy"]
        assert "checkpoint serves whole parameters" in said["in a loop"]
        assert "torch.distributed.checkpoint" in said["file"]
