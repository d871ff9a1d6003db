"""The names that people know, each a composition of the parts with its paper."""

from __future__ import annotations

from gradcost.directions import Gaussian, Rademacher
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.saving import Blocks, Everything
from gradcost.slopes import CentralDifference, Jvp


def backprop() -> Reverse:
    """Backpropagation that saves everything. Rumelhart, Hinton, Williams, Nature 323 (1986)."""
    return Reverse(Everything())


def checkpointed() -> Reverse:
    """Backpropagation that recomputes each block. Chen, Xu, Zhang, Guestrin, arXiv 1604.06174 (2016)."""
    return Reverse(Blocks())


def forward_gradient(probes: int = 1) -> Probing:
    """Forward gradient g = (grad f . v) v, v ~ N(0, I), by forward-mode differentiation, the mean of `probes`.

    Baydin, Pearlmutter, Syme, Wood, Torr, arXiv 2202.08587 (2022), definition 1.
    """
    return Probing(Jvp(), Gaussian(), probes)


def spsa(eps: float = 1e-3, probes: int = 1) -> Probing:
    """Simultaneous perturbation with random signs and a two-sided difference. Spall, IEEE TAC 37 (1992), eq. 2.2."""
    return Probing(CentralDifference(eps), Rademacher(), probes)


def mezo(eps: float = 1e-3, probes: int = 1) -> Probing:
    """Two-sided difference along a seeded Gaussian direction. Malladi et al., arXiv 2305.17333 (2023), alg. 1."""
    return Probing(CentralDifference(eps), Gaussian(), probes)
