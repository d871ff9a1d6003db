"""`gradcost.train` with an objective and a loader: a plain loop, of which the Task form is a case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import gradcost
from gradcost.core.batching.batches import Batches
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.tasks import Digits
from gradcost.training import checkpoint

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X.sum(1) > 0).long())


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, 8, **options)


def objective() -> gradcost.Objective:
    torch.manual_seed(0)
    return gradcost.Objective(nn.Linear(4, 2), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))


def weights(objective: gradcost.Objective) -> torch.Tensor:
    return torch.cat([leaf.parameter.detach().flatten() for leaf in objective.leaves])


def test_a_loader_is_read_once_unless_steps_are_given():
    made = objective()
    steps = list(gradcost.train(made, loader(), gradcost.backprop(), gradcost.SGD(0.5)))
    assert [step.number for step in steps] == list(range(7))  # 50 examples in batches of 8
    assert len(list(gradcost.train(made, loader(), gradcost.mezo(), gradcost.SGD(1e-3), steps=20))) == 20


def test_backprop_with_a_list_of_batches_is_a_loop_of_torch_bit_for_bit():
    ours, theirs = objective(), objective()
    batches = [(X[i : i + 8], DATA.tensors[1][i : i + 8]) for i in range(0, 40, 8)]
    for _ in gradcost.train(ours, batches, gradcost.backprop(), gradcost.AdamW(0.01), steps=12):
        pass
    optimizer = torch.optim.AdamW(theirs.model.parameters(), lr=0.01)
    for step in range(12):
        optimizer.zero_grad()
        theirs.loss(theirs.model, batches[step % 5]).backward()
        optimizer.step()
    assert torch.equal(weights(ours), weights(theirs))


def test_the_task_form_is_a_case_of_the_loader_form():
    task, key = Digits(), Key(3)
    ours = task.objective(key.fold("init"))
    batches = [task.batch_at(key.fold("data"), step) for step in range(6)]
    first = list(gradcost.train(ours, batches, gradcost.mezo(), gradcost.SGD(0.01), key))
    second = list(gradcost.train(task, gradcost.mezo(), gradcost.SGD(0.01), key, 6))
    assert [float(step.loss) for step in first] == [float(step.loss) for step in second]
    assert torch.equal(weights(first[-1].objective), weights(second[-1].objective))


def test_the_key_orders_a_shuffled_loader_and_torch_generators_stay():
    batches, again = Batches(loader(shuffle=True)), Batches(loader(shuffle=True))
    before = torch.get_rng_state()
    first = [batches.at(Key(1), step)[0] for step in range(14)]
    torch.manual_seed(99)
    assert all(torch.equal(again.at(Key(1), step)[0], first[step]) for step in (9, 3, 3, 13, 0))
    assert not torch.equal(first[0], first[7]), "each epoch has its own order"
    assert sorted(torch.cat(first[:7]).sum(1).tolist()) == sorted(X.sum(1).tolist())
    assert not torch.equal(again.at(Key(2), 0)[0], first[0])
    torch.set_rng_state(before)
    batches.at(Key(1), 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_far_ahead_reads_the_data_of_its_epoch_alone():
    class Counted(TensorDataset):
        read = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.read += 1
            return super().__getitem__(index)

    def batches() -> Batches:
        return Batches(DataLoader(Counted(X), 4, shuffle=True))

    in_order = batches()
    expected = [in_order.at(Key(1), step)[0] for step in range(60)]
    jumping, Counted.read = batches(), 0
    for step in (0, 25, 26, 59, 12, 13, 50):
        assert torch.equal(jumping.at(Key(1), step)[0], expected[step])
    assert Counted.read <= 6 * len(X)


class Stream(IterableDataset):
    """Rows without a known number."""

    def __iter__(self) -> Iterator[Any]:
        return iter(X)


class Hinted(Stream):
    """Rows with a wrong number, which is a hint in torch."""

    def __len__(self) -> int:
        return len(X) // 2


@pytest.mark.parametrize("rows", [Stream, Hinted])
def test_a_loader_of_unknown_length_trains_for_the_given_steps(rows: type[Stream]):
    loader = DataLoader(rows(), 4)
    objective = gradcost.Objective(nn.Linear(4, 1), lambda model, x: model(x).square().mean())
    assert len(list(gradcost.train(objective, loader, gradcost.backprop(), gradcost.SGD(0.01), Key(1), 9))) == 9
    with pytest.raises(BadInput, match="has no known length, so one pass has no known end: give steps"):
        next(gradcost.train(objective, loader, gradcost.backprop(), gradcost.SGD(0.01)))


def test_the_length_of_a_stream_does_not_determine_its_batches():
    loader = DataLoader(Hinted(), 4)
    one, fresh = Batches(loader), len(list(loader)) + 2
    expected = [one.at(Key(0), step) for step in range(fresh + 1)]
    assert torch.equal(Batches(loader).at(Key(0), fresh), expected[fresh])


def test_training_with_a_loader_resumes_with_the_same_bits(tmp_path):
    whole, first, second = objective(), objective(), objective()
    arguments = (gradcost.mezo(), gradcost.AdamW(0.01), Key(5))
    for _ in gradcost.train(whole, loader(shuffle=True), *arguments, steps=20):
        pass
    last = list(gradcost.train(first, loader(shuffle=True), *arguments, steps=11))[-1]
    checkpoint.write(tmp_path / "c", last.train_state, {})
    for _ in gradcost.train(second, loader(shuffle=True), *arguments, steps=20, resume=tmp_path / "c"):
        pass
    assert torch.equal(weights(whole), weights(second))


SGD = gradcost.SGD(0.1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((gradcost.backprop(), SGD), "the loader is missing: write train(objective, loader, estimator, optimizer)"),
        ((iter([1]), gradcost.backprop(), SGD), "can be read only once"),
        ((3, gradcost.backprop(), SGD), "is of type int, which yields no batches"),
        (([], gradcost.backprop(), SGD), "yields no batch"),
        ((DataLoader(DATA, 64, drop_last=True), gradcost.backprop(), SGD, Key(0), 5), "smaller than one batch"),
        (([1], gradcost.mezo, SGD), "the estimator is mezo, a function: write a value such as gradcost.mezo()"),
        (
            ([1], gradcost.backprop(), torch.optim.SGD([X.clone().requires_grad_()])),
            "the optimizer is of type SGD: give grad",
        ),
        (([1], gradcost.backprop(), SGD, 7), "write gradcost.Key(7)"),
    ],
)
def test_a_wrong_argument_is_a_sentence(arguments: tuple[Any, ...], reason: str):
    with pytest.raises(BadInput) as caught:
        list(gradcost.train(objective(), *arguments))
    assert reason in str(caught.value)


def test_a_model_instead_of_an_objective_is_a_sentence():
    with pytest.raises(BadInput, match="neither an Objective nor a task"):
        gradcost.train(nn.Linear(2, 2), gradcost.backprop(), SGD)  # pyright: ignore[reportArgumentType, reportCallIssue]
