"""A model and a batch without numbers, so that a step can be followed without being computed."""

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

_KNOWN = 1 << 20  # whole numbers that a fake is let to know


@contextmanager
def on_fakes(objective: Objective, batch: Any, device: str) -> Iterator[tuple[Objective, Any]]:
    """Within, the model's parameters and buffers are fakes, and so is all that is computed from them.

    No data is copied, moved or made, so the model may be on the `meta` device too. The model itself is lent,
    not copied: its own tensors are back afterwards, whatever happens. device: the type that the fakes stand for.
    """
    trained = {id(leaf.parameter) for leaf in objective.leaves}
    homes: list[tuple[dict[str, Any], dict[str, Any]]]
    homes = [(module._parameters, dict(module._parameters)) for module in objective.modules]
    homes += [(module._buffers, dict(module._buffers)) for module in objective.modules]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, standing_for(device), _whole_numbers_known(mode):
        likenesses = _Likenesses(mode)
        try:
            for home, held in homes:
                home.update({name: likenesses.of(tensor, trained) for name, tensor in held.items()})
            fake_batch = pytree.tree_map(lambda leaf: likenesses.of(leaf, trained), plain(batch))
            data = None if objective.data is None else partial(_fake_data, objective.data, likenesses, trained)
            yield Objective(objective.model, objective.loss, objective.parts, data), fake_batch
        finally:
            for home, held in homes:
                home.clear()
                home.update(held)


def _fake_data(data: Callable[[], Iterable[Any]], likenesses: _Likenesses, trained: set[int]) -> Iterator[Any]:
    """The batches of the whole of the data as fakes, one alive at a time; they themselves are made as ever."""
    with no_dispatch():
        batches = iter(data())
    while True:
        with no_dispatch():
            batch = next(batches, likenesses)
        if batch is likenesses:
            return
        here = likenesses.beside()  # what is known of this batch is forgotten with it: an id is used again
        yield pytree.tree_map(lambda leaf, here=here: here.of(leaf, trained), plain(batch))


class _Likenesses:
    """Fakes of tensors, made under the mode that is active: one for each, and what shares a storage goes on to."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[int, Tensor] = {}
        self._storages: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, tensor: Any, trained: set[int]) -> Any:
        """The fake of a tensor; anything else is its own likeness."""
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in self._made:
            made = self._like(tensor)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=id(tensor) in trained)
            self._made[id(tensor)] = made
        return self._made[id(tensor)]

    def beside(self) -> _Likenesses:
        """Others, that know these."""
        made = _Likenesses(self._mode)
        made._made, made._storages = dict(self._made), dict(self._storages)
        return made

    def _like(self, tensor: Tensor) -> Tensor:
        real = getattr(tensor, "constant", None) if is_fake(tensor) else tensor
        if real is not None and not real.is_floating_point() and real.device.type == "cpu":
            return self._mode.fake_tensor_converter.from_real_tensor(self._mode, real, make_constant=True)
        storage = tensor.untyped_storage()
        name = storage._cdata, tensor.dtype
        if name not in self._storages:
            self._storages[name] = torch.empty(storage.nbytes() // tensor.itemsize, dtype=tensor.dtype, device="cpu")
        return self._storages[name].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def _whole_numbers_known(mode: FakeTensorMode) -> Iterator[None]:
    """Within, fakes that are computed from whole numbers alone know their values, as torch's small constants do.

    Models look at masks and positions to choose a path (an attention without a mask where nothing is padded).
    And transformers must be told that such a fake can be looked at: it takes another path for all fakes.
    """
    utils = sys.modules.get("transformers.utils.import_utils")
    unknown = getattr(utils, "is_fake_tensor", None)
    limit = fake_tensor.CONSTANT_NUMEL_LIMIT
    fake_tensor.CONSTANT_NUMEL_LIMIT = _KNOWN
    if unknown is not None:
        utils.is_fake_tensor = lambda tensor: unknown(tensor) and getattr(tensor, "constant", None) is None  # type: ignore[union-attr]
    try:
        with _Factories(mode):
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = limit
        if unknown is not None:
            utils.is_fake_tensor = unknown  # type: ignore[union-attr]


class _Factories(TorchDispatchMode):
    """Makes whole numbers that come from no tensor known: `arange` and its like."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _FACTORIES or out.is_floating_point() or not 0 < out.numel() <= _KNOWN:
            return out
        with no_dispatch():
            real = func(*args, **(kwargs or {}))
        return self.mode.fake_tensor_converter.from_real_tensor(self.mode, real, make_constant=True)


_ATEN = torch.ops.aten
_FACTORIES = {_ATEN.arange, _ATEN.full, _ATEN.ones, _ATEN.zeros, _ATEN.eye, _ATEN.scalar_tensor}
