"""Situations in which a training differs from torch's loop without a word: state outside the weights, losses that are
not numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gradcost.core.errors import BadInput
from gradcost.core.evaluation.next_state import moving
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, checkpointed, forward_gradient, hizoo, mezo
from gradcost.instruments.measure import Bytes, Operations, TrainingStep, measure
from gradcost.planning.forecast import forecast
from gradcost.training import checkpoint
from gradcost.training.loop import train
from gradcost.training.optimizers import SGD, AdamW
from gradcost.training.train_state import TrainState

KEY = Key(3)
STEPS = 5


class Running(nn.Module):
    """A normaliser that updates an average of sizes in a forward pass, and divides by it."""

    size: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("size", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            with torch.no_grad():
                self.size.mul_(0.9).add_(0.1 * y.abs().mean(0))
        return y / self.size


class Replaced(Running):
    """The same with a new tensor at each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.size = 0.9 * self.size + 0.1 * y.detach().abs().mean(0)
        return y / self.size


class Queue(nn.Module):
    """A queue of the last features, with a pointer, as in MoCo."""

    queue: Tensor
    at: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("queue", torch.zeros(12, 6))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        mean = self.queue.mean(0)
        with torch.no_grad():
            self.queue[(torch.arange(len(x)) + self.at) % 12] = y
            self.at.add_(len(x))
        return y - mean


class Stateful(nn.Module):
    """A recurrent layer that keeps its state in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 6)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros(len(x), 6, dtype=x.dtype) if self.state is None else self.state
        after = self.cell(x, before)
        self.state = after.detach()
        return after


class Counting(nn.Module):
    """A layer that scales by the number of its calls, a plain number, and logs them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.calls = 0
        self.sizes: list[float] = [1.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.linear(x) * (1 + 1 / self.calls) / self.sizes[-1]
        self.sizes.append(0.9 * self.sizes[-1] + 0.1 * float(y.detach().abs().mean()))
        return y


class Held:
    """An object that holds a value."""

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(slots=True)
class Slotted:
    """An object that holds a value in a slot."""

    value: Any


class InDictionary(nn.Module):
    """A layer that keeps an average of sizes in a dictionary, and divides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.kept: Any = {"size": torch.ones(6, dtype=torch.double)}

    @property
    def state(self) -> Any:
        return self.kept["size"]

    def keep(self, size: Tensor) -> None:
        self.kept["size"] = size

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.keep(0.9 * torch.as_tensor(self.state) + 0.1 * y.detach().abs().mean(0))
        return y / torch.as_tensor(self.state)


class InObject(InDictionary):
    """The same in an object that each forward pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Held(torch.ones(6, dtype=torch.double))

    @property
    def state(self) -> Any:
        return self.kept.value

    def keep(self, size: Tensor) -> None:
        self.kept = Held(size)


class InSlots(InObject):
    """The same in an object without a `__dict__`."""

    def keep(self, size: Tensor) -> None:
        self.kept = Slotted(size)


class InQueue(InDictionary):
    """The same in a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = deque([torch.ones(6, dtype=torch.double)])

    @property
    def state(self) -> Any:
        return self.kept[0]

    def keep(self, size: Tensor) -> None:
        self.kept = deque([size])


class InArray(InDictionary):
    """The same in an array of NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = np.ones(6)

    @property
    def state(self) -> Any:
        return self.kept.tolist()

    def keep(self, size: Tensor) -> None:
        self.kept = size.numpy()


class Features(nn.Module):
    """Layers whose outputs hooks collect in a dictionary. Each pass replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.features: dict[str, Tensor] = {}
        for name, layer in self.layers.named_children():
            layer.register_forward_hook(lambda module, args, output, name=name: self.features.update({name: output}))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y + sum(feature.abs().mean() for feature in self.features.values())


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
    "cumulative batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None)),
    "spectral norm": lambda: spectral_norm(nn.Linear(6, 6)),
    "hooked spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "running average": Running,
    "replaced buffer": Replaced,
    "queue": Queue,
    "hidden state": Stateful,
    "counter and list": Counting,
    "dictionary": InDictionary,
    "object": InObject,
    "object with slots": InSlots,
    "replaced queue": InQueue,
    "array": InArray,
}


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Job:
    """Train `model` on batches of random numbers."""

    def __init__(self, model: nn.Module, loss: Any = square) -> None:
        self.model, self.loss = model, loss

    def objective(self, key: Key) -> Objective:
        return Objective(self.model, self.loss)

    def batch_at(self, key: Key, step: int) -> Any:
        draw = torch.Generator().manual_seed(step)
        return tuple(torch.randn(5, 6, generator=draw).double() for _ in range(2))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name](), nn.Tanh(), nn.Linear(6, 6)).double()


def state_of(model: nn.Module) -> dict[str, Any]:
    state = dict(model.state_dict())
    for module in model.modules():
        state |= {name: getattr(module, name) for name in ("state", "calls", "sizes") if hasattr(module, name)}
    return state


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name in first:
        same = (
            torch.equal(first[name], second[name]) if isinstance(first[name], Tensor) else first[name] == second[name]
        )
        assert same, name


@pytest.mark.parametrize("name", LAYERS)
def test_training_moves_weights_buffers_and_attributes_as_torch_does_bit_for_bit(name: str):
    ours, theirs = Job(made(name)), made(name)
    optimizer = torch.optim.AdamW(theirs.parameters(), 0.01)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = square(theirs, ours.batch_at(KEY, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = [step.loss for step in train(ours, backprop(), AdamW(0.01), KEY, STEPS)]
    assert_same_state(ours.model, theirs)
    assert torch.equal(torch.stack(found), torch.stack(losses))


@pytest.mark.parametrize("name", LAYERS)
def test_ones_own_loop_with_advance_moves_them_as_torch_does_bit_for_bit(name: str):
    ours, theirs = Job(made(name)), made(name)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours.model, theirs)]
    objective, estimator = ours.objective(KEY), backprop()
    for step in range(STEPS):
        batch = ours.batch_at(KEY, step)
        estimator.estimate(objective, batch, KEY.fold("step", step)).gradient.write()
        objective.advance(batch, KEY.fold("step", step))
        optimizers[0].step()
        optimizers[1].zero_grad()
        square(theirs, batch).backward()
        optimizers[1].step()
    assert_same_state(ours.model, theirs)


class Teacher(nn.Module):
    """A module outside of the model, in training mode, whose statistics move too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def distilling(teacher: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[1])
        return (model(batch[0]) - target).square().mean()

    return loss


def test_a_teacher_in_the_loss_moves_its_statistics_as_in_torch():
    teachers = [Teacher().double() for _ in range(2)]
    ours = Job(made("batch norm"), distilling(teachers[0]))
    theirs, loss = made("batch norm"), distilling(teachers[1])
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(theirs, ours.batch_at(KEY, step)).backward()
        optimizer.step()
    for _ in train(ours, backprop(), SGD(0.1), KEY, STEPS):
        pass
    assert_same_state(ours.model, theirs)
    assert_same_state(*teachers)


MOVED_IN_FORECASTS = ["batch norm", "spectral norm", "running average", "replaced buffer", "queue"]
MOVED_IN_FORECASTS += ["dictionary", "object", "object with slots", "replaced queue"]


@pytest.mark.parametrize("name", [*MOVED_IN_FORECASTS, "features"])
@pytest.mark.parametrize("estimator", [backprop(), mezo(), forward_gradient()], ids=str)
def test_a_forecast_counts_what_a_step_moves_or_collects(name: str, estimator: Estimator):
    job = Job(Features().double() if name == "features" else made(name))
    told = forecast(estimator, job.objective(KEY), job.batch_at(KEY, 0), SGD(0.1))
    work = TrainingStep(job.objective(KEY), job.batch_at(KEY, 0), estimator, SGD(0.1))
    found = measure(work, Bytes(), Operations())
    assert found.memory is not None
    assert found.counts is not None
    assert (told.peak, told.flops) == (found.memory.peak, found.counts.flops)


@pytest.mark.parametrize("name", LAYERS)
def test_a_step_that_raises_moves_no_buffer(name: str):
    def raises(key: str, gradient: Tensor) -> None:
        raise KeyboardInterrupt

    job = Job(made(name))
    train_state = TrainState(job.objective(KEY), backprop(), SGD(0.1))
    train_state.step(job.batch_at(KEY, 0), KEY)
    before = made(name)
    before.load_state_dict(job.model.state_dict(), strict=False)
    kept = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state_of(job.model).items()}
    assert train_state.leafwise is not None
    train_state.leafwise.use = raises  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train_state.step(job.batch_at(KEY, 1), KEY)
    for key, value in state_of(job.model).items():
        assert torch.equal(value, kept[key]) if isinstance(value, Tensor) else value == kept[key], key


def test_features_that_the_next_pass_replaces_are_not_kept():
    job = Job(Features().double())
    assert not moving(job.objective(KEY), job.batch_at(KEY, 0), KEY)
    for _ in train(job, backprop(), SGD(0.1), KEY, STEPS):
        assert not job.model.features


def test_a_model_whose_forward_changes_nothing_takes_no_further_pass_after_the_first_step():
    passes = []
    model = made("batch norm").eval()
    model.register_forward_hook(lambda *_: passes.append(None))
    job = Job(model)
    train_state = TrainState(job.objective(KEY), backprop(), SGD(0.1))
    counts = []
    for step in range(3):
        passes.clear()
        train_state.step(job.batch_at(KEY, step), KEY)
        counts.append(len(passes))
    assert counts[1:] == [1, 1]
    model.train()
    passes.clear()
    train_state.step(job.batch_at(KEY, 3), KEY)
    train_state.step(job.batch_at(KEY, 4), KEY)
    passes.clear()
    train_state.step(job.batch_at(KEY, 5), KEY)
    assert len(passes) == 2


# ---- losses that are not numbers


def tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Labels(Job):
    """Step 2 has a batch without targets; its mean is 0/0."""

    def batch_at(self, key: Key, step: int) -> Any:
        x, _ = super().batch_at(key, step)
        y = torch.randint(6, (5,), generator=torch.Generator().manual_seed(step))
        return x, torch.full_like(y, -100) if step == 2 else y


QUIET = nullcontext()
EVERY = {
    "backprop": backprop(),
    "checkpointed": checkpointed(),
    "accumulated": Accumulated(backprop(), 2),
    "mezo": mezo(),
    "accumulated mezo": Accumulated(mezo(), 2),
    "forward gradient": forward_gradient(2),
    "hizoo": hizoo(),
}


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_without_targets_moves_nothing_and_training_goes_on(name: str):
    job = Labels(made("batch norm"), tokens)
    optimizer = SGD(0.1, momentum=0.9, weight_decay=0.1)
    before, losses = {}, []
    steps = train(job, EVERY[name], optimizer, KEY, 5)
    for number in range(5):
        with pytest.warns(Note, match="a step was skipped: the loss of this batch is nan") if number == 2 else QUIET:
            step = next(steps)
        losses.append(float(step.loss))
        state = {key: value.clone() for key, value in job.model.state_dict().items()}
        if step.number == 2:
            assert all(torch.equal(state[key], before[key]) for key in state)
            assert step.slopes is None
        before = state
    assert [math.isfinite(loss) for loss in losses] == [True, True, False, True, True]
    assert all(bool(value.isfinite().all()) for value in before.values())


@pytest.mark.parametrize("name", EVERY)
def test_an_estimate_of_a_loss_that_is_not_a_number_is_refused(name: str):
    job = Labels(made("batch norm"), tokens)
    with pytest.raises(ValueError, match="the loss of this batch is nan, so its gradient cannot be applied"):
        EVERY[name].estimate(job.objective(KEY), job.batch_at(KEY, 2), KEY)


def test_one_end_of_a_difference_that_is_infinite_moves_nothing():
    def loss(model: nn.Module, batch: Any) -> Tensor:
        total = square(model, batch)
        return torch.where(model[2].weight[0, 0] > 0.25, total * math.inf, total)  # type: ignore[index]

    model: Any = made("batch norm").eval()
    with torch.no_grad():
        model[2].weight[0, 0] = 0.25
    job = Job(model, loss)
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(Note, match="a step was skipped: the loss of this batch is"):
        steps = list(train(job, mezo(1e-3), SGD(0.1), KEY, 1))
    assert not math.isfinite(float(steps[0].loss))
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(model.parameters(), weights, strict=True))


def test_a_gradient_that_is_not_a_number_is_told_at_the_next_step_or_at_the_end():
    """The loss is finite, but its derivative is inf * 0."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return square(model, batch) + (model[2].bias * 0).abs().sqrt().sum()  # type: ignore[index]

    for steps, message in ((2, "a step was skipped: .*`2.bias` is not finite"), (1, "`2.bias` is not finite")):
        model = made("batch norm").eval()
        with pytest.warns(Note, match=message):
            list(train(Job(model, loss), backprop(), SGD(0.1), KEY, steps))


@pytest.mark.parametrize("name", [*(name for name in LAYERS if not name.startswith("object")), "teacher"])
def test_a_training_resumes_with_the_state_that_it_moved_bit_for_bit(name: str, tmp_path: Any):
    def trained(steps: int, path: Any = None) -> tuple[nn.Module, ...]:
        teacher = Teacher().double()
        job = Job(made("batch norm"), distilling(teacher)) if name == "teacher" else Job(made(name))
        for step in train(job, backprop(), SGD(0.1), KEY, steps, path):
            if path is not None and step.number == 2:
                checkpoint.write(path, step.train_state)
        return job.model, teacher

    path = tmp_path / "checkpoint"
    trained(3, path)
    for resumed, whole in zip(trained(STEPS, path), trained(STEPS), strict=True):
        assert_same_state(resumed, whole)


@pytest.mark.parametrize(("name", "kind"), [("object", "Held"), ("object with slots", "Slotted")])
def test_a_state_that_no_checkpoint_can_store_is_named(name: str, kind: str, tmp_path: Any):
    step = next(iter(train(Job(made(name)), backprop(), SGD(0.1), KEY, 2, tmp_path / "checkpoint")))
    with pytest.raises(BadInput, match=f"cannot store a {kind}: use tuples, lists, queues, dictionaries, sets, num"):
        checkpoint.write(tmp_path / "checkpoint", step.train_state)
