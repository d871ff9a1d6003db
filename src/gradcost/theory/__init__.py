"""Formulas for estimators: variance, cosine, number of steps, cost and convergence.

These functions run no model. The tests compare each of them with measurements.
"""

from gradcost.core.precision import best_eps, best_forward_eps
from gradcost.theory.convergence import gradient_bound
from gradcost.theory.cosines import cosine_along_coordinates, expected_cosine
from gradcost.theory.costs import activations, adapter_forwards, forwards, matmuls
from gradcost.theory.differences import central_error, forward_error, survives
from gradcost.theory.moments import second_moment
from gradcost.theory.quadratic import expected_losses
from gradcost.theory.selection import selection_bias
from gradcost.theory.slowdown import effective_slowdown, probes_to_match, slowdown, stable_step

__all__ = [
    "activations",
    "adapter_forwards",
    "best_eps",
    "best_forward_eps",
    "central_error",
    "cosine_along_coordinates",
    "effective_slowdown",
    "expected_cosine",
    "expected_losses",
    "forward_error",
    "forwards",
    "gradient_bound",
    "matmuls",
    "probes_to_match",
    "second_moment",
    "selection_bias",
    "slowdown",
    "stable_step",
    "survives",
]
