"""Linear layers and embeddings at perturbed weights, in blocks; updates in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian, Orthogonal, Rademacher
from gradcost.directions.sphere import Sphere
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.presets import mezo
from gradcost.noise.add import add_noise, noise
from gradcost.noise.philox import Normals, Signs
from gradcost.slopes.slope import shifted
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState

KEY = Key(3)


class Language(nn.Module):
    """A large embedding and a linear layer of several blocks."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20_000, 32)
        self.linear = nn.Linear(32, 9_001, bias=bias)
        self.head = nn.Linear(9_001, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.linear(self.embedding(tokens))))


def made(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    with seeded_generators(KEY):
        return Language(bias).to(dtype), torch.randint(20_000, (2, 5))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).square().mean()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere(), Orthogonal()], ids=repr)
def test_the_loss_is_that_at_the_perturbed_weights(directions: Any, dtype: torch.dtype, bias: bool):
    model, tokens = made(bias, dtype)
    objective = Objective(model, loss)
    (seed,) = directions.seeds(KEY, 1, objective.dimension)
    weights = {leaf.name: directions.add(leaf.parameter.detach(), leaf, [seed], [0.01]) for leaf in objective.leaves}
    with objective.at_weights(weights):
        expected = objective.evaluate(tokens, KEY)
    found = shifted(objective, tokens, KEY, directions, seed, 0.01)
    torch.testing.assert_close(found, expected, rtol=20 * torch.finfo(dtype).eps, atol=0)


def test_an_embedding_of_few_tokens_and_a_layer_of_one_block_have_the_bits_of_perturbed_weights():
    with seeded_generators(KEY):
        model, tokens = nn.Sequential(nn.Embedding(20_000, 32), nn.Linear(32, 8)), torch.tensor([[7, 7, 19_999, 0]])
    objective = Objective(model, loss)
    weights = {leaf.name: Gaussian().add(leaf.parameter.detach(), leaf, [5], [0.01]) for leaf in objective.leaves}
    with objective.at_weights(weights):
        expected = objective.evaluate(tokens, KEY)
    assert torch.equal(shifted(objective, tokens, KEY, Gaussian(), 5, 0.01), expected)


def test_the_blocks_hold_at_most_a_mebibyte_beside_small_activations(monkeypatch: pytest.MonkeyPatch):
    model, tokens = made()
    objective, sizes = Objective(model, loss), []
    add = Gaussian.add

    def recorded(self: Gaussian, base: Tensor, *rest: Any, **named: Any) -> Tensor:
        sizes.append(base.numel())
        return add(self, base, *rest, **named)

    mezo().estimate(objective, tokens, KEY)  # the checks at first use perturb whole weights
    monkeypatch.setattr(Gaussian, "add", recorded)
    mezo().estimate(objective, tokens, KEY)
    assert max(sizes) <= 1 << 18
    assert 32 in sizes, "the embedding is perturbed row by row"


def test_padding_and_other_uses_of_a_weight_take_the_plain_path():
    """Both weights are read by functions that the blocks do not serve, too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20_000, 32, padding_idx=0)
            self.linear = nn.Linear(32, 20_000, bias=False)
            self.linear.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.embedding(tokens)
            return self.linear(hidden).square().mean() + self.linear.weight.square().mean()

    with seeded_generators(KEY):
        model, tokens = Tied().double(), torch.tensor([[0, 3, 19_999]])
    objective = Objective(model, lambda model, tokens: model(tokens))
    (leaf,) = objective.leaves
    z = Gaussian().draw(leaf, [5], [1.0])
    weight = leaf.parameter.detach()
    table = weight + 0.01 * z
    table[0] = weight[0]  # the padding row of the embedding is constant
    expected = (F.embedding(tokens, table) @ (weight + 0.01 * z).T).square().mean() + (
        weight + 0.01 * z
    ).square().mean()
    torch.testing.assert_close(shifted(objective, tokens, KEY, Gaussian(), 5, 0.01), expected)


@pytest.mark.parametrize("stream", [Signs(), Normals()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_noise_is_that_added_to_zeros(stream: Any, dtype: torch.dtype):
    zero = torch.zeros(3, 333, dtype=dtype)
    assert torch.equal(noise(stream, [1, 2], [0.3, -2.0], 77, zero), add_noise(stream, [1, 2], [0.3, -2.0], 77, zero))
    assert torch.equal(noise(stream, [], [], 77, zero), zero)


def test_pieces_are_the_bits_of_the_gradient():
    objective = Objective(made()[0], loss)
    gradient = Seeded(objective, Gaussian(), (3, 4), (0.5, -2.0))
    whole = {name: torch.full((leaf.numel(),), torch.nan) for name, leaf in gradient.leaves()}
    for name, start, piece in gradient.pieces():
        assert piece.numel() <= 1 << 18
        whole[name][start : start + piece.numel()] = piece
    for name, tensor in gradient.leaves():
        assert torch.equal(whole[name].view(tensor.shape), tensor)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_in_pieces_has_the_bits_of_torch(decay: float):
    models, tokens = [made()[0] for _ in range(2)], made()[1]
    state = TrainState(Objective(models[0], loss), mezo(), SGD(0.1, decay=decay))
    assert state.leafwise is not None
    assert state.leafwise.takes_pieces
    optimizer = torch.optim.SGD(models[1].parameters(), 0.1)
    other = Objective(models[1], loss)
    for number in range(2):
        key = KEY.fold("step", number)
        state.step(tokens, key)
        mezo().estimate(other, tokens, key).gradient.write()
        optimizer.param_groups[0]["lr"] = 0.1 * torch.exp(torch.tensor(-decay * number, dtype=torch.float64)).item()
        optimizer.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_with_state_gets_whole_gradients():
    objective = Objective(made()[0], loss)
    for optimizer in (SGD(0.1, momentum=0.9), SGD(0.1, weight_decay=0.1), gradcost.Adam(0.1)):
        leafwise = TrainState(objective, mezo(), optimizer).leafwise
        assert leafwise is not None
        assert not leafwise.takes_pieces


def test_a_forecast_sees_the_same_blocks_and_rows():
    model, tokens = made()
    told = gradcost.forecast(mezo(), Objective(model, loss), tokens, SGD(0.1))
    work = gradcost.instruments.TrainingStep(Objective(model, loss), tokens, mezo(), SGD(0.1))
    found = gradcost.measure(work, gradcost.instruments.Bytes()).memory
    assert found is not None
    assert told.peak == found.peak
    largest = max(leaf.parameter.nbytes for leaf in Objective(model, loss).leaves)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert found.peak - weights < 1.5 * 2**20 < largest  # a block, a piece and activations
