"""Bound the memory that a CPU kernel allocates and frees during one call (its workspace). No tensor refers to it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.pytree import tensors

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.convolution, _ATEN.convolution_backward}
_PRODUCTS = {_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm}
_RECURRENT = {_ATEN.mkldnn_rnn_layer, _ATEN.mkldnn_rnn_layer_backward}
_REDUCED = {torch.bfloat16, torch.float16}
_CHANNELS = 16  # oneDNN pads channels to a multiple of this
_PACKED = 1 << 16  # bytes: buffers of a product of small matrices


class Workspace(NamedTuple):
    """A bound of the bytes of a workspace inside a CPU kernel; `moment` is the number of events before it."""

    moment: int
    bound: int
    operator: str


def workspace_bound(func: Any, args: Any, out: Any) -> int:
    """Return an upper bound of the bytes of an operator's workspace on a CPU; 0 for an operator without one.

    - Convolutions: oneDNN copies input, weight and output into blocked layouts, also in float32 for lower precisions,
      and each thread unfolds the input of one example. For other types torch unfolds the whole input.
    - Recurrent layers (LSTM): gates and states of all steps, and copies of the weights.
    - The backward pass of `ctc_loss`: as many probabilities as the forward pass has saved.
    - Matrix products in bfloat16 and float16: a copy of the arguments and the result.

    Args:
        func: the operator.
        args: its positional arguments.
        out: its result.
    """
    packet = func.overloadpacket
    if packet in _CONVOLUTIONS:
        x, weight = (args[1], args[2]) if packet is _ATEN.convolution_backward else (args[0], args[1])
        y = args[0] if packet is _ATEN.convolution_backward else out
        return _convolution(x, weight, y)
    if packet in _RECURRENT:
        x, weight = args[0], args[2]
        per_step = 16 * max(x.shape[2], weight.shape[1])  # gates and states, with their gradients
        return 4 * (x.shape[0] * x.shape[1] * per_step + 2 * (args[1].numel() + weight.numel())) + _PACKED
    if packet is _ATEN._ctc_loss_backward:
        return args[6].nbytes
    if packet in _PRODUCTS and out.dtype in _REDUCED:
        return sum(tensor.nbytes for tensor in tensors((args, out))) + _PACKED
    return 0


def _convolution(x: Tensor, weight: Tensor, y: Tensor) -> int:
    positions = max(math.prod(x.shape[2:]), math.prod(y.shape[2:]))
    unfolded = positions * max(x.shape[1], y.shape[1]) * math.prod(weight.shape[2:])  # of one example
    if x.dtype in _REDUCED or x.dtype == torch.float32:
        blocked = _padded(x, 1) + _padded(y, 1) + _padded(weight, 0, 1)
        return 4 * (2 * blocked + torch.get_num_threads() * (unfolded + weight.numel())) + _PACKED
    return x.itemsize * (x.shape[0] * unfolded + x.numel() + y.numel())


def _padded(tensor: Tensor, *axes: int) -> int:
    """Return the number of elements after padding the dimensions `axes` to multiples of 16."""
    return math.prod(-(-n // _CHANNELS) * _CHANNELS if axis in axes else n for axis, n in enumerate(tensor.shape))
