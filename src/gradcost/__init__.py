"""Measure what a gradient costs, and choose how to get one: backprop, checkpointing, forward mode or zero-order.

The names in `__init__.pyi` are the public API; each is loaded when it is first used. Everything else is public in
the namespace of its package, such as `gradcost.directions.Random`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
