"""Law 11. A replay of a seeded gradient holds at most one leaf beside the parameters; `stream` passes on one leaf at
a time; and an optimizer that uses leaf after leaf takes the same step as one that has all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alive import Alive
from gradcost.checkpointing.policies import Blocks
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.gradient import Gradient, Seeded
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.slope import CentralDifference
from gradcost.training.leafwise import Leafwise
from gradcost.training.optimizers import SGD, Adam, AdamW, Nesterov, Optimizer
from gradcost.training.train_state import TrainState
from snapshot import bits
from tables import DIRECTIONS, ESTIMATORS, OBJECTIVES, Problem, grid

KEY = Key(11)


def wide(dtype: torch.dtype) -> Objective:
    model = nn.Module()
    for number, size in enumerate([(300, 20), (50_000,), (7,), (100, 100, 3)]):
        model.register_parameter(f"p{number}", nn.Parameter(torch.ones(size, dtype=dtype)))
    return Objective(model, lambda model, batch: sum(p.double().mean() for p in model.parameters()))  # type: ignore[arg-type]


def seeded(objective: Objective, name: str) -> Seeded:
    seeds = DIRECTIONS[name].seeds(KEY, 3, objective.dimension)
    return Seeded(objective, DIRECTIONS[name], seeds, (1.0, -0.5, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_replay_holds_one_leaf_and_never_more(name: str, dtype: torch.dtype):
    objective = wide(dtype)
    gradient = seeded(objective, name)
    list(gradient.leaves())  # a sphere's norms are computed once and cached
    with Alive() as alive:
        replay = gradient.leaves()
        for leaf in objective.leaves:
            _, made = next(replay)
            assert alive.bytes == made.nbytes == leaf.parameter.nbytes
            del made
            assert alive.bytes == 0
    assert alive.peak == max(leaf.parameter.nbytes for leaf in objective.leaves)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_replay_in_half_precision_holds_one_leaf_and_its_float32_while_making_it(name: str):
    """Half precision is computed in float32 and rounded once, so making a leaf takes its float32 as well."""
    objective = wide(torch.bfloat16)
    gradient = seeded(objective, name)
    list(gradient.leaves())
    with Alive() as alive:
        for _, made in gradient.leaves():
            assert alive.bytes == made.nbytes
            del made
    assert alive.peak <= 3 * max(leaf.parameter.nbytes for leaf in objective.leaves)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_norm_is_taken_of_one_leaf_at_a_time(name: str):
    gradient = seeded(wide(torch.float64), name)
    norm = gradient.norm()
    assert norm == pytest.approx(float(torch.cat([g.flatten() for _, g in gradient.leaves()]).norm()), rel=1e-12)
    with Alive() as alive:
        gradient.norm()
    # The largest leaf and its square, and a sum.
    assert alive.peak <= 2 * 50_000 * 8 + 64


@pytest.mark.parametrize("estimator", [mezo(), Probing(CentralDifference(), DIRECTIONS["rademacher"], 2)], ids=repr)
def test_a_streamed_step_holds_one_leaf(estimator: Estimator):
    objective = wide(torch.float32)
    sizes = {leaf.name: leaf.parameter.nbytes for leaf in objective.leaves}
    excess: list[int] = []
    with Alive() as alive:

        def use(name: str, gradient: Tensor) -> None:
            if not excess:
                alive.peak = alive.bytes  # after the evaluations: from here on it is the peak of the replay
            excess.append(alive.bytes - sizes[name])

        estimator.stream(objective, None, KEY, use)
    assert len(excess) == len(sizes)
    assert max(excess) <= 64  # the loss and the slopes: scalars
    assert alive.peak <= max(sizes.values()) + 64


@pytest.mark.parametrize("estimator", [mezo(), forward_gradient(), backprop(), Reverse(Blocks())], ids=repr)
def test_each_leaf_is_freed_before_the_next_is_passed_on(estimator: Estimator):
    objective, batch = OBJECTIVES["transformer"].make()
    last: list[weakref.ref[Tensor]] = []

    def use(name: str, gradient: Tensor) -> None:
        assert all(reference() is None for reference in last)
        last.append(weakref.ref(gradient))

    estimator.stream(objective, batch, KEY, use)
    assert len(last) == len(objective.leaves)


@grid(without="direct")
def test_a_stream_passes_on_the_leaves_of_the_estimate_and_a_replay_writes_them(estimator: str, objective: str):
    made, batch = OBJECTIVES[objective].make()
    whole = ESTIMATORS[estimator].estimator.estimate(made, batch, KEY)
    expected = replayed_bits(made, whole.gradient)
    found: dict[str, bytes | None] = {}

    def use(name: str, gradient: Tensor) -> None:
        assert name not in found
        assert not torch.is_grad_enabled()
        if type(ESTIMATORS[estimator].estimator) is Reverse:
            # Not so for several micro-batches, whose gradients are summed before they are passed on.
            assert [leaf.name for leaf in made.leaves if leaf.parameter.grad is not None] == []
        found[name] = bits(gradient)

    streamed = ESTIMATORS[estimator].estimator.stream(made, batch, KEY, use)
    assert found == expected
    with pytest.raises(ValueError, match="already passed this gradient on; use `estimate`"):
        list(streamed.gradient.leaves())
    assert torch.equal(streamed.loss, whole.loss)
    assert streamed.clipped == whole.clipped
    assert_writes(made, whole.gradient, expected)


def replayed_bits(made: Objective, gradient: Gradient) -> dict[str, bytes | None]:
    """Return each leaf's gradient, which has the name, shape and type of the leaf."""
    replay = list(gradient.leaves())
    assert [name for name, _ in replay] == [leaf.name for leaf in made.leaves]
    for (_, found), leaf in zip(replay, made.leaves, strict=True):
        assert (found.shape, found.dtype) == (leaf.parameter.shape, leaf.parameter.dtype)
        assert not found.requires_grad
    return {name: bits(found) for name, found in replay}


def assert_writes(made: Objective, gradient: Gradient, expected: dict[str, bytes | None]) -> None:
    """The gradient is written to the leaves' `.grad`, None for those without one, and nothing else changes."""
    weights = [bits(parameter) for parameter in made.model.parameters()]
    gradient.write()
    parameters = dict(made.model.named_parameters())
    written = {name: None if name in gradient.unused else part for name, part in expected.items()}
    assert {name: bits(parameters[name].grad) for name in expected} == written
    assert [bits(parameter) for parameter in made.model.parameters()] == weights


def test_use_may_change_a_parameter_before_the_other_gradients_are_complete():
    """As an optimizer fused into the backward pass does: no later computation reads the parameter."""
    for saving in (Reverse(), Reverse(Blocks())):
        expected, batch = OBJECTIVES["transformer"].make()
        gradient = saving.estimate(expected, batch, KEY).gradient
        objective, batch = OBJECTIVES["transformer"].make()
        parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
        found: dict[str, Tensor] = {}

        def use(
            name: str,
            gradient: Tensor,
            parameters: dict[str, nn.Parameter] = parameters,
            found: dict[str, Tensor] = found,
        ) -> None:
            found[name] = gradient.clone()
            parameters[name].fill_(torch.nan)

        saving.stream(objective, batch, KEY, use)
        assert all(torch.equal(found[name], leaf) for name, leaf in gradient.leaves())


# ---- optimizers

OPTIMIZERS: list[Optimizer] = [
    SGD(0.1),
    SGD(0.1, momentum=0.9, weight_decay=0.01),
    SGD(0.1, decay=0.2),
    Nesterov(0.1, weight_decay=0.01),
    Adam(0.01),
    Adam(0.01, beta1=0.5, beta2=0.7, eps=1e-4, decay=0.1),
    AdamW(0.01, weight_decay=0.3),
    AdamW(0.01, decay=0.1),
]


def steps(problem: Problem, walk: Callable[[Objective], Callable[[Gradient], None]]) -> Iterator[list[bytes | None]]:
    """The bits of the weights after each of five steps."""
    objective, batch = problem.make()
    take = walk(objective)
    for number in range(5):
        estimator = [backprop(), mezo(), forward_gradient(2)][number % 3]
        gradient = estimator.estimate(objective, batch, KEY.fold("step", number)).gradient
        take(gradient)
        yield [bits(parameter) for parameter in objective.model.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("name", ["mlp", "transformer", "direct"])
def test_leaf_by_leaf_is_the_same_step_as_all_at_once(name: str, optimizer: Optimizer):
    def at_once(objective: Objective) -> Callable[[Gradient], None]:
        torch_optimizer = optimizer.build(objective.leaves)
        done = 0

        def take(gradient: Gradient) -> None:
            nonlocal done
            torch_optimizer.param_groups[0]["lr"] = optimizer.lr * 2.718281828459045 ** (-optimizer.decay * done)
            gradient.write()
            torch_optimizer.step()
            done += 1

        return take

    def leaf_by_leaf(objective: Objective) -> Callable[[Gradient], None]:
        leafwise = Leafwise(optimizer, objective)

        def take(gradient: Gradient) -> None:
            for name, leaf in reversed(list(gradient.leaves())):  # in any order
                if name in gradient.unused:
                    leafwise.skip(name)
                else:
                    leafwise.use(name, leaf)
            leafwise.advance()
            assert all(leaf.parameter.grad is None for leaf in objective.leaves)

        return take

    one, other = list(steps(OBJECTIVES[name], at_once)), list(steps(OBJECTIVES[name], leaf_by_leaf))
    assert one == other
    assert one[0] != one[-1]


STATED: list[tuple[Optimizer, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = [
    (
        SGD(0.1, momentum=0.9, weight_decay=0.01),
        lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    (
        Nesterov(0.1, momentum=0.8, weight_decay=0.01),
        lambda leaves: torch.optim.SGD(leaves, lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True),
    ),
    (
        Adam(0.01, beta1=0.5, beta2=0.7, eps=1e-4),
        lambda leaves: torch.optim.Adam(leaves, lr=0.01, betas=(0.5, 0.7), eps=1e-4),
    ),
    (
        AdamW(0.01, beta1=0.5, beta2=0.7, eps=1e-4, weight_decay=0.3),
        lambda leaves: torch.optim.AdamW(leaves, lr=0.01, betas=(0.5, 0.7), eps=1e-4, weight_decay=0.3),
    ),
]


@pytest.mark.parametrize(
    ("optimizer", "of_torch"), STATED, ids=lambda one: repr(one) if isinstance(one, Optimizer) else ""
)
def test_an_optimizer_is_the_one_of_torch_that_it_states(optimizer: Optimizer, of_torch: Callable[..., Any]):
    objective, _ = OBJECTIVES["mlp"].make()
    built, expected = optimizer.build(objective.leaves), of_torch([leaf.parameter for leaf in objective.leaves])
    assert type(built) is type(expected)
    assert built.param_groups == expected.param_groups


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_leaf_by_leaf_resumes_from_its_state(optimizer: Optimizer):
    def whole(objective: Objective) -> Callable[[Gradient], None]:
        return _taker(Leafwise(optimizer, objective))

    def resumed(objective: Objective) -> Callable[[Gradient], None]:
        held = [Leafwise(optimizer, objective)]

        def take(gradient: Gradient) -> None:
            _taker(held[0])(gradient)
            state = held[0].state_dict()
            held[0] = Leafwise(optimizer, objective)
            held[0].load_state_dict(state)

        return take

    assert list(steps(OBJECTIVES["mlp"], whole)) == list(steps(OBJECTIVES["mlp"], resumed))


def _taker(leafwise: Leafwise) -> Callable[[Gradient], None]:
    def take(gradient: Gradient) -> None:
        for name, leaf in gradient.leaves():
            leafwise.use(name, leaf)
        leafwise.advance()

    return take


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row.estimator.facts.inner is None])
def test_every_estimator_takes_steps_on_layers_that_move_one_by_one(name: str):
    """Layers above 64 KiB move as soon as their gradient is there, also during an evaluation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 130), nn.Tanh(), nn.Linear(130, 130))
    objective = Objective(model, lambda model, batch: model(batch).square().mean(), data=lambda: [torch.ones(4, 200)])
    assert min(weight.nbytes for weight in model.parameters() if weight.dim() == 2) > 64 << 10
    state = TrainState(objective, ESTIMATORS[name].estimator, SGD(1e-6))
    before = [parameter.clone() for parameter in model.parameters()]
    for step in range(2):
        state.step(torch.ones(4, 200), KEY.fold("step", step))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", [SGD(0.1), AdamW(0.01)], ids=repr)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_of_every_estimator_is_that_of_its_written_gradient(name: str, optimizer: Optimizer):
    """Backprop in `Mixed` once moved no small leaf: it restored `.grad`, or its group waited for pieces."""
    estimator, problem = ESTIMATORS[name].estimator, OBJECTIVES["mlp"]
    (one, batch), (other, _) = problem.make(), problem.make()
    if estimator.objection(one, batch) is not None:
        pytest.skip("the estimator does not serve this model")
    TrainState(one, estimator, optimizer, key=KEY).step(batch, KEY)
    states = estimator.init(other)
    estimator.estimate(other, batch, KEY, states).gradient.write()
    optimizer.build(other.leaves).step()
    assert [bits(p) for p in one.model.parameters()] == [bits(p) for p in other.model.parameters()]
