"""How the slopes of several directions become one gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from gradcost.value import value


class Combine(ABC):
    """Turns slopes into the coefficients of their directions."""

    unbiased: ClassVar[bool]  # whether the gradient is unbiased when the directions are

    @abstractmethod
    def coefficients(self, slopes: Sequence[float]) -> tuple[float, ...]:
        """One coefficient a slope: the gradient is the sum of coefficient times direction."""


@value
class Mean(Combine):
    """g = (1/n) sum_k s_k z_k. Unbiased: E g = E[z z'] grad = grad. (Spall 1992; Baydin et al. 2022.)"""

    unbiased = True

    def coefficients(self, slopes: Sequence[float]) -> tuple[float, ...]:
        return tuple(slope / len(slopes) for slope in slopes)
