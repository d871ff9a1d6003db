"""Measure what a gradient costs, and choose how to get one: backprop, checkpointing, forward mode or zero-order.

The names in `__init__.pyi` are the public API; each is loaded when it is first used. Everything else is public in
the namespace of its package, such as `gradcost.directions.Random`.
"""

import warnings
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Former flat names that still work, with a warning.
_FORMER = {
    "Bytes": ("instruments", "Bytes"),
    "Seeded": ("estimators", "Seeded"),
    "Steps": ("instruments", "TrainingStep"),
}


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        return _load(name)
    package, present = _FORMER[name]
    message = f"gradcost.{name} is now gradcost.{package}.{present}."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(_load(package), present)
