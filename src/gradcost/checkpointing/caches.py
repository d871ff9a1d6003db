"""Key-value caches among the arguments of a transformer's blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradcost.checkpointing.containers import tensors_in

_NAMES = ("past_key_value", "layer_past")


class CacheRule:
    """Leaves empty key-value caches out of what a block is given.

    They would keep the keys and values of all blocks in memory, and training seldom reads them. A cache with content,
    such as a trained prefix, is an input like any other.

    Args:
        keeps_all: whether blocks are given empty caches too, because the loss reads them later.
    """

    def __init__(self, keeps_all: bool) -> None:
        self.keeps_all = keeps_all
        self.left_out: set[tuple[int, int]] = set()  # ids of a module and of a cache that it was not given
        self.is_read_again = False  # whether a module would have got the same cache twice
        self._caches: list[Any] = []  # keeps them, so that no id is used again

    def arguments(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of a module without empty caches."""
        caches = [argument for argument in args if hasattr(argument, "get_seq_length")]
        caches += [value for name, value in kwargs.items() if name.startswith(_NAMES) and value is not None]
        if not caches and not kwargs.get("use_cache"):
            return args, kwargs
        for cache in caches:
            if self.keeps_all or _is_filled(cache):
                return args, kwargs
        for cache in caches:
            pair = id(module), id(cache)
            self.is_read_again |= pair in self.left_out
            self.left_out.add(pair)
            self._caches.append(cache)
        args = tuple(None if hasattr(argument, "get_seq_length") else argument for argument in args)
        kwargs = {name: None if name.startswith(_NAMES) else value for name, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return args, kwargs


def _is_filled(cache: Any) -> bool:
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length())
    return any(tensor.numel() for tensor in tensors_in(cache))
