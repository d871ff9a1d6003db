"""Random generators that a loader, its sampler or its data set own: the key of `train` determines their draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import gradcost
from gradcost import SGD, Key, Objective, train
from gradcost.core.batching.batches import Batches
from gradcost.training import checkpoint

DATA = TensorDataset(torch.arange(12.0).reshape(12, 1))
in_a_global = np.random.default_rng(5)


class Augmented(Dataset[Any]):
    def __init__(self, generator: Any, draw: Callable[[Any], Any]) -> None:
        self.options = {"generator": generator}
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (torch.tensor([index + float(self.draw(self.options["generator"]))]),)


class OneByOne(Sampler[int]):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[int]:
        for _ in range(12):
            yield int(torch.randint(12, (), generator=self.generator))

    def __len__(self) -> int:
        return 12


class OwnLoader:
    def __init__(self) -> None:
        self.generator = random.Random(3)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(3):
            yield (torch.tensor([[self.generator.random()]]),)

    def __len__(self) -> int:
        return 3


class OwnSequence(Sequence[Any]):
    def __init__(self) -> None:
        self.generator = random.Random(3)

    def __getitem__(self, index: Any) -> Any:
        return (torch.tensor([[index + self.generator.random() + random.random()]]),)

    def __len__(self) -> int:
        return 3


def shifted(examples: Any, generator: Any = None) -> Any:
    shift = (in_a_global if generator is None else generator).normal()
    return (torch.cat([x for (x,) in examples])[:, None] + shift,)


def torch_generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "generator": lambda: DataLoader(DATA, 4, shuffle=True, generator=torch_generator()),
    "sampler": lambda: DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=torch_generator())),
    "weighted": lambda: DataLoader(
        DATA, 4, sampler=WeightedRandomSampler([1.0] * 12, 12, generator=torch_generator())
    ),
    "batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=torch_generator()), 4, False)
    ),
    "own sampler": lambda: DataLoader(DATA, 4, sampler=OneByOne()),
    "NumPy": lambda: DataLoader(Augmented(np.random.default_rng(0), lambda g: g.normal()), 4),
    "RandomState": lambda: DataLoader(Augmented(np.random.RandomState(0), lambda g: g.normal()), 4),
    "random": lambda: DataLoader(Augmented(random.Random(0), lambda g: g.gauss(0, 1)), 4),
    "torch": lambda: DataLoader(Augmented(torch_generator(), lambda g: torch.randn((), generator=g)), 4),
    "subset": lambda: DataLoader(Subset(Augmented(random.Random(0), lambda g: g.random()), range(12)), 4),
    "collate": lambda: DataLoader(DATA, 4, collate_fn=partial(shifted, generator=np.random.default_rng(1))),
    "global": lambda: DataLoader(DATA, 4, collate_fn=shifted),
    "workers": lambda: DataLoader(
        Augmented(np.random.default_rng(0), lambda g: g.normal()), 4, True, num_workers=1, generator=torch_generator()
    ),
    "own loader": OwnLoader,
    "own sequence": OwnSequence,
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0] / 12).square().mean()


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_two_estimators_trained_with_one_key_get_equal_batches(loader: Callable[[], Iterable[Any]]):
    given = loader()
    drawn = [
        [step.batch[0].tolist() for step in train(Objective(model(), loss), given, e, SGD(0.1), Key(0), steps=7)]
        for e in (gradcost.backprop(), gradcost.mezo())
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0][:3] != drawn[0][3:6]  # another order or other draws in each epoch
    other = train(Objective(model(), loss), given, gradcost.backprop(), SGD(0.1), Key(1), steps=7)
    assert [step.batch[0].tolist() for step in other] != drawn[0]


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_resumed_run_gets_the_batches_of_an_uninterrupted_one(loader: Callable[[], Iterable[Any]], tmp_path: Path):
    def weights(file: Path, *stops: int) -> Tensor:
        trained = model()
        for stop in stops:
            trained = model()
            for step in train(
                Objective(trained, loss), loader(), gradcost.backprop(), SGD(0.1), Key(0), steps=stop, resume=file
            ):
                checkpoint.write(file, step.train_state)
        return torch.cat([p.detach().flatten() for p in trained.parameters()])

    assert torch.equal(weights(tmp_path / "a", 9), weights(tmp_path / "b", 2, 5, 9))


def test_the_generators_of_a_loader_are_as_before_after_each_batch():
    of_loader, of_data = torch_generator(), np.random.default_rng(0)
    before = of_loader.get_state(), of_data.bit_generator.state
    loader = DataLoader(Augmented(of_data, lambda g: g.normal()), 4, shuffle=True, generator=of_loader)
    batches = Batches(loader)
    for step in (0, 1, 5):
        batches.at(Key(0), step)
        assert torch.equal(of_loader.get_state(), before[0])
        assert of_data.bit_generator.state == before[1]


def test_a_generator_of_the_operating_system_is_left_alone():
    loader = DataLoader(Augmented(random.SystemRandom(), lambda g: g.random()), 4)
    assert len(Batches(loader).at(Key(0), 0)[0]) == 4
