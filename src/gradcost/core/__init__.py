"""Foundations that every other package imports: objectives, keys, values, errors, units, files, isolated evaluation.

`__init__.pyi` lists the public names. Each is imported on first use, so `Key` works without an import of torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
