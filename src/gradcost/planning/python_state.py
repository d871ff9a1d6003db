"""Restore the Python objects that a simulated forward pass changes, so that no fake tensor outlives it."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradcost.core.evaluation.mutable_state import Traversal
from gradcost.core.evaluation.reached_state import everything
from gradcost.core.evaluation.saved_state import Saved
from gradcost.core.fake import is_fake
from gradcost.core.isolation import generator_state, set_generator_state
from gradcost.core.objective import Objective

_DEPTH = 4  # levels of nested containers that are searched for fake tensors


@contextmanager
def python_state_restored(objective: Objective) -> Iterator[list[dict[Any, Any] | list[Any]]]:
    """Restore at the end what a forward pass can change besides tensors.

    - Random generators that the model or the loss hold get their states back.
    - All changes are undone in the attributes of modules and of the objects that they reference, in containers, in
      closures, and in globals that the code names.
    - Only fake tensors are removed from other globals of the modules' files and from the modules' classes. A
      `functools.cache` or `lru_cache` that contains a fake tensor is cleared.

    Yields:
        The dictionaries and lists of the model's modules that may contain tensors besides parameters and buffers.
    """
    in_model, reached = Traversal(), everything(objective.model, objective.loss)
    in_model.visit("", objective.model)
    attributes = [(vars(module), dict(vars(module))) for _, module in reached.modules]
    saved = Saved((name, value) for name, value in reached.objects if not isinstance(value, Tensor))
    generators = [(generator, generator_state(generator)) for _, generator in reached.generators]
    caches = [(cache, cache.cache_info().misses) for cache in _cached_functions(reached.seen.values())]
    namespaces = [(owner, dict(vars(owner))) for owner in _namespaces(module for _, module in reached.modules)]
    containers = [vars(module) for _, module in in_model.modules]
    try:
        yield [*containers, *(value for _, value in in_model.objects if isinstance(value, dict | list))]
    finally:
        for current, before in attributes:
            current.clear()
            current.update(before)
        saved.restore()
        for generator, state in generators:
            set_generator_state(generator, state)
        for owner, before in namespaces:
            _remove_fakes(owner, before)
        for cache, misses in caches:
            if cache.cache_info().misses != misses and _holds_fake(gc.get_referents(cache)):
                cache.cache_clear()


def _namespaces(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the classes of the modules and the Python modules that define them, without torch's."""
    classes = {kind for module in modules for kind in type(module).__mro__}
    classes = {kind for kind in classes if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
    files = {kind.__module__ for kind in classes} & sys.modules.keys()
    return [*classes, *(sys.modules[name] for name in files)]


def _remove_fakes(owner: Any, before: dict[str, Any]) -> None:
    """Restore the attributes of a class or Python module that are fake tensors or contain some."""
    for name, value in list(vars(owner).items()):
        if isinstance(value, dict) and value is before.get(name):
            for key in [key for key, item in value.items() if _holds_fake(item)]:
                dict.__delitem__(value, key)
        elif isinstance(value, list) and value is before.get(name):
            value[:] = [item for item in value if not _holds_fake(item)]
        elif value is not before.get(name) and _holds_fake(value):
            setattr(owner, name, before[name]) if name in before else delattr(owner, name)


def _holds_fake(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, Tensor):
        return is_fake(value)
    if depth and isinstance(value, dict | list | tuple | set):
        return any(_holds_fake(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))
    return False


_known_caches: weakref.WeakSet[Any] = weakref.WeakSet()
_scanned = 0  # the number of imported modules at the last scan


def _cached_functions(reached: Iterable[Any]) -> list[Any]:
    """Return the functions of this process with `functools.cache` or `lru_cache`, also those among `reached`."""
    global _scanned
    if len(sys.modules) != _scanned:
        _scanned = len(sys.modules)
        _known_caches.update(value for value in gc.get_objects() if type(value) is functools._lru_cache_wrapper)
    _known_caches.update(value for value in reached if type(value) is functools._lru_cache_wrapper)
    return list(_known_caches)
