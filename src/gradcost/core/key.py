"""Seeds for all randomness in gradcost, derived from one seed by names and indices."""

from __future__ import annotations

import operator
from hashlib import blake2b

from gradcost.core.errors import BadInput
from gradcost.core.value import value


@value
class Key:
    """A 64-bit seed from which further keys are derived: `Key(0).fold("step", 3).fold("probe", 1)`.

    Law: the same seed, names and indices in the same order give the same key, in every process and on every machine.
    Any other name, index or order gives an unrelated key (BLAKE2b, RFC 7693, 64 bits). Seed 0 has no special meaning.

    Args:
        seed: an integer from 0 to 2**64 - 1.
    Raises:
        BadInput: the seed is out of range or not an integer.
    """

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise BadInput(f"a Key needs a whole number from 0 to 2**64 - 1, not {self.seed!r}.")

    def fold(self, name: str, index: int = 0) -> Key:
        """Derive a key from this key, a name and an index.

        Args:
            name: the purpose of the derived key, such as "step".
            index: distinguishes derived keys that have the same name.
        Returns:
            A key unrelated to this key and to all other keys derived from this key.
        Raises:
            BadInput: the index is no whole number, such as 3.0.
        """
        try:
            message = f"{self.seed}/{name}/{operator.index(index)}".encode()
        except TypeError:
            raise BadInput(f"the index of a key is a whole number, not {index!r}.") from None
        return Key(int.from_bytes(blake2b(message, digest_size=8).digest(), "little"))
