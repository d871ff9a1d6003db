"""The forward-mode rule of attention against PyTorch's math kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.slopes import attention

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "more keys, causal": {"is_causal": True, "source": 11},
    "fewer keys, causal": {"is_causal": True, "source": 5},
    "scale": {"scale": 0.7},
    "bool mask": {"mask": (1, 1, 7, 7), "is_bool": True},
    "float mask per head": {"mask": (3, 4, 7, 7)},
    "float mask for all queries": {"mask": (3, 1, 1, 7)},
    "padding, two dimensions": {"mask": (7, 7), "is_bool": True},
    "shared keys": {"enable_gqa": True, "groups": 2, "is_causal": True},
    "shared keys, mask per head": {"enable_gqa": True, "groups": 2, "mask": (3, 4, 7, 7)},
}


def tensors(source: int = 7, groups: int = 4, mask: Any = None, is_bool: bool = False) -> list[Any]:
    with seeded_generators(Key(1)):
        q, k, v = torch.randn(3, 4, 7, 6), torch.randn(3, groups, source, 6), torch.randn(3, groups, source, 5)
        bias = None if mask is None else torch.randn(mask)
        if bias is not None and is_bool:
            bias = bias > -0.3
            bias[..., -1, :] = False  # a query that attends to nothing
        return [
            tensor if tensor is None or tensor.dtype == torch.bool else tensor.double() for tensor in (q, k, v, bias)
        ]


def tangent_of(
    function: Any, given: list[Any], moved: tuple[int, ...], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    with seeded_generators(Key(2)), forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(tensor, torch.randn_like(tensor)) if number in moved else tensor
            for number, tensor in enumerate(given)
        ]
        out, tangent = forward_ad.unpack_dual(function(*duals, **options))
        assert tangent is not None
        return out.clone(), tangent.clone()


@pytest.mark.parametrize("block", [1, 40, 1 << 18])
@pytest.mark.parametrize("name", CASES)
def test_output_and_tangent_are_those_of_the_math_kernel(name: str, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_SCORES", block)
    monkeypatch.setattr(attention, "_ROWS", 0 if block > 1 else 1 / 6)
    case = dict(CASES[name])
    made = {key: case.pop(key) for key in ("source", "groups", "mask", "is_bool") if key in case}
    given = tensors(**made)
    choices = [(0,), (1,), (2,), (0, 1, 2)]
    choices += [(3,), (0, 1, 2, 3)] if given[3] is not None and given[3].is_floating_point() else []

    def theirs(*args: Any, **options: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*args, **options)

    for moved in choices:
        expected = tangent_of(theirs, given, moved, case)
        found = tangent_of(attention.attention, given, moved, case)
        torch.testing.assert_close(found, expected)


def test_dropout_autocast_and_autograd_take_the_math_kernel():
    q, k, v, _ = tensors()
    assert attention.attention(q, k, v) is not None
    assert attention.attention(q, k, v, None, 0.1) is None
    assert attention.attention(q[0], k[0], v[0]) is None
    with torch.autocast("cpu"):
        assert attention.attention(q, k, v) is None
    with torch.enable_grad():
        assert attention.attention(q.requires_grad_(), k, v) is None


def test_what_is_broadcast_takes_the_math_kernel():
    q, k, v, _ = tensors()
    assert attention.attention(q, k[:, :1], v[:, :1]) is None
    assert attention.attention(q, k[:1], v[:1]) is None
    assert attention.attention(q, k[:, :2], v[:, :1], enable_gqa=True) is None
    assert attention.attention(q, k[:, :1], v[:, :1], enable_gqa=True) is not None


@pytest.mark.slow
def test_the_memory_is_linear_in_the_length():
    import gradcost
    from gradcost.tasks.architectures import Gpt

    def beyond(length: int) -> int:
        model = Gpt(layers=1, width=8, heads=2).build((length,), 7)
        tokens = torch.zeros(4, length, dtype=torch.long)
        objective = gradcost.Objective(model, lambda model, tokens: model(tokens).square().mean())
        forecast = gradcost.forecast(gradcost.forward_gradient(), objective, tokens)
        return forecast.peak - sum(p.nbytes for p in model.parameters()) - tokens.nbytes

    long = beyond(2048)
    assert long < 2.2 * beyond(1024)
    assert long < 4 * 2 * 2048 * 2048, "less than one byte per score"
