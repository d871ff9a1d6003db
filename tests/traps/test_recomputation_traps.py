"""A block that runs again is given the state that it ran in, or is not recomputed and named, or is refused."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gradcost.checkpointing.policies import (
    Attention,
    Blocks,
    Matmuls,
    Offloaded,
    Saving,
    Schedule,
    Segments,
    Selective,
)
from gradcost.core import memory_events
from gradcost.core.errors import Unsupported
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.notes import Note
from gradcost.core.objective import Objective
from gradcost.estimators.reverse import Reverse
from gradcost.planning.forecast import forecast
from gradcost.planning.within import Within
from vectors import assert_same_estimate

KEY, WIDTH = Key(12), 6
SAVINGS = [
    Blocks(),
    Segments(1),
    Segments(2),
    Schedule((((1,), 1), (2,))),
    Selective(),
    Selective((Attention(),)),
    Selective((Matmuls(),)),
    Offloaded(),
]
Made = tuple[nn.Module, Any]


class Chain(nn.Module):
    """Four blocks. `call` runs a block: (block, x, number) -> x."""

    def __init__(
        self, block: Callable[[], nn.Module], call: Callable[..., Any] | None = None, rounds: int = 1
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.call = call or (lambda block, x, number: block(x))
        self.rounds = rounds

    def forward(self, x: Any) -> Tensor:
        for _ in range(self.rounds):
            for number, block in enumerate(self.blocks):
                x = self.call(block, x, number)
        return x


class Layer(nn.Module):
    """A block with one linear layer; subclasses change `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return x + torch.tanh(self.linear(x))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh())


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def rows() -> Any:
    return torch.randn(5, WIDTH), torch.randn(5, WIDTH)


def sequences() -> Any:
    return torch.randn(3, 4, WIDTH), torch.randn(3, 4, WIDTH)


def assert_same_bits(objective: Objective, batch: Any, saving: Saving, key: Key = KEY) -> None:
    assert_same_estimate(Reverse(), Reverse(saving), objective, batch, key)


def made(make: Callable[[], Made], loss: Callable[..., Tensor] = squares) -> tuple[Objective, Any]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with seeded_generators(KEY):
            model, batch = make()
        return Objective(model, loss), batch
    finally:
        torch.set_default_dtype(default)


# ---- draws


def draws_between_blocks() -> Made:
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        _ = torch.rand(3), random.random(), np.random.rand(2)
        return block(F.dropout(x, 0.2))

    return Chain(dropping, call), rows()


def layers_left_out_by_torch() -> Made:
    return Chain(dropping, lambda block, x, number: x if torch.rand([]) < 0.5 else block(x)), rows()


def layers_left_out_by_python() -> Made:
    return Chain(dropping, lambda block, x, number: x if random.random() < 0.5 else block(x)), rows()


def python_and_numpy_draw_in_a_block() -> Made:
    class Drawing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x * (1 + random.random()) * (1 + np.random.randn())))

    return Chain(Drawing), rows()


def generators_of_a_block() -> Made:
    class Drawing(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.torch, self.python = torch.Generator().manual_seed(3), random.Random(1)
            self.numpy = np.random.default_rng(2)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rand(WIDTH, generator=self.torch) + self.python.random() + self.numpy.random()
            return x + torch.tanh(self.linear(x * scale))

    return Chain(Drawing), rows()


def noise_that_is_saved_before_it_is_drawn() -> Made:
    return Chain(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RReLU())), rows()


def rrelu_as_a_function() -> Made:
    class Drawing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return F.rrelu(self.linear(x), training=True)

    return Chain(Drawing), rows()


# ---- state of modules


def spectral_norm() -> Made:
    return Chain(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())), rows()


def spectral_norm_by_a_hook() -> Made:
    return Chain(lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))), rows()


def spectral_norm_cached() -> Made:
    class Cached(Chain):
        def forward(self, x: Any) -> Tensor:
            with parametrize.cached():
                return super().forward(x)

    return Cached(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))), rounds=2), rows()


class Average(Layer):
    """Keeps a running mean; a subclass defines how it is written."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.move(y.detach().abs().mean(0))
        return torch.tanh(y / self.mean.clone())

    def move(self, mean: Tensor) -> None:
        self.mean.mul_(0.9).add_(mean, alpha=0.1)


class AverageData(Average):
    def move(self, mean: Tensor) -> None:
        self.mean.data.mul_(0.9).add_(mean, alpha=0.1)


class AverageRebound(Average):
    def move(self, mean: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * mean


def a_buffer_written_in_place() -> Made:
    return Chain(Average), rows()


def a_buffer_written_by_data() -> Made:
    return Chain(AverageData), rows()


def a_buffer_rebound() -> Made:
    return Chain(AverageRebound), rows()


def codebooks() -> Made:
    class Quantising(Layer):
        codes: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randn(4, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.linear(x)
            nearest = F.one_hot(torch.cdist(y.detach(), self.codes).argmin(1), 4).to(y)
            self.codes.data.copy_(0.8 * self.codes + 0.2 * nearest.t() @ y.detach())
            return y + (nearest @ self.codes.clone() - y).detach()

    return Chain(Quantising), rows()


def state_in_attributes() -> Made:
    class Remembering(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.calls, self.log, self.table = None, 0, [], {"scale": 1.0}
            self.row = torch.ones(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.log.append(self.calls)
            self.table["scale"] *= 1.1
            self.row.mul_(0.9)
            hidden = x if self.hidden is None else self.hidden
            self.hidden = torch.tanh(self.linear(x) + hidden).detach()
            return x + len(self.log) * self.table["scale"] * torch.tanh(self.linear(x * self.row.clone()) + hidden)

    return Chain(Remembering), rows()


def an_object_that_the_model_changes_between_blocks() -> Made:
    class Context:
        number = 0

    context = Context()

    class Reading(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.context = context

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x)).square() * (self.context.number + 1)

    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        context.number = number
        return block(x)

    return Chain(Reading, call), rows()


def a_mode_that_changes_between_blocks() -> Made:
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        block.train(number % 2 == 0)
        return block.train(number % 2 == 0)(x) if number else block.eval()(x)

    class Modal(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)).square() if self.training else torch.sigmoid(self.linear(x)).square()

    def and_back(block: nn.Module, x: Tensor, number: int) -> Tensor:
        x = call(block, x, number)
        block.train()
        return x

    return Chain(Modal, and_back), rows()


def fast_weights() -> Made:
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        weights = {name: 1.5 * parameter for name, parameter in block.named_parameters()}
        return torch.func.functional_call(block, weights, (x,))

    return Chain(Layer, call), rows()


# ---- settings


def autocast_that_differs_between_blocks() -> Made:
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
            return block(x.float()).double()

    return Chain(lambda: Layer().float(), call), rows()


def attention_kernels_that_differ_between_blocks() -> Made:
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return block(x)

    return Chain(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True), call), sequences()


# ---- what blocks are given


class State:
    def __init__(self, x: Tensor) -> None:
        self.x, self.depth, self.log = x, 0, []


class StateChain(Chain):
    """Blocks are given one object, from `start(x)` to `end(state)`."""

    start: Any = State

    def forward(self, x: Any) -> Tensor:
        return self.end(super().forward(self.start(x)))

    def end(self, state: Any) -> Tensor:
        return state.x


def an_object_changed_in_place() -> Made:
    class Changing(Layer):
        def forward(self, x: State) -> State:
            x.depth += 1
            x.x = x.x + torch.tanh(self.linear(x.x)).square() * x.depth
            x.log.append(x.x)
            return x

    class Logging(StateChain):
        def end(self, state: Any) -> Tensor:
            return state.x + sum(state.log)

    return Logging(Changing), rows()


def an_object_that_is_not_returned() -> Made:
    class Changing(Layer):
        def forward(self, x: State) -> None:
            x.x = x.x + torch.tanh(self.linear(x.x)).square()

    def call(block: nn.Module, x: State, number: int) -> State:
        block(x)
        return x

    return StateChain(Changing, call), rows()


@dataclass(frozen=True)
class Carried:
    x: Tensor
    depth: int
    table: dict[str, int]


def a_dataclass_with_a_dictionary() -> Made:
    class Carrying(Layer):
        def forward(self, x: Carried) -> Carried:
            x.table["calls"] += 1
            return Carried(x.x + torch.tanh(self.linear(x.x)).square() * x.table["calls"], x.depth + 1, x.table)

    class CarryingChain(StateChain):
        start = staticmethod(lambda x: Carried(x, 0, {"calls": 0}))

    return CarryingChain(Carrying), rows()


class Slotted:
    __slots__ = ("depth", "x")


def an_object_with_slots() -> Made:
    class Changing(Layer):
        def forward(self, x: Slotted) -> Slotted:
            x.x, x.depth = x.x + torch.tanh(self.linear(x.x)).square() * x.depth, x.depth + 1
            return x

    def start(x: Tensor) -> Slotted:
        state = Slotted()
        state.x, state.depth = x, 1
        return state

    class SlottedChain(StateChain):
        start = staticmethod(lambda x: start(x))

    return SlottedChain(Changing), rows()


def packed_sequences() -> Made:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.gru(x)[0]

    class PackedChain(Chain):
        def forward(self, x: Any) -> Tensor:
            packed = pack_padded_sequence(x, torch.tensor([4, 3, 2]), batch_first=True)
            return pad_packed_sequence(super().forward(packed), batch_first=True)[0]  # type: ignore[arg-type]

    return PackedChain(Recurrent), sequences()


def an_output_that_the_model_changes_in_place() -> Made:
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        return block(x).mul_(0.5) if number % 2 else block(x).relu_()

    return Chain(Layer, call), rows()


class Cache:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def get_seq_length(self) -> int:
        return sum(map(len, self.rows))


class Attending(Layer):
    def forward(self, x: Tensor, past_key_values: Cache | None = None) -> Tensor:
        rows = [x] if past_key_values is None else [*past_key_values.rows, x]
        if past_key_values is not None:
            past_key_values.rows.append(x)
        keys = torch.cat(rows)
        return x + torch.tanh(self.linear((x @ keys.t()).softmax(-1) @ keys))


class Prefixed(nn.Module):
    """Each block has a cache of its own that begins with a trained prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(3, WIDTH))
        self.blocks = nn.ModuleList([Attending() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            cache = Cache()
            cache.rows.append(self.prefix)
            x = block(x, past_key_values=cache)
        return x


def a_cache_with_a_trained_prefix() -> Made:
    return Prefixed(), rows()


def a_cache_that_the_next_part_reads() -> Made:
    class InParts(Chain):
        def forward(self, x: Any) -> Tensor:
            caches = [Cache() for _ in self.blocks]
            return torch.cat([self.part(part, caches) for part in x.split(2)])

        def part(self, x: Tensor, caches: list[Cache]) -> Tensor:
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, past_key_values=cache)
            return x

    return InParts(Attending), rows()


def recurrent_layers(kind: Any) -> Made:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return Chain(First), sequences()


def gru() -> Made:
    return recurrent_layers(nn.GRU)


def lstm() -> Made:
    return recurrent_layers(nn.LSTM)


def rnn() -> Made:
    return recurrent_layers(nn.RNN)


def products_overwritten_in_place() -> Made:
    return Chain(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))), rows()


SITUATIONS: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        draws_between_blocks,
        layers_left_out_by_torch,
        layers_left_out_by_python,
        python_and_numpy_draw_in_a_block,
        generators_of_a_block,
        noise_that_is_saved_before_it_is_drawn,
        rrelu_as_a_function,
        spectral_norm,
        spectral_norm_by_a_hook,
        spectral_norm_cached,
        a_buffer_written_in_place,
        a_buffer_written_by_data,
        a_buffer_rebound,
        codebooks,
        state_in_attributes,
        an_object_that_the_model_changes_between_blocks,
        a_mode_that_changes_between_blocks,
        fast_weights,
        autocast_that_differs_between_blocks,
        attention_kernels_that_differ_between_blocks,
        an_object_changed_in_place,
        an_object_that_is_not_returned,
        a_dataclass_with_a_dictionary,
        an_object_with_slots,
        packed_sequences,
        an_output_that_the_model_changes_in_place,
        a_cache_with_a_trained_prefix,
        a_cache_that_the_next_part_reads,
        gru,
        lstm,
        rnn,
        products_overwritten_in_place,
    )
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_block_that_runs_again_is_given_what_it_was_given(situation: str):
    objective, batch = made(SITUATIONS[situation])
    for saving in SAVINGS:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Note)  # every block is recomputed
            assert_same_bits(objective, batch, saving)


@pytest.mark.parametrize("situation", ["a_buffer_written_in_place", "state_in_attributes", "codebooks", "gru"])
def test_a_block_that_runs_twice_has_two_states(situation: str):
    objective, batch = made(SITUATIONS[situation])
    objective.model.rounds = 2  # type: ignore[assignment]
    for saving in SAVINGS:
        assert_same_bits(objective, batch, saving)


def test_losses_of_attributes_that_a_block_sets():
    class Routing(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            self.auxiliary = torch.softmax(y + torch.randn_like(y), -1).square().mean()
            return x + torch.tanh(y)

    def loss(model: Any, batch: Any) -> Tensor:
        return squares(model, batch) + sum(block.auxiliary for block in model.blocks)

    objective, batch = made(lambda: (Chain(Routing), rows()), loss)
    for saving in SAVINGS:
        assert_same_bits(objective, batch, saving)


def test_autocast_around_the_step_that_is_off_around_the_blocks():
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return block(x.float())

    objective, batch = made(lambda: (Chain(lambda: Layer().float(), call), rows()))
    with torch.autocast("cpu", torch.bfloat16):
        for saving in SAVINGS:
            assert_same_bits(objective, batch, saving)


# ---- what cannot be restored


def test_blocks_that_share_an_iterator_are_not_recomputed_and_named():
    class Taking(Layer):
        def forward(self, x: Any) -> Any:
            x, scales = x
            return x + torch.tanh(self.linear(x * next(scales))), scales

    class TakingChain(Chain):
        def forward(self, x: Any) -> Tensor:
            return super().forward((x, iter([1.0, 2.0, 3.0, 4.0])))[0]

    objective, batch = made(lambda: (TakingChain(Taking), rows()))
    with pytest.warns(Note, match=r"blocks\.0 \(Taking\) is not recomputed in the backward pass"):
        assert_same_bits(objective, batch, Blocks())
    for saving in SAVINGS:
        assert_same_bits(objective, batch, saving)


def counting(calls: list[int]) -> type[nn.Module]:
    """A block that computes something else in each call. calls: the number of calls so far."""

    class Counting(Layer):
        def forward(self, x: Tensor) -> Tensor:
            calls[0] += 1
            return x + torch.tanh(self.linear(x)).square() * (calls[0] % 5)

    return Counting


def test_blocks_that_count_in_a_closure_are_not_recomputed_and_named():
    calls = [0]
    objective, batch = made(lambda: (Chain(counting(calls)), rows()))
    with pytest.warns(Note, match=r"blocks\.3 \(Counting\) is not recomputed"):
        Reverse(Blocks()).estimate(objective, batch, KEY)
    for saving in (Blocks(), Segments(2), Selective()):
        calls[0] = 0
        plain = Reverse().estimate(objective, batch, KEY).gradient
        calls[0] = 0
        found = Reverse(saving).estimate(objective, batch, KEY).gradient
        for (_, one), (_, other) in zip(plain.leaves(), found.leaves(), strict=True):
            assert torch.equal(one, other)


def test_a_budget_is_refused_where_a_block_cannot_be_recomputed():
    objective, batch = made(lambda: (Chain(counting([0])), (torch.randn(256, WIDTH), torch.randn(256, WIDTH))))
    saving = Within(int(0.8 * forecast(Reverse(), objective, batch).peak))
    with pytest.warns(Note, match="is not recomputed"):
        assert "cannot bound the memory: use Blocks()" in str(Reverse(saving).objection(objective, batch))
    with pytest.raises(Unsupported, match=r"blocks\.\d cannot be recomputed \(.*cannot bound the memory: use Blocks"):
        Reverse(saving).estimate(objective, batch, KEY)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_draws_that_begin_after_the_first_step_are_refused_once(draw: Callable[[], float]):
    class Late(Layer):
        draws = False

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x * (1 + draw() if Late.draws else 1)))

    objective, batch = made(lambda: (Chain(Late), rows()))
    assert_same_bits(objective, batch, Blocks())
    Late.draws = True
    with pytest.raises(Unsupported, match=r"drew from .* and the earlier ones did not.*repeat this step"):
        Reverse(Blocks()).estimate(objective, batch, KEY)
    assert_same_bits(objective, batch, Blocks())


class Observer:
    def on_tag(self, kind: str, tensor: Tensor) -> None:
        pass


def test_without_the_check_a_changed_input_is_an_error_and_not_another_gradient():
    def call(block: nn.Module, x: Tensor, number: int) -> Tensor:
        x = torch.sin(x @ torch.eye(WIDTH, dtype=x.dtype))
        out = block(x)
        x.mul_(2.0)
        return out

    objective, batch = made(lambda: (Chain(Layer, call), rows()))
    with memory_events.observe(Observer()), pytest.raises(Unsupported, match=r"changed in place before the backward"):
        Reverse(Blocks()).estimate(objective, batch, KEY)
