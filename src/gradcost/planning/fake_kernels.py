"""Make fake operators allocate as many bytes as the real ones, and compute the values of masks and positions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from gradcost.core.fake import DEVICE, known
from gradcost.planning.fake_results import FakeResults

MAX_CONSTANT = 1 << 20  # elements; integer tensors and constants up to this size have values


@contextmanager
def kernels_simulated(mode: FakeTensorMode) -> Iterator[None]:
    """Inside the context, fake results are as large as real ones, and integer tensors and constants have values.

    Models branch on masks and positions: without padding, for example, attention needs no mask. Some
    models create a mask of ones in floating point. By default torch computes values for small constants only.
    transformers branches differently for fake tensors, so its `is_fake_tensor` returns False here for fakes with
    values.
    """
    utils = sys.modules.get("transformers.utils.import_utils")
    is_fake_tensor = getattr(utils, "is_fake_tensor", None)
    limit = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = MAX_CONSTANT
    if is_fake_tensor is not None:
        utils.is_fake_tensor = lambda tensor: is_fake_tensor(tensor) and getattr(tensor, "constant", None) is None  # type: ignore[union-attr]
    try:
        with _Kernels(mode):
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit
        if is_fake_tensor is not None:
            utils.is_fake_tensor = is_fake_tensor  # type: ignore[union-attr]


class _Kernels(TorchDispatchMode):
    """Corrects fake results whose size differs from that of the real kernel, and gives constants their values."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.results = FakeResults(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].device
        kwargs = kwargs or {}
        return self.results.of(func, args, kwargs, self._computed)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        packet = func.overloadpacket
        if packet is _ATEN._grouped_mm and args[0].dtype in _GROUPED_TYPES:
            return _grouped_mm(*args, **kwargs)
        if packet is _ATEN._ctc_loss:
            return _ctc_loss(func, *args)
        if packet is _ATEN.add_ and all(map(_is_sparse, args[:2])):
            return _ATEN.copy_sparse_to_sparse_(args[0], _with_entries(func, args, args[0]))  # accumulates a gradient
        out = func(*args, **kwargs)
        if packet in _FACTORIES:
            return self._with_values(func, args, kwargs, out)
        if packet in _LAYOUTS:
            return _with_layout(out, _LAYOUTS[packet](*args))
        if packet in _RESIZED:
            # The real kernel makes a tensor as large as its argument, and changes the shape.
            elements = max(args[0].numel(), out.numel())
            return torch.empty(elements, dtype=out.dtype, device=out.device).as_strided(out.shape, out.stride())
        if packet in _UNREDUCED and out.ndim == 0:
            # The real kernel writes all errors into a storage, reduces them, and returns a scalar of that storage.
            errors = torch.broadcast_shapes(args[0].shape, args[1].shape).numel()
            return torch.empty(errors, dtype=out.dtype, device=out.device).as_strided((), ())
        if packet in _BAGS and out[1].numel():
            bags = torch.empty(out[1].numel() + 1, dtype=out[1].dtype, device=out[1].device)  # as in the real kernel
            return out[0], bags[:-1], *out[2:]
        if packet is _ATEN.mkldnn_rnn_layer:
            return (*out[:3], torch.empty(_recurrent_workspace(*args), dtype=torch.uint8))
        if packet is _ATEN.mkldnn_rnn_layer_backward:
            return (*out[:4], torch.empty_like(out[3]), *out[5:])  # torch's fake kernel returns one tensor twice
        if _is_sparse(out):
            return _with_entries(func, args, out)
        return out

    def _with_values(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        if out.is_complex() or not 0 < out.numel() <= MAX_CONSTANT:
            return out
        with no_dispatch():
            real = func(*args, **kwargs)
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, real, make_constant=True)


_ATEN = torch.ops.aten
_FACTORIES = {_ATEN.arange, _ATEN.full, _ATEN.ones, _ATEN.zeros, _ATEN.eye, _ATEN.scalar_tensor}
_UNREDUCED = {_ATEN.mse_loss, _ATEN.smooth_l1_loss, _ATEN.binary_cross_entropy, _ATEN.soft_margin_loss}
_RESIZED = {_ATEN.col2im, _ATEN.im2col}
_SUMS = {_ATEN.add, _ATEN.add_, _ATEN.sub}
_BAGS = {_ATEN._embedding_bag, _ATEN._embedding_bag_forward_only}
_GROUPED_TYPES = {torch.float32, torch.float16, torch.bfloat16}


def _format_of(tensor: Tensor) -> Tensor:
    """Return a tensor of this shape in channels_last if this one is, otherwise a contiguous one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim)
    is_last = last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
    return torch.empty_like(tensor, memory_format=last if is_last else torch.contiguous_format)


def _contiguous(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# Operators whose fake result has other strides than the real one: a tensor with the strides of the (first) result.
_LAYOUTS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(
        (_ATEN.native_batch_norm, _ATEN.roll, _ATEN.channel_shuffle, _ATEN.max_unpool2d), lambda x, *_: _format_of(x)
    ),
    **dict.fromkeys(
        (_ATEN.native_batch_norm_backward, _ATEN.reflection_pad2d_backward, _ATEN.replication_pad2d_backward),
        lambda grad, x, *_: _format_of(x),
    ),
    **dict.fromkeys(
        (
            _ATEN.native_layer_norm_backward,
            _ATEN.mse_loss_backward,
            _ATEN.smooth_l1_loss_backward,
            _ATEN.huber_loss_backward,
        ),
        lambda grad, x, *_: _contiguous(x),
    ),
    _ATEN.rrelu_with_noise: lambda x, *_: _contiguous(x),
    _ATEN.elu_backward: lambda grad, *rest: torch.mul(grad, rest[-1]),
    _ATEN.softplus_backward: lambda grad, x, *_: torch.mul(grad, x),
    _ATEN.hardswish_backward: torch.mul,
}


def _with_layout(out: Any, like: Tensor) -> Any:
    """Return a result whose tensor, or first tensor, has the strides of `like`; the result itself if it has them."""
    first = out if isinstance(out, Tensor) else out[0]
    if first is None or first.shape != like.shape or first.stride() == like.stride():
        return out
    first = torch.empty_strided(first.shape, like.stride(), dtype=first.dtype, device=first.device)
    return first if isinstance(out, Tensor) else (first, *out[1:])


def _grouped_mm(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Return the result of a grouped product, with rows padded to 16 bytes. torch's fake takes only bfloat16."""
    rows = (a.shape[0], a.shape[-2]) if a.ndim == 3 and b.ndim == 3 else (a.shape[-2],)
    rows = (offs.shape[0], *rows) if a.ndim == b.ndim == 2 else rows
    dtype = out_dtype or a.dtype
    columns = b.shape[-1]
    padded = -(-columns * dtype.itemsize // 16) * 16 // dtype.itemsize
    strides = (padded, 1) if len(rows) == 1 else (rows[1] * padded, padded, 1)
    return torch.empty_strided((*rows, columns), strides, dtype=dtype, device=a.device)


def _ctc_loss(func: Any, log_probs: Tensor, targets: Tensor, of_inputs: Any, of_targets: Any, *_: Any) -> Any:
    """Return the losses of a batch, and what the backward pass needs: it depends on the longest target."""
    lengths = _values(func, of_targets) if isinstance(of_targets, Tensor) else of_targets
    with no_dispatch():
        longest = max(map(int, lengths))
    steps, examples = log_probs.shape[:2]
    return log_probs.new_empty(examples), log_probs.new_empty(examples, steps, 2 * longest + 1)


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.sparse_coo


def _with_entries(func: Any, args: Any, out: Tensor) -> Tensor:
    """Return a sparse result with as many entries as the real one. The result of a fake kernel has none."""
    packet = func.overloadpacket
    sparse = [tensor for tensor in args if _is_sparse(tensor)]
    if packet is _ATEN._embedding_bag_backward:
        indices = args[1].view(1, -1)
    elif not sparse or packet is _ATEN.detach or (func._schema.is_mutable and packet is not _ATEN.add_):
        return out
    else:
        count = sum(tensor._nnz() for tensor in sparse) if packet in _SUMS else sparse[0]._nnz()
        if packet in (_ATEN.coalesce, _ATEN._coalesce):
            count = _distinct(func, sparse[0]._indices())
        indices = torch.empty((out.sparse_dim(), count), dtype=torch.int64)
    values = torch.empty((indices.shape[1], *out.shape[out.sparse_dim() :]), dtype=out.dtype)
    return torch.sparse_coo_tensor(indices, values, out.shape, check_invariants=False)


def _distinct(func: Any, indices: Tensor) -> int:
    """Return the number of distinct columns."""
    real = _values(func, indices)
    with no_dispatch():
        return real.unique(dim=1).shape[1]


def _values(func: Any, tensor: Tensor) -> Tensor:
    """Return the values of a fake tensor, on which the shape of the result of an operator depends."""
    real = known(tensor)
    if real is None:
        raise DynamicOutputShapeException(func)
    return real


_FEW_STEPS = 128  # time steps; longer layers are extrapolated from runs of 128 and 256 time steps
_CHEAP = 1 << 33  # multiplications, about half a second; cheaper layers are not extrapolated


def _recurrent_workspace(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, h: Tensor, c: Tensor, *rest: Any
) -> int:
    """Return the bytes that oneDNN's recurrent layer saves for the backward pass. torch's fake saves none.

    These bytes grow linearly with the time steps, except for rounding to pages. Only a layer that would take long
    to run is extrapolated, with an error of at most 32 KiB.
    """
    *_, batch_first, _ = rest  # the last arguments are batch_first and train
    time = 1 if batch_first else 0
    shapes = tuple(tuple(tensor.shape) for tensor in (x, w0, w1, w2, w3, h, c))
    rest = tuple(tuple(value) if isinstance(value, list) else value for value in rest)
    steps = x.shape[time]
    layer = shapes, time, x.dtype, torch.is_grad_enabled(), rest
    if steps <= 2 * _FEW_STEPS or x.shape[0] * x.shape[1] * (w0.numel() + w1.numel()) <= _CHEAP:
        return _real_workspace(steps, *layer)
    few, more = (_real_workspace(count, *layer) for count in (_FEW_STEPS, 2 * _FEW_STEPS))
    return few + (steps - _FEW_STEPS) * (more - few) // _FEW_STEPS


@cache
def _real_workspace(
    steps: int, shapes: Any, time: int, dtype: torch.dtype, with_gradients: bool, rest: tuple[Any, ...]
) -> int:
    """Run the real kernel on zeros, once per shape and number of steps, and return the bytes of its workspace."""
    first, *others = shapes
    first = (*first[:time], steps, *first[time + 1 :])
    with no_dispatch(), torch.set_grad_enabled(with_gradients):  # without gradients nothing is saved
        arguments = [torch.zeros(shape, dtype=dtype, device="cpu") for shape in (first, *others)]
        workspace = _ATEN.mkldnn_rnn_layer(*arguments, *rest)[3]
        return 0 if workspace is None else workspace.untyped_storage().nbytes()
