"""Two estimators, each for its own leaves: the gradients, the memory, the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradcost.checkpointing.policies import Blocks
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.mixed import Mixed
from gradcost.estimators.presets import backprop, checkpointed, mezo
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.planning.forecast import forecast
from gradcost.slopes.slope import Jvp
from gradcost.tasks.architectures import Gpt
from snapshot import differences, snapshot
from tables import OBJECTIVES, cross_entropy, raising
from vectors import estimated, true_gradient

KEY = Key(32)


def gpt() -> tuple[Objective, Any]:
    with seeded_generators(KEY):
        words = torch.randint(31, (8, 33))
        model = Gpt(layers=6, width=16, heads=2).build((32,), 31)
    return Objective(model, cross_entropy), (words[:, :-1], words[:, 1:])


@pytest.mark.parametrize("inside", [Reverse(), Reverse(Blocks()), Probing(Jvp())], ids=repr)
def test_each_leaf_has_the_gradient_of_its_estimator_on_its_own_leaves(inside: Any):
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    names = {leaf.name for leaf in objective.leaves if leaf.name.startswith("blocks.2.")}
    found = Mixed("blocks.2.*", inside, mezo()).estimate(objective, batch, KEY)
    inner, outer = objective.only(names), objective.only({leaf.name for leaf in objective.leaves} - names)
    high, low = inside.estimate(inner, batch, KEY), mezo().estimate(outer, batch, KEY)
    expected = dict(high.gradient.leaves()) | dict(low.gradient.leaves())
    assert [name for name, _ in found.gradient.leaves()] == [leaf.name for leaf in objective.leaves]
    for name, gradient in found.gradient.leaves():
        assert torch.equal(gradient, expected[name])
    assert torch.equal(found.loss, high.loss)
    assert low.slopes is not None
    assert torch.equal(found.slopes, low.slopes)  # type: ignore[arg-type]


def test_backprop_inside_is_backprops_gradient_under_the_same_dropout_mask():
    objective, batch = OBJECTIVES["transformer"].make(torch.float64)
    exact = backprop().estimate(objective, batch, KEY)
    found = Mixed("blocks.[12].*", backprop(), mezo()).estimate(objective, batch, KEY)
    whole = dict(exact.gradient.leaves())
    for name, gradient in found.gradient.leaves():
        if name.startswith(("blocks.1.", "blocks.2.")):
            assert torch.equal(gradient, whole[name])
    assert torch.equal(found.loss, exact.loss)


def test_two_of_backprop_are_backprop():
    objective, batch = OBJECTIVES["mlp"].make(torch.float64)
    assert torch.equal(
        estimated(Mixed("2.*", backprop(), checkpointed()), objective, batch, KEY),
        true_gradient(objective, batch, KEY),
    )


def test_the_last_layers_memory_is_all_that_backprop_adds():
    """The forecast, which law 10 holds to the byte: far below backprop's, and near that of differences."""
    objective, batch = gpt()
    last = [leaf.name for leaf in objective.leaves][-1]
    mixed = Mixed(last, backprop(), mezo())
    beyond = {e: forecast(e, objective, batch).beyond for e in (mixed, backprop(), mezo())}
    assert beyond[mixed] < 0.15 * beyond[backprop()]
    assert beyond[mixed] <= 1.1 * beyond[mezo()]
    more = forecast(Mixed("blocks.5.*", backprop(), mezo()), objective, batch).beyond
    assert beyond[mixed] < more < 0.5 * beyond[backprop()]


def test_no_leaf_changes_before_all_is_evaluated():
    """In a stream `use` may change a leaf: what it gets is the estimate's all the same."""
    objective, batch = OBJECTIVES["transformer"].make()
    mixed = Mixed("blocks.2.*", backprop(), mezo())
    expected = dict(mixed.estimate(objective, batch, KEY).gradient.leaves())
    parameters = {leaf.name: leaf.parameter for leaf in objective.leaves}
    found: dict[str, Tensor] = {}

    def use(name: str, gradient: Tensor) -> None:
        found[name] = gradient.clone()
        parameters[name].fill_(torch.nan)

    streamed = mixed.stream(objective, batch, KEY, use)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert streamed.gradient.message == 16 + sum(p.nbytes for n, p in parameters.items() if n.startswith("blocks.2."))  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_the_others_require_a_gradient_again_after_a_raise(error: type[BaseException]):
    objective, batch, fails = raising()
    mixed = Mixed("7.*", backprop(), mezo())
    mixed.estimate(objective, batch, KEY)  # the first use evaluates more often
    for at in (1, 2, 3):
        fails.calls, fails.at, fails.error = 0, at, error
        before = snapshot(objective.model)
        with pytest.raises(error, match="half-way"):
            mixed.estimate(objective, batch, KEY)
        assert differences(before, snapshot(objective.model)) == []


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        (
            "head.*",
            r"no parameter matches 'head\.\*', so there are not two groups: use Probing.* alone, or a pattern",
        ),
        ("*", r"every parameter matches '\*', so there are not two groups: use Reverse.* alone, or a pattern"),
    ],
)
def test_a_pattern_of_none_or_all_is_refused(named: str, sentence: str):
    objective, batch = OBJECTIVES["mlp"].make()
    mixed = Mixed(named, backprop(), mezo())
    with pytest.raises(ValueError, match=sentence):
        mixed.estimate(objective, batch, KEY)
    assert "so there are not two groups" in str(mixed.objection(objective, batch))
    assert "parameters 0.weight, 0.bias" in str(mixed.objection(objective, batch))
