"""Memory: the storages that torch operations make, from birth to death."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Within, follows every storage that an operation makes; `peak` is the most bytes alive at once.

    What existed before (weights, buffers, a batch) is not counted, nor are the temporaries inside a kernel.
    Exact for what it follows: a storage is counted once, however many tensors view it, and until the last of
    them is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Tensors that exist already and are not to be counted."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf._is_zerotensor() and leaf.device.type != "meta":
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        before = self._sizes.get(name)
        if before is None:
            weakref.finalize(storage, self._release, name)
        self._sizes[name] = size
        self.now += size - (before or 0)
        self.peak = max(self.peak, self.now)

    def _release(self, name: int) -> None:
        self.now -= self._sizes.pop(name, 0)
