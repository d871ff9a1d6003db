"""Keep the outputs of some operators in a forward pass, and reuse them when it runs again (a rerun)."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gradcost.checkpointing.containers import tensors_in
from gradcost.core import memory_events

# In a rerun, autograd calls these operators a different number of times, so calls with equal numbers do not match.
_IGNORED = frozenset({torch.ops.aten.detach.default, torch.ops.prim.device.default})


class KeptOutputs:
    """The kept outputs of one call of a block.

    If a later operator overwrites an output, the rerun computes it again. Examples of such operators: an in-place
    activation, the gates of a recurrent layer, an operator after the call.

    Args:
        names: the names of the operators in `torch.ops.aten` whose outputs are kept.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._outputs: dict[tuple[Any, int], Any] = {}  # (operator, number of its call) -> output or None

    def recorded(self) -> AbstractContextManager[Any]:
        """Return a context manager for the forward pass. It keeps the outputs."""
        return _Recording(self._names, self._outputs)

    def replayed(self) -> AbstractContextManager[Any]:
        """Return a context manager for the rerun. Inside, operators return the kept outputs, each output once."""
        return _Replaying(self._outputs)


class _Recording(TorchDispatchMode):
    def __init__(self, names: frozenset[str], outputs: dict[tuple[Any, int], Any]) -> None:
        super().__init__()
        self.names, self.outputs = names, outputs
        self.calls: Counter[Any] = Counter()
        self.by_storage: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.by_storage and func._schema.is_mutable:
            self._drop_written(func, args, kwargs)
        out = func(*args, **kwargs)
        if func not in _IGNORED and func.namespace == "aten" and func._opname in self.names:
            key = func, self.calls[func]
            self.calls[func] += 1
            for output in pytree.tree_leaves(out):
                if isinstance(output, Tensor):
                    self.by_storage[output.untyped_storage()._cdata] = key
                    memory_events.tag("saved", output)
            self.outputs[key] = pytree.tree_map(_Kept.of, out)
        return out

    def _drop_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in(value):
                key = self.by_storage.pop(tensor.untyped_storage()._cdata, None)
                if key is not None:
                    self.outputs[key] = None


class _Replaying(TorchDispatchMode):
    def __init__(self, outputs: dict[tuple[Any, int], Any]) -> None:
        super().__init__()
        self.outputs = outputs
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = func, self.calls[func]
        if key in self.outputs:
            self.calls[func] += 1
            kept, self.outputs[key] = self.outputs[key], None  # frees it: a second backward pass computes it again
            leaves = [leaf for leaf in pytree.tree_leaves(kept) if isinstance(leaf, _Kept)]
            if leaves and all(leaf.is_current() for leaf in leaves):
                return pytree.tree_map(lambda leaf: leaf.tensor if isinstance(leaf, _Kept) else leaf, kept)
        return func(*args, **(kwargs or {}))


class _Kept:
    """A kept tensor and its version counter."""

    def __init__(self, tensor: Tensor) -> None:
        # Below autograd this dispatch key is excluded. `detach` then makes a new version counter: include the key.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()  # autograd adds a graph to `tensor`, which would make a cycle
        self.version = self.tensor._version

    @classmethod
    def of(cls, leaf: Any) -> Any:
        return cls(leaf) if isinstance(leaf, Tensor) else leaf

    def is_current(self) -> bool:
        return self.tensor._version == self.version
