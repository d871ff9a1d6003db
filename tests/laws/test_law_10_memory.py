"""Law 10. Memory is exact too: the forecast, on fake tensors, equals the tracked peak of the real step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import gradcost
from gradcost.checkpointing.policies import Attention, Matmuls, Schedule, Segments, Selective
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Coordinates, Gaussian, Rademacher, Sphere
from gradcost.directions.groups import EachBlock
from gradcost.directions.guided import Guided
from gradcost.directions.layerwise import Layerwise
from gradcost.directions.low_rank import LazyLowRank, LowRank
from gradcost.directions.masks import Fixed, Masked, Named, Random, Smallest
from gradcost.directions.orthogonal import Orthogonal
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.activity import ActivityPerturbation
from gradcost.estimators.adaptive import Adaptive, Flattest
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.hessian_informed import HessianInformed
from gradcost.estimators.mixed import Mixed
from gradcost.estimators.momentum import Momentum
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.variance_reduced import VarianceReduced
from gradcost.instruments.flops import Counts, OpCounter
from gradcost.instruments.memory import Memory, MemoryTracker
from gradcost.planning.forecast import forecast
from gradcost.planning.within import MemoryTradeoff, Within
from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp
from gradcost.tasks.architectures import Cnn, Gpt, Mlp
from gradcost.training.optimizers import SGD, AdamW, Optimizer
from gradcost.training.rounding import Master, StochasticallyRounded
from gradcost.training.train_state import TrainState
from tables import cross_entropy

KEY = Key(10)
Made = tuple[Objective, Any]


# ---- models


def mlp() -> Made:
    model = Mlp(hidden=(24, 24, 24)).build((12,), 5)
    return Objective(model, cross_entropy), (torch.randn(8, 12), torch.randint(5, (8,)))


def cnn() -> Made:
    model = Cnn(channels=4, dense=16).build((1, 16, 16), 10)
    return Objective(model, cross_entropy), (torch.randn(8, 1, 16, 16), torch.randint(10, (8,)))


def gpt() -> Made:
    words = torch.randint(31, (8, 10))
    return Objective(Gpt(layers=3, width=16, heads=2).build((9,), 31), cross_entropy), (words[:, :-1], words[:, 1:])


TINY: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}


def bert() -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**TINY, num_attention_heads=2, num_hidden_layers=2))
    words = torch.randint(31, (8, 9))
    mask = torch.ones_like(words)
    mask[1, 5:] = 0  # padding changes the path that attention takes
    batch = {"input_ids": words, "attention_mask": mask, "labels": torch.randint(2, (8,))}
    return Objective(model, lambda model, batch: model(**batch).loss), batch


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, use_cache=False)
    words = torch.randint(31, (8, 9))
    batch = {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words}
    return Objective(LlamaForCausalLM(config), lambda model, batch: model(**batch).loss), batch


TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
MODELS: dict[str, Callable[[], Made]] = {make.__name__: make for make in (mlp, cnn, gpt, bert, llama)}


def made(name: str, dtype: torch.dtype) -> Made:
    with seeded_generators(Key(1)):
        objective, batch = MODELS[name]()
    objective.model.to(dtype)
    batch = pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)
    return replace(objective, data=lambda: [batch]), batch


# ---- methods

PRESETS: dict[str, Estimator] = {
    "backprop": gradcost.backprop(),
    "checkpointed": gradcost.checkpointed(),
    "segments": Reverse(Segments(2)),
    "selective": Reverse(Selective((Matmuls(), Attention()))),
    "forward_gradient": gradcost.forward_gradient(),
    "forward_gradient2": gradcost.forward_gradient(2),
    "together2": Probing(Jvp(2), probes=2),
    "spsa": gradcost.spsa(),
    "spsa2": gradcost.spsa(probes=2),
    "mezo": gradcost.mezo(),
    "mezo2": gradcost.mezo(probes=2),
}
OTHERS: dict[str, Estimator] = {
    "chosen eps": Probing(CentralDifference(), Gaussian(), 2),
    "sphere": Probing(ForwardDifference(), Sphere(), 2),
    "coordinates": Probing(Jvp(2), Coordinates(), 2),
    "clipped": Clipped(Probing(Jvp(), Gaussian(), 2), 0.1),
    "rademacher": Probing(Jvp(), Rademacher()),
    "svrg": VarianceReduced(Probing(ForwardDifference(), Gaussian(), 2)),
    "svrg-each-step": VarianceReduced(Probing(Jvp(), Rademacher()), 1),
    "svrg-anchored": VarianceReduced(gradcost.mezo(), 1, Reverse()),
    "svrg-reverse": VarianceReduced(Reverse()),
    "momentum": Momentum(gradcost.mezo(), window=2),  # which is full at the second step
    "mixed": Mixed("*bias", Reverse(), gradcost.mezo()),
    "masked-smallest": Probing(Jvp(2), Masked(Smallest(0.3)), 3),
    "masked-random": Probing(ForwardDifference(), Masked(Random(0.5)), 2),
    "masked-fixed": Probing(Jvp(), Masked(Fixed(0.5)), 2),
    "masked-named": Probing(ForwardDifference(), Masked(Named("*weight"))),
    # One forward pass for as many probes as groups: the cost of a single probe depends on its group.
    "layerwise": Probing(Jvp(4), Layerwise(by=EachBlock()), 4),
    "layerwise-forward": Probing(ForwardDifference(), Layerwise(by=EachBlock()), 4),
    "guided": Probing(Jvp(), Guided(), 2),
    "orthogonal": Probing(Jvp(2), Orthogonal(), 3),
    "orthogonal-forward": Probing(ForwardDifference(), Orthogonal(), 2),
    "lowrank": Probing(Jvp(2), LowRank(2), 3),
    "lowrank-forward": Probing(ForwardDifference(), LowRank(2), 2),
    "lazy-lowrank": Probing(Jvp(), LazyLowRank(every=2), 2),
    "guided-forward": Probing(ForwardDifference(), Guided(Rademacher()), 2),
}
OTHERS |= {
    "adaptive": Adaptive(gradcost.mezo(), 2),
    "adaptive-jvp": Adaptive(gradcost.forward_gradient(), 3, Flattest(), EachBlock()),
    "hessian-informed": HessianInformed(probes=2),
    "activity": ActivityPerturbation(probes=2),
    "activity-central": ActivityPerturbation(CentralDifference(1e-3), Rademacher()),
}
OPTIMIZERS: dict[str, Optimizer] = {"sgd": SGD(1e-3), "adamw": AdamW(1e-3)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One cell of the product of models, methods, micro-batches, precisions and optimizers."""

    model: str
    method: str
    parts: int
    dtype: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.model}-{self.method}-{self.parts}-{self.dtype}-{self.optimizer}"

    def estimator(self) -> Estimator:
        found = PRESETS[self.method]
        return found if self.parts == 1 else Accumulated(found, self.parts)


EVERY = [Case(*cell) for cell in itertools.product(MODELS, PRESETS, (1, 2), DTYPES, OPTIMIZERS)]
# What runs by default: every third pair of model and method, each with the next of the eight other combinations.
SOME = [case for number, case in enumerate(EVERY) if number // 8 % 3 == 0 and number % 8 == number // 24 % 8]


def tracked(
    estimator: Estimator, objective: Objective, batch: Any, optimizer: Optimizer | None
) -> tuple[Memory, Counts]:
    """The second step of a real run under each instrument: the optimizer has its state."""
    train_state = TrainState(objective, estimator, optimizer)
    train_state.step(batch, KEY)
    live, counted = MemoryTracker(objective.model), OpCounter(objective.model)
    live.register("inputs", (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
    live.register("optimizer state", train_state.held_tensors())
    with live.followed():
        train_state.step(batch, KEY)
    with counted.followed():
        train_state.step(batch, KEY)
    return live.memory(), counted.counts


def assert_forecast_is_exact(
    estimator: Estimator, objective: Objective, batch: Any, optimizer: Optimizer | None
) -> None:
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    predicted = forecast(estimator, objective, batch, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.model.state_dict().items())
    memory, counts = tracked(estimator, objective, batch, optimizer)
    assert predicted.peak == memory.peak
    if TORCH >= (2, 10):  # torch 2.9 adds the gradients of a shared weight into the other one, outside a simulation
        assert predicted.breakdown == memory.breakdown
    assert sum(memory.breakdown.values()) == memory.peak
    assert (predicted.flops, predicted.matmuls, predicted.counts.elementwise) == (
        counts.flops,
        counts.matmuls,
        counts.elementwise,
    )
    assert predicted.counts.drawn == counts.drawn
    assert not counts.uncounted


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_forecast_is_the_tracked_peak_to_the_byte(case: Case):
    objective, batch = made(case.model, DTYPES[case.dtype])
    assert_forecast_is_exact(case.estimator(), objective, batch, OPTIMIZERS[case.optimizer])


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in EVERY if case not in SOME], ids=str)
def test_a_forecast_is_the_tracked_peak_to_the_byte_for_the_whole_product(case: Case):
    objective, batch = made(case.model, DTYPES[case.dtype])
    assert_forecast_is_exact(case.estimator(), objective, batch, OPTIMIZERS[case.optimizer])


# By default every third of them on a model with embeddings, normalisation and attention.
ON_GPT = [pytest.param("gpt", m, marks=[pytest.mark.slow] * (n % 3 != 2)) for n, m in enumerate(OTHERS)]


@pytest.mark.parametrize(("model", "method"), [*(("mlp", method) for method in OTHERS), *ON_GPT])
def test_a_forecast_is_exact_for_the_other_estimators_and_without_an_optimizer(model: str, method: str):
    objective, batch = made(model, torch.float32)
    assert_forecast_is_exact(OTHERS[method], objective, batch, None)


@pytest.mark.parametrize("wrapper", [Master, pytest.param(StochasticallyRounded, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float32))],
    ids=str,
)
@pytest.mark.parametrize("method", ["backprop", "mezo", pytest.param("chosen eps", marks=pytest.mark.slow)])
def test_a_forecast_is_exact_for_updates_that_are_not_lost_to_rounding(method: str, dtype: torch.dtype, wrapper: Any):
    objective, batch = made("gpt", dtype)
    for optimizer in (SGD(1e-3), AdamW(1e-3)):
        assert_forecast_is_exact((PRESETS | OTHERS)[method], objective, batch, wrapper(optimizer))


@pytest.mark.parametrize(
    "model", ["mlp", "bert", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gpt", "llama"))]
)
@pytest.mark.parametrize("parts", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_so_it_is_for_schedules_within_a_budget(model: str, parts: int):
    objective, batch = made(model, torch.float32)
    whole = objective.in_micro_batches(parts)
    trade = MemoryTradeoff(whole, batch)
    for budget in {trade.peak(0), (trade.peak(0) + trade.points[-1].peak) // 2}:
        estimator = Reverse(Within(budget))
        found: Estimator = estimator if parts == 1 else Accumulated(estimator, parts)
        assert forecast(found, objective, batch).peak <= budget
        assert_forecast_is_exact(found, objective, batch, None)
        assert_forecast_is_exact(Reverse(Schedule(trade.cheapest(budget).items)), objective, batch, AdamW(1e-3))


# ---- law 9's integers, without running


def linears(model: torch.nn.Module) -> int:
    return sum(isinstance(module, torch.nn.Linear) for module in model.modules())


# What running all blocks again costs: of a block's linear layers the last one's output is not asked for where
# only an addition follows it (Gpt: 4, Llama: 7), and is where a normalisation does (Bert: 6, all of them).
AGAIN = {"gpt": 3 * (4 - 1), "llama": 3 * (7 - 1), "bert": 2 * 6}


@pytest.mark.parametrize(
    "model", ["mlp", *(pytest.param(m, marks=pytest.mark.slow) for m in ("gpt", "bert", "llama"))]
)
def test_a_forecast_counts_the_matmuls_that_law_9_states(model: str):
    objective, batch = made(model, torch.float32)
    objective.model.eval()  # without dropout attention is one fused operator, and no product
    count = linears(objective.model)
    first = model == "mlp"  # no embedding comes before its first layer, whose input needs nothing

    def predicted(estimator: Estimator) -> Any:
        return forecast(estimator, objective, batch)

    assert predicted(gradcost.backprop()).matmuls == 3 * count - first
    for n in (1, 4):
        assert predicted(gradcost.mezo(probes=n)).matmuls == 2 * n * count
        assert predicted(gradcost.mezo(probes=n)).forwards == 2 * n
    if model in AGAIN:
        assert predicted(gradcost.checkpointed()).matmuls == 3 * count + AGAIN[model]
    names = {name for name, module in objective.model.named_modules() if isinstance(module, torch.nn.Linear)}
    for estimator, each in ((gradcost.forward_gradient(1), 3), (gradcost.forward_gradient(4, together=1), 12)):
        found = predicted(estimator).counts.matmuls_by_module
        assert sum(found[name] for name in names) == each * count - first * each // 3
    shared = predicted(Probing(Jvp(4), probes=4)).counts.flops_by_module
    alone = predicted(gradcost.mezo()).counts.flops_by_module
    for name in names:  # 1 + 2k forwards of a layer against the two of a difference
        less = 4 if first and name == min(names) else 0
        assert 2 * shared[name] == (1 + 2 * 4 - less) * alone[name]


def test_a_frozen_weight_costs_no_product_of_its_own():
    objective, batch = made("gpt", torch.float32)
    objective.model.requires_grad_(False)
    objective.model.blocks[1].up.requires_grad_(True)  # type: ignore[index,union-attr]
    objective = Objective(objective.model, objective.loss)
    count = linears(objective.model)
    behind = 4 + 2  # the third block's layers, the second one's last, and the head: their inputs' gradient or tangent
    assert forecast(gradcost.backprop(), objective, batch).matmuls == count + 1 + behind
    assert forecast(gradcost.mezo(), objective, batch).matmuls == 2 * count


@pytest.mark.parametrize("estimator", [Probing(Jvp()), Probing(Jvp(2), probes=2), gradcost.backprop()], ids=repr)
@pytest.mark.parametrize("model", ["gpt", "bert", "cnn"])
def test_a_forecast_is_exact_where_most_weights_are_frozen(model: str, estimator: Estimator):
    """A frozen normalisation's weight has no tangent: PyTorch's own rule for it needs zeros that no fake can be."""
    objective, batch = made(model, torch.float32)
    objective.model.requires_grad_(False)
    layers = [m for m in objective.model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    layers[len(layers) // 2].requires_grad_(True)
    assert_forecast_is_exact(estimator, Objective(objective.model, objective.loss), batch, None)
