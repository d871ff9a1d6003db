"""Linear layers whose frozen weights are stored in 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput

GROUP = 64  # weights that share one scale
_LEVELS = 7.0  # a stored value is an integer from -7 to 7, times the scale of its group


class FourBitLinear(nn.Module):
    """y = x W^T + b with a frozen W in 4 bits: each group of 64 weights of a row has one scale.

    W is computed when it is needed, in the dtype of x, and not saved: a step keeps half a byte per weight and the
    scales. x may have a gradient and a tangent, W may not.

    Args:
        weight: the weights, shape (outputs, inputs); may be on the `meta` device.
        bias: the bias; None for none.
    Raises:
        BadInput: the number of inputs is not a multiple of 64.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        if inputs % GROUP:
            raise BadInput(f"a layer in 4 bits has a multiple of {GROUP} inputs, not {inputs}.")
        self.in_features, self.out_features = inputs, outputs
        groups = weight.detach().view(outputs, inputs // GROUP, GROUP)
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / _LEVELS
        stored = (groups / scale).round().to(torch.int8) + 8
        # Frozen parameters, not buffers: an estimate copies the buffers of a model, because a loss may change them.
        self.packed = _frozen((stored[..., ::2] | (stored[..., 1::2] << 4)).to(torch.uint8))
        self.scale = _frozen(scale)
        self.bias = None if bias is None else _frozen(bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.packed, self.scale)  # type: ignore[assignment]
        return product if self.bias is None else product + self.bias

    def dequantized(self) -> Tensor:
        """Return W, shape (outputs, inputs), in the dtype of the scales."""
        return _dequantized(self.packed, self.scale)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Product(torch.autograd.Function):
    """x W^T, which saves the 4 bits of W only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        return x @ _dequantized(packed, scale).to(x.dtype).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, packed, scale = inputs
        ctx.save_for_backward(packed, scale)
        ctx.save_for_forward(packed, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        packed, scale = ctx.saved_tensors
        return grads[0] @ _dequantized(packed, scale).to(grads[0].dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        packed, scale = ctx.saved_tensors
        return tangents[0] @ _dequantized(packed, scale).to(tangents[0].dtype).mT


def _dequantized(packed: Tensor, scale: Tensor) -> Tensor:
    outputs, groups, half = packed.shape
    found = torch.empty((outputs, groups, half, 2), dtype=scale.dtype, device=packed.device)
    torch.mul((packed & 15).view(torch.int8) - 8, scale, out=found[..., 0])
    torch.mul((packed >> 4).view(torch.int8) - 8, scale, out=found[..., 1])
    return found.view(outputs, groups * half * 2)


def in_four_bits(model: nn.Module, prefix: str = "", head: nn.Module | None = None) -> nn.Module:
    """Replace the frozen linear layers of a model, in place, by layers in 4 bits, and return the model.

    Args:
        model: any module; layers that are trained stay as they are.
        prefix: a part of the full name of the replaced layers, such as ".layers.".
        head: a layer that stays as it is; None for none.
    Raises:
        BadInput: the number of inputs of a layer is not a multiple of 64.
    """
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if (
                type(layer) is nn.Linear
                and prefix in f"{name}.{child}."
                and not layer.weight.requires_grad
                and layer is not head
            ):
                setattr(module, child, FourBitLinear(layer.weight, layer.bias))
    return model
