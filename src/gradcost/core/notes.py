"""What a method tells its user: a warning that is said once."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

from torch import nn


class Note(UserWarning):
    """Something that a method does on the user's behalf, or sees in what it is given, and says once."""


_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def say_once(model: nn.Module, cause: str, sentence: str) -> None:
    """Warn of `cause` once in the life of a model, however often an objective is made of it anew."""
    said = _said.setdefault(model, set())
    if cause not in said:
        said.add(cause)
        warnings.warn(sentence, Note, stacklevel=2)
