"""Replace the parameters, buffers and batch of an objective by fake tensors, which have shapes but no numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from gradcost.core.fake import is_fake, standing_for
from gradcost.core.objective import Objective
from gradcost.core.pytree import plain

_MAX_CONSTANT = 1 << 20  # elements; fakes of integer tensors up to this size carry their values


@contextmanager
def on_fakes(objective: Objective, batch: Any, device: str) -> Iterator[tuple[Objective, Any]]:
    """Replace parameters, buffers and batch by fake tensors inside the context; all results are then fake too.

    No data is copied, moved or allocated, so the model may be on the `meta` device. The model is changed
    in place; its tensors are restored at the end of the context, also after an error.

    Args:
        objective: the model and the loss.
        batch: any pytree.
        device: the device type that the fake tensors represent, such as "cuda".
    Yields:
        The objective and the batch on fake tensors.
    """
    trained = {id(leaf.parameter) for leaf in objective.leaves}
    saved: list[tuple[dict[str, Any], dict[str, Any]]]
    saved = [(module._parameters, dict(module._parameters)) for module in objective.modules]
    saved += [(module._buffers, dict(module._buffers)) for module in objective.modules]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, standing_for(device), _integers_with_values(mode):
        fakes = _Fakes(mode)
        try:
            for registry, tensors in saved:
                registry.update({name: fakes.of(tensor, trained) for name, tensor in tensors.items()})
            fake_batch = pytree.tree_map(lambda leaf: fakes.of(leaf, trained), plain(batch))
            data = None if objective.data is None else partial(_fake_data, objective.data, fakes, trained)
            yield Objective(objective.model, objective.loss, objective.parts, data), fake_batch
        finally:
            for registry, tensors in saved:
                registry.clear()
                registry.update(tensors)


def _fake_data(data: Callable[[], Iterable[Any]], fakes: _Fakes, trained: set[int]) -> Iterator[Any]:
    """Yield the batches of `Objective.data` as fakes, one at a time. The loader itself runs on real tensors."""
    end = object()
    with no_dispatch():
        batches = iter(data())
    while True:
        with no_dispatch():
            batch = next(batches, end)
        if batch is end:
            return
        batch_fakes = fakes.copy()  # one per batch: Python reuses the ids of a freed batch
        yield pytree.tree_map(lambda leaf, known=batch_fakes: known.of(leaf, trained), plain(batch))


class _Fakes:
    """Creates one fake per tensor. Fakes share a storage where their tensors share one."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[int, Tensor] = {}
        self._storages: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, tensor: Any, trained: set[int]) -> Any:
        """Return the fake of a tensor, and other values unchanged. trained: ids of the trainable parameters."""
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in self._known:
            fake = self._fake(tensor)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=id(tensor) in trained)
            self._known[id(tensor)] = fake
        return self._known[id(tensor)]

    def copy(self) -> _Fakes:
        """Return a copy that can be extended independently."""
        copy = _Fakes(self._mode)
        copy._known, copy._storages = dict(self._known), dict(self._storages)
        return copy

    def _fake(self, tensor: Tensor) -> Tensor:
        real = getattr(tensor, "constant", None) if is_fake(tensor) else tensor
        if real is not None and not real.is_floating_point() and real.device.type == "cpu":
            return self._mode.fake_tensor_converter.from_real_tensor(self._mode, real, make_constant=True)
        storage = tensor.untyped_storage()
        name = storage._cdata, tensor.dtype
        if name not in self._storages:
            self._storages[name] = torch.empty(storage.nbytes() // tensor.itemsize, dtype=tensor.dtype, device="cpu")
        return self._storages[name].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def _integers_with_values(mode: FakeTensorMode) -> Iterator[None]:
    """Make integer fakes carry their values inside the context. By default torch does this for small constants only.

    Models branch on masks and positions: without padding, for example, attention needs no mask. transformers
    branches differently for fake tensors, so its `is_fake_tensor` returns False here for fakes that carry values.
    """
    utils = sys.modules.get("transformers.utils.import_utils")
    is_fake_tensor = getattr(utils, "is_fake_tensor", None)
    limit = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = _MAX_CONSTANT
    if is_fake_tensor is not None:
        utils.is_fake_tensor = lambda tensor: is_fake_tensor(tensor) and getattr(tensor, "constant", None) is None  # type: ignore[union-attr]
    try:
        with _FactoryValues(mode):
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit
        if is_fake_tensor is not None:
            utils.is_fake_tensor = is_fake_tensor  # type: ignore[union-attr]


class _FactoryValues(TorchDispatchMode):
    """Makes integer fakes from factory functions, such as `arange` and `ones`, carry their values."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _FACTORIES or out.is_floating_point() or not 0 < out.numel() <= _MAX_CONSTANT:
            return out
        with no_dispatch():
            real = func(*args, **(kwargs or {}))
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, real, make_constant=True)


_ATEN = torch.ops.aten
_FACTORIES = {_ATEN.arange, _ATEN.full, _ATEN.ones, _ATEN.zeros, _ATEN.eye, _ATEN.scalar_tensor}
