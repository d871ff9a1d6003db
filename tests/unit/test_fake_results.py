"""Remembered results of operators on fake tensors equal computed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, embedding

from gradcost.core.pytree import tensors
from gradcost.planning import fake_results
from gradcost.planning.fake_kernels import kernels_simulated

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "new": lambda a, b: a @ b.t(),
    "view": lambda a, b: a.view(2, 2, 6)[1:, :, ::2].transpose(0, 2),
    "views": lambda a, b: b.unbind(0),
    "unsafe view": lambda a, b: torch.ops.aten._unsafe_view(a, [8, 3]),
    "in place": lambda a, b: a.mul_(2),
    "with itself": lambda a, b: a.add_(a),
    "out is an argument": lambda a, b: torch.mul(a, b, out=a),
    "out is a further tensor": lambda a, b: torch.mul(a, b, out=torch.empty(4, 6)),
    "shape in place": lambda a, b: a.t_(),
    "resized": lambda a, b: a.resize_(2, 3),
    "several new": lambda a, b: torch.ops.aten.native_layer_norm(a, [6], None, None, 1e-5),
    "another type": lambda a, b: (a * 1, a * True, a > 1, a.to(torch.float64)),
    "labels": lambda a, b: torch.autograd.grad(cross_entropy(a.requires_grad_(), torch.arange(4)), a),
    "tokens": lambda a, b: torch.autograd.grad(embedding(torch.arange(4), b.requires_grad_()).sum(), b),
    "numbers": lambda a, b: torch.arange(5) + torch.ones(5, dtype=torch.int64),
}


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_results, "_known", {})


def described(call: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """Shapes, strides, types and values of the arguments and results, and which of them share a storage."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, kernels_simulated(mode):
        a, b = torch.empty(4, 6), torch.empty(4, 6)
        found = tensors((a, b, call(a, b)))
        addresses = [tensor.untyped_storage()._cdata for tensor in found]
        return [
            (
                tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.device, t.untyped_storage().nbytes(),
                addresses.index(address), [other is t for other in found], values(t),
            )
            for t, address in zip(found, addresses, strict=True)
        ]  # fmt: skip


def values(tensor: Tensor) -> Any:
    constant = getattr(tensor, "constant", None)
    return None if constant is None else constant.tolist()


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_of_an_operator_has_the_results_of_the_first(name: str):
    first = described(CALLS[name])
    assert described(CALLS[name]) == first


@pytest.mark.parametrize("order", ["out is an argument", "out is a further tensor"])
def test_equal_shapes_of_other_tensors_are_another_call(order: str):
    alone = {name: described(CALLS[name]) for name in ("out is an argument", "out is a further tensor")}
    fake_results._known.clear()
    described(CALLS[order])
    assert {name: described(CALLS[name]) for name in alone} == alone


def test_a_call_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    computed: list[str] = []
    original = FakeTensorMode.__torch_dispatch__

    def counted(self: Any, func: Any, *arguments: Any, **named: Any) -> Any:
        computed.append(str(func))
        return original(self, func, *arguments, **named)

    monkeypatch.setattr(FakeTensorMode, "__torch_dispatch__", counted)
    for expected in (1, 0):
        computed.clear()
        for name in ("new", "labels", "tokens"):  # labels and tokens have values, which the operators do not read
            described(CALLS[name])
        for operator in ("mm", "nll_loss_forward", "nll_loss_backward", "embedding", "embedding_dense_backward"):
            assert computed.count(f"aten.{operator}.default") == expected, operator


ROWS = torch.Size((4, 6, 5))
IMAGES = torch.Size((2, 6, 8, 8))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "mse": lambda x: F.mse_loss(x, torch.zeros_like(x)),
    "smooth l1": lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)),
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x)),
    "elu": F.elu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "rrelu": lambda x: F.rrelu(x, training=True),
}
IMAGE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": LAYOUTS["batch norm"],
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "replication": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "roll": lambda x: x.roll((1, 1), (2, 3)),
    "channel shuffle": lambda x: torch.channel_shuffle(x, 2),
    "unfold": lambda x: F.unfold(x, 3),
    "unfold far apart": lambda x: F.unfold(x, 2, stride=6),
    "fold": lambda x: F.fold(F.unfold(x, 3), (8, 8), 3),
}


def layouts(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Any]:
    """Strides and bytes of the storage of a result and of the gradient of its square."""
    x = x.requires_grad_()
    out = call(x)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    return [(t.shape, t.stride(), t.untyped_storage().nbytes()) for t in (out, gradient)]


def in_layout(shape: torch.Size, layout: str) -> Tensor:
    if layout == "channels last":
        return torch.empty(shape).to(memory_format=torch.channels_last)
    if layout == "permuted":
        return torch.empty(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return torch.empty((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2) if layout else torch.empty(shape)


@pytest.mark.parametrize(
    ("call", "shape", "layout"),
    [
        *(
            pytest.param(LAYOUTS[name], ROWS, kind, id=f"{name} {kind}")
            for name in LAYOUTS
            for kind in ("", "transposed")
        ),
        *(
            pytest.param(IMAGE_LAYOUTS[name], IMAGES, kind, id=f"{name} of images {kind}")
            for name in IMAGE_LAYOUTS
            for kind in ("", "transposed", "permuted", "channels last")
        ),
    ],
)
def test_results_have_the_strides_and_storages_of_real_ones(
    call: Callable[[Tensor], Tensor], shape: torch.Size, layout: str
):
    real = layouts(call, in_layout(shape, layout).zero_())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, kernels_simulated(mode):
        assert layouts(call, in_layout(shape, layout)) == real
