"""Warnings that are issued once per model."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

from torch import nn


class Note(UserWarning):
    """A choice that a method makes for the user, or a problem in the user's model. Issued once per model."""


_causes: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(model: nn.Module, cause: str, message: str) -> None:
    """Issue a `Note` once per model and cause, also when several objectives share the model."""
    causes = _causes.setdefault(model, set())
    if cause not in causes:
        causes.add(cause)
        warnings.warn(message, Note, stacklevel=2)
