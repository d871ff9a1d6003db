"""Remove empty key-value caches from the arguments of a transformer's blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradcost.checkpointing.containers import tensors_in

_NAMES = ("past_key_value", "layer_past")


class CacheRule:
    """Removes empty key-value caches from the arguments of recomputed blocks.

    An empty cache would store the keys and values of all blocks, and training seldom reads them. A cache with
    content, such as a trained prefix, stays among the arguments.

    Args:
        keeps_all: whether empty caches stay too, because the loss reads them later.
    """

    def __init__(self, keeps_all: bool) -> None:
        self.keeps_all = keeps_all
        self.left_out: set[tuple[int, int]] = set()  # (id of a module, id of a cache removed from its arguments)
        self.is_read_again = False  # whether two calls of one module had the same cache
        self._caches: list[Any] = []  # references: Python may reuse the id of a freed object

    def arguments(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return (args, kwargs) without caches; unchanged if `keeps_all` or if a cache has content."""
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
