"""The blocks of a model: found where something is repeated, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from gradcost.core.blocks import find_blocks


class Holds(nn.Module):
    """A model of its own around what it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return x


def linear() -> nn.Linear:
    return nn.Linear(3, 3)


def shapes(model: nn.Module) -> list[list[str]]:
    return [[type(module).__name__ for module in block] for block in find_blocks(model)]


def test_a_sequential_is_cut_at_each_child_that_trains():
    model = nn.Sequential(nn.Flatten(), linear(), nn.ReLU(), nn.Dropout(), linear(), nn.Tanh(), linear())
    assert shapes(model) == [["Flatten", "Linear", "ReLU", "Dropout"], ["Linear", "Tanh"], ["Linear"]]


def test_the_blocks_of_a_sequential_are_all_of_its_children_in_order():
    model = nn.Sequential(linear(), nn.ReLU(), nn.BatchNorm1d(3), nn.ReLU(), linear())
    assert [module for block in find_blocks(model) for module in block] == list(model)


def test_a_module_list_of_one_class_is_a_chain():
    layers = nn.ModuleList([Holds(a=linear()) for _ in range(3)])
    assert find_blocks(Holds(embed=nn.Embedding(5, 3), layers=layers)) == [(layer,) for layer in layers]


@pytest.mark.parametrize(
    "model",
    [
        linear(),
        Holds(a=linear(), b=linear()),
        nn.Sequential(linear(), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Tanh()),
        nn.Sequential(),
        nn.ModuleList([linear()]),
        nn.ModuleList([linear(), nn.LayerNorm(3)]),
        nn.ModuleList(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_repeats_nothing_has_no_blocks(model: nn.Module):
    assert find_blocks(model) == []


def test_the_outermost_chain_wins_and_its_blocks_are_not_looked_into():
    block = nn.Sequential(linear(), nn.ReLU(), linear())
    model = nn.ModuleList([block, nn.Sequential(linear(), linear())])
    assert find_blocks(model) == [(model[0],), (model[1],)]


def test_what_is_no_chain_is_looked_into():
    deep = Holds(body=Holds(encoder=nn.ModuleList([linear(), linear()])), head=nn.Sequential(linear(), linear()))
    assert shapes(deep) == [["Linear"]] * 4
    mixed = nn.ModuleList([nn.Sequential(linear(), linear()), Holds(a=linear())])
    assert shapes(mixed) == [["Linear"], ["Linear"]]


def test_frozen_parameters_count_as_parameters():
    """What is saved and recomputed does not depend on what trains: a frozen base is a chain too."""
    model = nn.Sequential(linear(), nn.ReLU(), linear()).requires_grad_(False)
    assert len(find_blocks(model)) == 2


@pytest.mark.parametrize("layers", [2, 4])
def test_a_transformers_models_layers_are_found(layers: int):
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
    }
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    )
    assert find_blocks(llama) == [(layer,) for layer in llama.model.layers]
