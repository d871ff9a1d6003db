"""The base of every other package: objectives, keys, values, errors, units, files and isolated evaluation.

The names in `__init__.pyi` are public; each is loaded when it is first used, so that keys need no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
