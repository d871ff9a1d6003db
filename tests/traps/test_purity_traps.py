"""Losses and models with state outside parameters and buffers: an evaluation isolates it, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.isolation import eval_mode, seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, mezo, spsa

KEY = Key(5)
ESTIMATORS = [backprop(), forward_gradient(), spsa(eps=1e-5), mezo(eps=1e-5)]


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)


def check_right(model: nn.Module, loss: Any, batch: Any, grads: dict[str, Tensor]) -> None:
    """Each estimator gives these gradients, or the slope <grad, z>; twice, so that state would show."""
    for estimator in ESTIMATORS:
        objective = Objective(model, loss)
        for _ in range(2):
            estimate = estimator.estimate(objective, batch, KEY)
            if estimate.slopes is None:
                found = dict(estimate.gradient.leaves())
                assert all(torch.allclose(found[name], grads[name], rtol=1e-9, atol=1e-12) for name in grads)
            else:
                seeded: Any = estimate.gradient
                z = dict(Seeded(objective, seeded.directions, seeded.seeds[:1], (1.0,)).leaves())
                expected = sum(float((z[name] * grads[name]).sum()) for name in grads)
                assert float(estimate.slopes[0]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def gradients(model: nn.Module, loss: Any, batch: Any, key: Key | None = KEY) -> dict[str, Tensor]:
    """The gradient by torch alone, on a copy that nobody else uses."""
    twin = copy.deepcopy(model)
    if key is None:
        value = loss(twin, batch)
    else:
        with seeded_generators(key.fold("part", 0)):
            value = loss(twin, batch)
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    parameters = [p for p in twin.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)
    }


# ---- attributes of modules


class Stateful(nn.Module):
    """Keeps state between calls, in the way that `keep` writes it."""

    def __init__(self, state: Any, keep: Callable[[nn.Module, Tensor], Any], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.state, self.keep, self.read = state, keep, read

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.linear(x) + self.read(self.state))
        with torch.no_grad():
            self.keep(self, out.mean(0))
        return out


def _rebind(module: Any, value: Tensor) -> None:
    module.state = value.detach()


def _write(module: Any, value: Tensor) -> None:
    module.state.mul_(0.5).add_(value.detach())


def _append(module: Any, value: Tensor) -> None:
    module.state.append(value.detach())


def _into_dict(module: Any, value: Tensor) -> None:
    module.state["mean"] = value.detach() + module.state.get("mean", 0.0)


class Box:
    def __init__(self) -> None:
        self.value = torch.zeros(4, dtype=torch.float64)


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = torch.zeros(4, dtype=torch.float64)


def _into_object(module: Any, value: Tensor) -> None:
    module.state.value = module.state.value + value.detach()


def _into_array(module: Any, value: Tensor) -> None:
    module.state += value.detach().numpy()


ATTRIBUTES: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "a rebound tensor": (lambda: torch.zeros(4), _rebind, lambda state: state),
    "a tensor changed in place": (lambda: torch.zeros(4), _write, lambda state: state),
    "a tensor in a tuple": (
        lambda: (torch.zeros(4), 1),
        lambda module, value: module.state[0].add_(value),
        lambda state: state[0],
    ),
    "a list": (list, _append, lambda state: torch.stack(state).sum(0) if state else torch.zeros(4)),
    "a dict": (dict, _into_dict, lambda state: state.get("mean", torch.zeros(4))),
    "an object": (Box, _into_object, lambda state: state.value),
    "an object with slots": (Slotted, _into_object, lambda state: state.value),
    "an array": (lambda: np.zeros(4), _into_array, lambda state: torch.from_numpy(state.copy())),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_state_in_an_attribute_is_the_same_for_each_evaluation_and_afterwards(name: str):
    make, keep, read = ATTRIBUTES[name]
    model, batch = Stateful(make(), keep, read), pair()
    squares(model, batch)  # so that there is a state
    before = read(model.state).clone()
    check_right(model, squares, batch, gradients(model, squares, batch))
    assert torch.equal(read(model.state), before)


def test_state_that_the_user_replaces_between_estimates_is_isolated_too():
    model, batch = Stateful([], _append, ATTRIBUTES["a list"][2]), pair()
    objective = Objective(model, squares)
    mezo(eps=1e-5).estimate(objective, batch, KEY)
    model.state = [torch.ones(4)]
    check_right(model, squares, batch, gradients(model, squares, batch))
    mezo(eps=1e-5).estimate(objective, batch, KEY)
    assert len(model.state) == 1


class Counting(nn.Module):
    calls = 0
    table: dict[str, Tensor] = {}

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        self.table["last"] = self.table.get("last", torch.zeros(())) + 0.1
        return self.linear(x) * self.table["last"] * self.calls


def test_state_in_attributes_of_the_class_is_restored():
    model, batch = Counting(), pair()
    grads = gradients(model, squares, batch)
    Counting.calls, Counting.table = 0, {}
    check_right(model, squares, batch, grads)
    assert (Counting.calls, Counting.table) == (0, {})


def test_a_module_that_a_list_hides_from_the_model_is_isolated():
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.teacher = [nn.BatchNorm1d(4)]

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.teacher[0](x))

    model, batch = Student(), pair()
    grads = gradients(model, squares, batch)
    check_right(model, squares, batch, grads)
    assert model.teacher[0].num_batches_tracked == 0


def test_hook_made_weights_are_as_before():
    model, batch = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Tanh()), pair()
    before: Any = model[0].weight
    for estimator in (backprop(), checkpointed(), spsa(), mezo()):
        estimator.estimate(Objective(model, squares), batch, KEY)
        assert model[0].weight is before


def test_a_cache_of_parametrizations_is_empty_for_each_evaluation_and_restored():
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, batch = nn.Sequential(nn.Linear(4, 4)), pair()
    parametrize.register_parametrization(model[0], "weight", Double())
    grads = gradients(model, squares, batch)
    with parametrize.cached():
        model(batch[0])
        cached = dict(parametrize._cache)
        check_right(model, squares, batch, grads)
        assert cached
        assert parametrize._cache == cached


def test_buffers_that_two_modules_share_stay_shared():
    class Writer(nn.Module):
        def __init__(self, mean: Tensor) -> None:
            super().__init__()
            self.register_buffer("mean", mean)

        def forward(self, x: Tensor) -> Tensor:
            self.mean.add_(1)  # type: ignore[operator]
            return x

    class Reader(Writer):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.mean  # type: ignore[operator]

    mean = torch.zeros(4)
    model, batch = nn.Sequential(Writer(mean), Reader(mean), nn.Linear(4, 4)), pair()
    expected = squares(model, batch).detach()
    mean.zero_()
    assert torch.equal(Objective(model, squares).evaluate(batch, KEY), expected)
    assert torch.equal(mean, torch.zeros(4))


def test_a_buffer_that_is_part_of_another_one_stays_part_of_it():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, table = nn.Linear(4, 4), torch.zeros(2, 4)
            self.register_buffer("table", table)
            self.register_buffer("row", table[1])
            self.column = table[0]

        def forward(self, x: Any) -> Any:
            self.table.add_(1)  # type: ignore[operator]
            return self.linear(x) * (self.row + self.column)  # type: ignore[operator]

    model, batch = Parts(), pair()
    found = backprop().estimate(Objective(model, squares), batch, KEY)
    assert found.loss == doubled(model.linear, batch)
    assert torch.equal(model.table, torch.zeros(2, 4))  # type: ignore[arg-type]
    check_right(model, squares, batch, dict(found.gradient.leaves()))


def doubled(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) * 2 - batch[1]).square().mean()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_that_is_forked_after_use_with_two_threads_does_not_hang():
    code = """
import os, signal, torch
from torch import nn
from gradcost import Key, Objective, mezo
torch.set_num_threads(2)
objective = Objective(nn.Linear(512, 512), lambda model, batch: model(batch).square().mean())
work = lambda: mezo().estimate(objective, torch.ones(2048, 512), Key(0)).loss
work()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if work().isfinite() else 1)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "0"


# ---- random generators


def _by_numpy(model: Any) -> float:
    return float(np.random.randn() + np.random.rand())


def _by_python(model: Any) -> float:
    return random.random()


DRAWS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "numpy": (lambda: None, _by_numpy),
    "random": (lambda: None, _by_python),
    "torch.Generator": (
        lambda: torch.Generator().manual_seed(3),
        lambda model: float(torch.rand((), generator=model.generator)),
    ),
    "np.random.Generator": (lambda: np.random.default_rng(3), lambda model: model.generator.random()),
    "np.random.RandomState": (lambda: np.random.RandomState(3), lambda model: model.generator.randn()),
    "random.Random": (lambda: random.Random(3), lambda model: model.generator.random()),
    "in a list": (lambda: [random.Random(3)], lambda model: model.generator[0].random()),
}


class Drawing(nn.Module):
    def __init__(self, generator: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.linear, self.generator, self.draw = nn.Linear(4, 4), generator, draw

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * (1 + self.draw(self))


@pytest.mark.parametrize("name", DRAWS)
def test_both_ends_of_a_difference_draw_alike_and_the_generator_is_restored(name: str):
    make, draw = DRAWS[name]
    model, batch = Drawing(make(), draw), pair()
    following = [draw(model), draw(model), draw(model)]
    model.generator = make()
    np.random.seed(7)
    random.seed(7)
    expected = [draw(model), draw(model), draw(model)]
    for drawn in range(3):  # also with a normal number that NumPy keeps for the next call
        model.generator = make()
        np.random.seed(7)
        random.seed(7)
        for number in range(drawn):
            assert draw(model) == expected[number]
        objective = Objective(model, squares)
        losses = {float(objective.evaluate(batch, KEY)) for _ in range(3)}
        assert len(losses) == 1
        assert float(objective.evaluate(batch, Key(6))) not in losses  # the key seeds the generator
        slopes: Any = spsa(eps=1e-5).estimate(objective, batch, KEY).slopes
        assert abs(float(slopes[0])) < 100
        assert draw(model) == expected[drawn]
    assert len(set(following)) == 3


def test_a_generator_of_the_loss_is_seeded_and_restored():
    generator = torch.Generator().manual_seed(3)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, batch) * torch.rand((), generator=generator)

    state = generator.get_state()
    objective = Objective(nn.Linear(4, 4), loss)
    assert len({float(objective.evaluate(pair(), KEY)) for _ in range(3)}) == 1
    assert torch.equal(generator.get_state(), state)


# ---- the batch


def clamped(model: nn.Module, batch: Any) -> Tensor:
    logs, labels = model(batch[0]).log_softmax(-1), batch[1].unsqueeze(-1)
    padded = labels.eq(-100)
    labels.clamp_(min=0)
    return -logs.gather(-1, labels).masked_fill(padded, 0.0).sum() / (~padded).sum()


def popped(model: nn.Module, batch: Any) -> Tensor:
    labels = batch.pop("y", torch.zeros(6, 4))
    return (model(batch["x"]) - labels).square().mean()


def scaled_through_data(model: nn.Module, batch: Any) -> Tensor:
    batch[0].data.mul_(0.5)
    return squares(model, batch)


@dataclasses.dataclass
class Examples:
    x: Tensor
    y: list[Tensor]


def emptied(model: nn.Module, batch: Examples) -> Tensor:
    return (model(batch.x.mul_(0.5)) - batch.y.pop()).square().mean()


def scaled_array(model: nn.Module, batch: Any) -> Tensor:
    batch["x"] *= 0.5
    return (model(torch.from_numpy(batch["x"].copy())) - 1).square().mean()


BATCHES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "labels clamped": (clamped, lambda: (pair()[0], torch.tensor([1, -100, -100, 3, 2, 0]))),
    "labels popped": (popped, lambda: {"x": pair()[0], "y": pair()[1]}),
    "inputs scaled through .data": (scaled_through_data, pair),
    "a dataclass": (emptied, lambda: Examples(pair()[0], [pair()[1]])),
    "an array": (scaled_array, lambda: {"x": pair()[0].numpy()}),
    "an in-place layer": (
        lambda model, batch: squares(nn.Sequential(nn.LeakyReLU(0.5, inplace=True), model), batch),
        pair,
    ),
}


def _flat(batch: Any) -> list[Any]:
    items = vars(batch) if dataclasses.is_dataclass(batch) else batch
    entries = list(items.values()) if isinstance(items, dict) else list(items)
    flat = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]
    return [item.tolist() for item in flat]


@pytest.mark.parametrize("name", BATCHES)
def test_a_loss_that_changes_its_batch_sees_the_same_batch_each_time(name: str):
    loss, make = BATCHES[name]
    model = nn.Linear(4, 4)
    grads = gradients(model, loss, make())
    batch = make()
    check_right(model, loss, batch, grads)
    assert _flat(batch) == _flat(make())


def test_a_later_first_write_into_the_batch_is_refused_with_the_entry_and_then_served():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if "labels" in batch:
            batch["labels"].clamp_(min=0)
        return squares(model, (batch["x"], batch.get("labels", 0)))

    model = nn.Linear(4, 4)
    objective = Objective(model, loss)
    objective.evaluate({"x": pair()[0]}, KEY)
    batch = {"x": pair()[0], "labels": pair()[1]}
    with pytest.raises(BadInput, match=r"wrote into `batch\['labels'\]` in place"):
        spsa(eps=1e-5).estimate(objective, batch, KEY)
    batch = {"x": pair()[0], "labels": pair()[1]}
    grads = gradients(model, loss, {"x": pair()[0], "labels": pair()[1]})
    check_right(model, loss, batch, grads)
    assert torch.equal(batch["labels"], pair()[1])


def test_a_batch_that_is_an_iterator_is_refused():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, next(batch))

    for batch in (iter([pair(), pair()]), (part for part in (pair(), pair()))):
        with pytest.raises(BadInput, match=r"an iterator, which an evaluation consumes\. Pass a list"):
            Objective(nn.Linear(4, 4), loss).evaluate(batch, KEY)


class Uncopyable:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("a lock")


def test_a_batch_that_cannot_be_copied_is_served_unless_the_loss_writes_into_it():
    def writing(model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(0.5)
        return squares(model, batch)

    batch = (*pair(), Uncopyable())
    model = nn.Linear(4, 4)
    assert Objective(model, squares).evaluate(batch, KEY) == squares(model, batch)
    with pytest.raises(Unsupported, match=r"cannot be copied \(a lock\)"):
        Objective(model, writing).evaluate(batch, KEY)
    assert torch.equal(batch[0], pair()[0])


def test_parameters_in_a_batch_that_is_copied_stay_trainable():
    model = nn.Linear(4, 4)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return ((batch[0].mul_(0.5) @ batch[2]) - batch[1]).square().mean()

    batch = (*pair(), model.weight)
    found = dict(backprop().estimate(Objective(model, loss), batch, KEY).gradient.leaves())
    x, y = pair()
    expected = torch.autograd.grad(((0.5 * x @ model.weight) - y).square().mean(), model.weight)[0]
    assert torch.allclose(found["weight"], expected)


def test_requires_grad_of_the_batch_is_put_back():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        batch[0].requires_grad_()
        return squares(model, batch)

    batch = pair()
    for estimator in ESTIMATORS:
        objective = Objective(nn.Linear(4, 4), loss)
        for _ in range(2):
            estimator.estimate(objective, batch, KEY)
            assert not batch[0].requires_grad
            assert batch[0].grad is None


# ---- state that the loss reaches


def test_a_teacher_in_a_closure_is_isolated():
    model, teacher, batch = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), pair()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0])
        return (model(batch[0]) - target).square().mean()

    check_right(model, loss, batch, gradients(model, loss, batch, None))
    teacher[1].reset_running_stats()  # type: ignore[operator]
    spsa().estimate(Objective(model, loss), batch, KEY)
    assert teacher[1].num_batches_tracked == 0


def test_a_running_mean_in_a_closure_is_the_same_for_each_evaluation():
    state = {"mean": torch.ones(())}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = squares(model, batch)
        state["mean"] = 0.5 * state["mean"] + 0.5 * value.detach()
        return value / state["mean"]

    model, batch = nn.Linear(4, 4), pair()
    objective = Objective(model, loss)
    found = {float(objective.evaluate(batch, KEY)) for _ in range(3)}
    assert len(found) == 1
    assert torch.equal(state["mean"], torch.ones(()))


def test_a_log_and_features_in_a_closure_are_kept_and_a_counter_is_noted():
    log: list[float] = []
    features: dict[str, Tensor] = {}
    counts = {"calls": 0}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = squares(model, batch)
        log.append(float(value.detach()))
        features["last"] = value.detach()
        return value

    def counted(model: nn.Module, batch: Any) -> Tensor:
        counts["calls"] += 1
        return squares(model, batch)

    objective = Objective(nn.Linear(4, 4), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        for _ in range(3):
            objective.evaluate(pair(), KEY)
    assert len(log) == 3
    assert len(features) == 1
    with pytest.warns(Note, match="changes `counts`"):
        Objective(nn.Linear(4, 4), counted).evaluate(pair(), KEY)
    assert counts["calls"] == 1


def test_a_loss_whose_state_cannot_be_restored_is_refused_with_the_module():
    class Iterating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.numbers = nn.Linear(4, 4), itertools.count(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * next(self.numbers)

    model = nn.Sequential(nn.Linear(4, 4), Iterating(), nn.Tanh())
    for estimator in ESTIMATORS:
        with pytest.raises(Unsupported, match="`1` gives another output at a second evaluation"):
            estimator.estimate(Objective(model, squares), pair(), KEY)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_forward_that_writes_into_a_parameter_is_refused_with_the_name(frozen: bool):
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(not frozen)

        def forward(self, x: Tensor) -> Tensor:
            self.other.weight.data.mul_(0.9).add_(0.1 * self.linear.weight.data)
            return self.other(self.linear(x))

    with pytest.raises(BadInput, match=r"writes into the parameter `0\.other\.weight`"):
        Objective(nn.Sequential(Average()), squares).evaluate(pair(), KEY)


def test_a_forward_that_makes_a_parameter_is_refused_with_the_name():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "gain"):
                self.gain = nn.Parameter(torch.ones(4))
            return self.linear(x) * self.gain

    model = nn.Sequential(Lazy())
    with pytest.raises(BadInput, match=r"makes the parameter `0\.gain`"):
        Objective(model, squares).evaluate(pair(), KEY)
    assert len(list(model.parameters())) == 2
    model(pair()[0])
    backprop().estimate(Objective(model, squares), pair(), KEY)


# ---- changes of the model after the objective was made


def _freeze(model: Any) -> None:
    model[0].weight.requires_grad_(False)


def _unfreeze(model: Any) -> None:
    model[2].weight.requires_grad_(True)


def _replace(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _assign(model: Any) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _prune(model: Any) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def _new_head(model: Any) -> None:
    model[0] = nn.Linear(4, 4)


def _add_parameter(model: Any) -> None:
    model.gain = nn.Parameter(torch.ones(4))


def _add(model: Any) -> None:
    model.append(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_freeze, "`0.weight` was frozen"),
        (_unfreeze, "`2.weight` was unfrozen"),
        (_replace, "`0.weight` was replaced"),
        (_assign, "`0.weight` was replaced"),
        (_prune, "`0.weight_orig` was replaced or added|entry of `0` was removed|`0.bias` was replaced"),
        (_new_head, "`0` was replaced"),
        (_add, "`3` was replaced or added"),
        (_add_parameter, "`gain` was replaced or added"),
    ],
)
def test_a_change_of_the_model_after_the_objective_is_refused_with_the_name(change: Any, name: str):
    for estimator in (*ESTIMATORS, checkpointed()):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        model[2].weight.requires_grad_(False)  # type: ignore[union-attr]
        objective = Objective(model, squares)
        derived = objective.in_micro_batches(1)
        change(model)
        for made in (objective, derived):
            with pytest.raises(BadInput, match=name):
                estimator.estimate(made, pair(), KEY)
        backprop().estimate(Objective(model, squares), pair(), KEY)


def test_a_deep_copy_of_an_objective_is_an_objective_of_the_copied_model():
    objective = Objective(nn.Linear(4, 4), squares)
    expected = objective.evaluate(pair(), KEY)
    twin = copy.deepcopy(objective)
    objective.model.weight.data.zero_()  # type: ignore[operator, union-attr]
    assert twin.structure is not None
    assert twin.structure.model is twin.model
    assert twin.only({"weight"}).evaluate(pair(), KEY) == expected


def test_a_derived_objective_does_not_scan_the_model():
    objective = Objective(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), squares)
    objective.model.modules = None  # type: ignore[method-assign, assignment]
    derived = objective.in_micro_batches(2).only({"0.weight"}).with_loss(squares)
    assert derived.structure is objective.structure


def test_a_model_with_new_modules_is_examined_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert not Objective(model, clamped_inputs).evaluate(pair(), KEY).isnan()
    model[1] = Stateful([], _append, ATTRIBUTES["a list"][2])
    objective = Objective(model, clamped_inputs)
    assert len({float(objective.evaluate(pair(), KEY)) for _ in range(3)}) == 1


def clamped_inputs(model: nn.Module, batch: Any) -> Tensor:
    return squares(model, batch)


def test_numpy_is_restored_whatever_its_bit_generator_is():
    before: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        for bits in (np.random.PCG64(3), np.random.MT19937(3)):
            np.random.set_bit_generator(bits)  # type: ignore[attr-defined]
            np.random.randn()  # NumPy keeps a second number for the next call
            following = np.random.get_state(legacy=False)
            drawn = []
            for seed in (5, 5, 6):
                with seeded_generators(Key(seed)):
                    drawn.append((np.random.rand(), np.random.randn()))
                assert repr(np.random.get_state(legacy=False)) == repr(following)
            assert drawn[0] == drawn[1] != drawn[2]
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]


def test_first_use_is_remembered_for_a_loss_that_is_made_anew():
    model, calls = nn.Linear(4, 4), []
    model.register_forward_hook(lambda *_: calls.append(1) if recording else None)
    recording = True
    for number in range(3):
        calls.clear()
        Objective(model, lambda m, b: squares(m, b)).evaluate(pair(), Key(number))
        assert len(calls) == 1  # the calls of the examination are undone with all it changes


def test_eval_mode_gives_each_module_its_own_flag_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True, True]
