"""The chunked loss equals the loss of all logits, in every way of differentiating it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alive import Alive
from counting import Flops
from gradcost.checkpointing.chunked_loss import chunked_cross_entropy
from gradcost.checkpointing.policies import Blocks, Everything, Offloaded, Saving, Schedule, Segments, Selective
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Gaussian
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.slopes.slope import CentralDifference, Jvp, Slope
from tables import Transformer

KEY = Key(22)
WORDS, WIDTH = 50, 8


def body(model: Any, words: Tensor) -> Tensor:
    x = model.drop(model.embed(words) + model.positions)
    for block in model.blocks:
        x = block(x)
    return x


def chunked(model: Any, batch: Any) -> Tensor:
    return chunked_cross_entropy(body(model, batch[0]), model.head.weight, batch[1], chunks=3)


def whole(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(F.linear(body(model, batch[0]), model.head.weight).flatten(0, -2), batch[1].flatten())


def pair(dtype: torch.dtype = torch.float64) -> tuple[Objective, Objective, tuple[Tensor, Tensor]]:
    with seeded_generators(KEY):
        model = Transformer(WORDS, WIDTH).to(dtype)
        words = torch.randint(WORDS, (4, 6))
    batch = words[:, :-1], words[:, 1:].clone()
    batch[1][1, 2:] = -100
    return Objective(model, chunked), Objective(model, whole), batch


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("chunks", [1, 3, 8, 100])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5)])
def test_value_and_gradients_are_those_of_the_whole(
    shape: tuple[int, ...], biased: bool, chunks: int, dtype: torch.dtype, tolerance: float
):
    with seeded_generators(KEY):
        hidden = torch.randn(*shape, WIDTH, dtype=dtype, requires_grad=True)
        weight = torch.randn(WORDS, WIDTH, dtype=dtype, requires_grad=True)
        bias = torch.randn(WORDS, dtype=dtype, requires_grad=True) if biased else None
        target = torch.randint(WORDS, shape)
    if shape:
        target.view(-1)[::3] = 7
    wanted = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    found = chunked_cross_entropy(hidden, weight, target, chunks, bias, ignore_index=7)
    logits = F.linear(hidden, weight, bias).reshape(-1, WORDS)
    plain = F.cross_entropy(logits, target.reshape(-1), ignore_index=7)
    assert close(found, plain, tolerance)
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, weight, target, chunks, bias, ignore_index=7), found)
    pairs = zip(torch.autograd.grad(found, wanted), torch.autograd.grad(plain, wanted), strict=True)
    assert all(close(one, other, 4 * tolerance) for one, other in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_gradients_are_those_of_the_whole(dtype: torch.dtype):
    with seeded_generators(KEY):
        hidden = torch.randn(40, WIDTH, dtype=dtype, requires_grad=True)
        weight = torch.randn(WORDS, WIDTH, requires_grad=True)
        target = torch.randint(WORDS, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, target, 4)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), target)
    pairs = zip(
        torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight]), strict=True
    )
    assert all(one.dtype == other.dtype and close(one, other, 0.02) for one, other in pairs)


def test_a_second_backward_pass_and_a_part_of_the_gradients_are_right():
    with seeded_generators(KEY):
        hidden = torch.randn(40, WIDTH, requires_grad=True)
        weight = torch.randn(WORDS, WIDTH, requires_grad=True)
        target = torch.randint(WORDS, (40,))
    loss = chunked_cross_entropy(hidden, weight, target, 4)
    (of_hidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    both = [torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
    assert torch.equal(of_hidden, both[0][0])
    (frozen,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight.detach(), target, 4), hidden)
    assert torch.equal(frozen, of_hidden)


def test_half_precision_logits_are_taken_to_float32():
    with seeded_generators(KEY):
        hidden, weight = torch.randn(20, WIDTH), torch.randn(WORDS, WIDTH)
        target = torch.randint(WORDS, (20,))
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    found = chunked_cross_entropy(hidden, weight, target)
    assert found.dtype == torch.float32
    assert close(found, F.cross_entropy(F.linear(hidden, weight).float(), target), 1e-6)


def test_no_target_at_all_gives_nan_as_the_whole_does():
    target = torch.full((4,), -100)
    assert chunked_cross_entropy(torch.randn(4, WIDTH), torch.randn(WORDS, WIDTH), target).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_saving_gives_the_same_bits_with_it(dtype: torch.dtype):
    objective, _, batch = pair(dtype)
    savings: list[Saving] = [Blocks(), Segments(2), Schedule((((1,), 1), 1)), Selective(), Offloaded()]
    plain = Reverse(Everything()).estimate(objective, batch, KEY)
    for saving in savings:
        found = Reverse(saving).estimate(objective, batch, KEY)
        assert torch.equal(found.loss, plain.loss)
        for (name, one), (_, other) in zip(found.gradient.leaves(), plain.gradient.leaves(), strict=True):
            assert torch.equal(one, other), (saving, name)


@pytest.mark.parametrize("slope", [Jvp(), Jvp(together=3), CentralDifference(1e-4)], ids=repr)
def test_slopes_are_those_of_the_whole(slope: Slope):
    """The head's weight is the embedding's, read outside of the modules that hold it."""
    one, other, batch = pair()
    found, expected = (Probing(slope, Gaussian(), 3).estimate(made, batch, KEY) for made in (one, other))
    assert found.slopes is not None
    assert expected.slopes is not None
    # A difference divides the last bits of two losses by 2e-4.
    assert close(found.slopes, expected.slopes, 1e-11 if isinstance(slope, Jvp) else 1e-9)
    assert close(found.loss, expected.loss, 1e-12)


def test_it_runs_on_fake_tensors_with_the_peak_of_real_ones():
    real, _, batch = pair(torch.float32)
    with Alive() as alive:
        Reverse(Blocks()).estimate(real, batch, KEY)
    with FakeTensorMode() as mode:
        fake = Objective(Transformer(WORDS, WIDTH), chunked)
        fakes = tuple(mode.from_tensor(part) for part in batch)
        with Alive() as fake_alive:
            Reverse(Blocks()).estimate(fake, fakes, KEY)
    assert alive.peak == fake_alive.peak


def test_one_chunk_of_logits_is_in_memory_at_a_time_and_the_head_runs_once_more():
    rows, words = 64, 1000
    with seeded_generators(KEY):
        hidden = torch.randn(rows, WIDTH, requires_grad=True)
        head = nn.Linear(WIDTH, words, bias=False)
        target = torch.randint(words, (rows,))
    peaks, totals = [], []
    for chunks in (1, 8):
        with Alive() as alive, Flops() as flops:
            chunked_cross_entropy(hidden, head.weight, target, chunks).backward()
        peaks.append(alive.peak)
        totals.append(flops.total)
        hidden.grad = head.weight.grad = None
    logits, weight = rows * words * 4, words * WIDTH * 4
    assert totals == [4 * 2 * rows * words * WIDTH] * 2  # forward, again, and two in the backward
    # Of a chunk, at most: logits, their softmax, the gradients of both; and one gradient of the weight.
    assert peaks[1] <= 4 * logits / 8 + weight + 4 * rows * WIDTH * 4
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"chunks": 0}, "cut into 1 chunk or more, not 0."),
        ({"hidden": torch.zeros(4, 5)}, r"not \(4, 5\), \(50, 8\) and \(4,\)."),
        ({"target": torch.zeros(5, dtype=torch.long)}, r"and \(5,\)."),
        ({"weight": torch.zeros(8)}, r"not \(4, 8\), \(8,\) and"),
        ({"bias": torch.zeros(8)}, r"a bias of 50 words has shape \(50,\), not \(8,\)."),
    ],
)
def test_shapes_that_do_not_match_are_refused(arguments: dict[str, Any], sentence: str):
    fitting = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(50, 8), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(ValueError, match=sentence):
        chunked_cross_entropy(**{**fitting, **arguments})
