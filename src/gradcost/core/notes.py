"""Warnings that are issued once per model and cause."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

from torch import nn

from gradcost.core.note import Note

__all__ = ["Note", "warn_once"]


_causes: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(model: nn.Module, cause: str, message: str) -> None:
    """Issue a `Note` once per model and cause, even if several objectives use the model."""
    causes = _causes.setdefault(model, set())
    if cause not in causes:
        causes.add(cause)
        warnings.warn(message, Note, stacklevel=2)
