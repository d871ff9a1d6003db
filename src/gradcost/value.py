"""Values: frozen dataclasses whose repr is the configuration, the argument, the hash and the label.

A value prints as the expression that makes it (`Probing(slope=Jvp(), probes=4)`), and that text is its
identity everywhere: two values are equal when their fields are, and a value's hash is a hash of its text,
so it is the same in every process (Python's own hash of a string is not).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def value(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that hashes by its text, alike in every process."""
    made = dataclass(frozen=True)(cls)
    made.__hash__ = _hash  # type: ignore[method-assign]
    return made


def digest(of: Any, size: int = 8) -> str:
    """A short hexadecimal name for anything that prints itself: `2 * size` digits of BLAKE2b of its repr."""
    return blake2b(repr(of).encode(), digest_size=size).hexdigest()


def _hash(self: Any) -> int:
    return int(digest(self), 16) >> 3  # Python's hashes hold 61 bits
