"""Directional derivatives of the loss: exact by forward-mode AD, or approximate by finite differences.

A slope evaluates the model at perturbed weights without changing the model.
"""

from gradcost.slopes.slope import CentralDifference, ForwardDifference, Jvp, Slope

__all__ = [
    "CentralDifference",
    "ForwardDifference",
    "Jvp",
    "Slope",
]
