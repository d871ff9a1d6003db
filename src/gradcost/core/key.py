"""The one source of randomness: a named seed that folds."""

from __future__ import annotations

from hashlib import blake2b

from gradcost.core.errors import BadInput
from gradcost.core.value import value


@value
class Key:
    """A 64-bit seed from which named seeds are folded: `Key(0).fold("step", 3).fold("probe", 1)`.

    Law: folding the same names in the same order gives the same key in every process and on every machine;
    any other name, number or order gives an unrelated one (BLAKE2b, RFC 7693, 64 bits). Seed 0 is a seed
    like any other.

    Raises: ValueError when the seed does not fit 64 unsigned bits.
    """

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise BadInput(f"a Key needs a whole number from 0 to 2**64 - 1, not {self.seed!r}.")

    def fold(self, name: str, index: int = 0) -> Key:
        """The key named `name`, number `index`, below this one."""
        message = f"{self.seed}/{name}/{index}".encode()
        return Key(int.from_bytes(blake2b(message, digest_size=8).digest(), "little"))
