"""Replace the parameters, buffers and batch of an objective by fake tensors, which have shapes but no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from gradcost.core.fake import is_fake, standing_for
from gradcost.core.objective import Objective
from gradcost.core.pytree import tree_map
from gradcost.planning.cuda_kernels import cuda_kernels
from gradcost.planning.fake_kernels import kernels_simulated
from gradcost.planning.python_state import python_state_restored

_MAX_COPIED = 1 << 26  # elements; fakes of larger integer tensors have no values


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
    registries: list[dict[str, Any]]
    registries = [registry for module in objective.modules for registry in (module._parameters, module._buffers)]
    saved = [(registry, dict(registry)) for registry in registries]
    with (
        python_state_restored(objective) as containers,
        torch.autograd.set_detect_anomaly(False),  # anomaly detection reads values to find NaN
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        standing_for(device),
        kernels_simulated(mode),
        cuda_kernels() if device == "cuda" else nullcontext(),
    ):
        fakes = _Fakes(mode)
        try:
            for registry in (*registries, *containers):
                _replace_tensors(registry, lambda tensor: fakes.of(tensor, trained))
            fake_batch = tree_map(lambda leaf: fakes.of(leaf, trained), batch)
            data = None if objective.data is None else partial(_fake_data, objective.data, fakes, trained)
            yield Objective(objective.model, objective.loss, objective.parts, data), fake_batch
        finally:
            for registry, tensors in saved:
                registry.clear()
                registry.update(tensors)


def _replace_tensors(container: dict[Any, Any] | list[Any], fake: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors in a dictionary or list of a module."""
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        if isinstance(value, Tensor):
            container[key] = fake(value)


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
        batch_fakes = fakes.copy()  # a new copy per batch, because Python reuses the ids of a freed batch
        yield tree_map(lambda leaf, known=batch_fakes: known.of(leaf, trained), batch)


class _Fakes:
    """Creates one fake per tensor. Two fakes have one storage if their tensors have one storage."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[int, Tensor] = {}
        self._storages: dict[tuple[int, torch.dtype], Tensor] = {}
        self._copies: dict[tuple[int, torch.dtype], Tensor] = {}  # copied storages of integer tensors

    def of(self, tensor: Any, trained: set[int]) -> Any:
        """Return the fake of a tensor, and other values unchanged. trained: ids of the trainable parameters."""
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in self._known:
            fake = self._fake(tensor)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=id(tensor) in trained)
            elif tensor.requires_grad and tensor.is_leaf:
                fake = fake.detach().requires_grad_()  # an input that the loss differentiates
            self._known[id(tensor)] = fake
        return self._known[id(tensor)]

    def copy(self) -> _Fakes:
        """Return a copy that can be extended independently."""
        copy = _Fakes(self._mode)
        copy._known, copy._storages, copy._copies = dict(self._known), dict(self._storages), dict(self._copies)
        return copy

    def _fake(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            return self._mode.from_tensor(tensor)
        real = getattr(tensor, "constant", None) if is_fake(tensor) else tensor
        is_integer = not (tensor.is_floating_point() or tensor.is_complex())
        if is_integer and real is not None and real.device.type == "cpu" and real.numel() <= _MAX_COPIED:
            with no_dispatch():
                copy = self._copy(real)
            return self._mode.fake_tensor_converter.from_real_tensor(self._mode, copy, make_constant=True)
        storage = tensor.untyped_storage()
        name = storage._cdata, tensor.dtype
        if name not in self._storages:
            self._storages[name] = torch.empty(storage.nbytes() // tensor.itemsize, dtype=tensor.dtype, device="cpu")
        return self._storages[name].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _copy(self, real: Tensor) -> Tensor:
        """Return a copy, because a simulation may write into it, for example into BatchNorm's number of batches."""
        storage = real.untyped_storage()
        count = storage.nbytes() // real.itemsize
        if count > _MAX_COPIED:  # `real` is a view of a large data set: do not copy all of it
            return real.clone()
        name = storage._cdata, real.dtype
        if name not in self._copies:
            self._copies[name] = real.as_strided((count,), (1,), 0).clone()
        return self._copies[name].as_strided(real.shape, real.stride(), real.storage_offset())
