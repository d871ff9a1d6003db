"""The bits of tensors: bytes and checksums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcost.core.bits import checksum, raw_bytes
from gradcost.core.errors import BadInput
from gradcost.core.key import Key
from gradcost.core.objective import Objective

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool, torch.float8_e5m2)
SHAPES = ((), (0,), (3, 4), (70_000,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_those_of_the_elements_in_order(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert bytes(raw_bytes(tensor)) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    turned = tensor.expand(2, *shape).transpose(0, -1)
    assert bytes(raw_bytes(turned)) == bytes(turned.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_notices_each_changed_and_each_moved_element(dtype: torch.dtype):
    tensor = (torch.arange(70_000) % 3).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    for place in (0, 32_768, 69_999):
        changed = tensor.clone()
        changed[place] = not tensor[place].real
        assert checksum(changed) != checksum(tensor)
    moved = tensor.clone()
    moved[0], moved[69_997] = tensor[69_997], tensor[0]
    assert checksum(moved) != checksum(tensor)


def test_the_conjugate_and_the_negative_have_bits_of_their_own():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    for lazy in (tensor.conj(), tensor.conj().imag):
        assert bytes(raw_bytes(lazy)) == bytes(raw_bytes(lazy.clone().resolve_conj().resolve_neg()))
        assert checksum(lazy) == checksum(lazy.clone().resolve_conj().resolve_neg())


def test_a_loss_that_sorts_a_weight_is_refused():
    def loss(model: Any, x: Tensor) -> Tensor:
        weight = model.weight
        weight.data.copy_(weight.data.flatten().sort().values.view_as(weight))
        return model(x).square().mean()

    with pytest.raises(BadInput, match="writes into the parameter `weight`"):
        Objective(nn.Linear(8, 8), loss).evaluate(torch.ones(4, 8), Key(0))
