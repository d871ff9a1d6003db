"""Estimators of a gradient: backprop, forward gradients, zero-order finite differences, and wrappers around them.

An estimator is immutable. `estimate` returns the loss and a gradient, which can be read any number of times.
"""

from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.activity import ActivityPerturbation
from gradcost.estimators.adaptive import Adaptive, Choice, Flattest, Steepest
from gradcost.estimators.by_length import ByLength
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.combine import Combine, Mean, Normalized, Projection, Sign
from gradcost.estimators.estimator import Estimate, Estimator, Facts
from gradcost.estimators.gradient import Concatenated, Dense, Gradient, Seeded, Signed, Streamed, Sum
from gradcost.estimators.hessian_informed import HessianInformed
from gradcost.estimators.mixed import Mixed
from gradcost.estimators.momentum import Momentum
from gradcost.estimators.presets import (
    activity_perturbation,
    addax,
    backprop,
    checkpointed,
    forward_gradient,
    fzoo,
    hizoo,
    mezo,
    multi_tangent,
    spsa,
    zo_sgd_sign,
    zo_svrg,
)
from gradcost.estimators.probing import Probing, replayed
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.surrogate import as_loss, surrogate_loss
from gradcost.estimators.variance_reduced import VarianceReduced

__all__ = [
    "Accumulated",
    "ActivityPerturbation",
    "Adaptive",
    "ByLength",
    "Choice",
    "Clipped",
    "Combine",
    "Concatenated",
    "Dense",
    "Estimate",
    "Estimator",
    "Facts",
    "Flattest",
    "Gradient",
    "HessianInformed",
    "Mean",
    "Mixed",
    "Momentum",
    "Normalized",
    "Probing",
    "Projection",
    "Reverse",
    "Seeded",
    "Sign",
    "Signed",
    "Steepest",
    "Streamed",
    "Sum",
    "VarianceReduced",
    "activity_perturbation",
    "addax",
    "as_loss",
    "backprop",
    "checkpointed",
    "forward_gradient",
    "fzoo",
    "hizoo",
    "mezo",
    "multi_tangent",
    "replayed",
    "spsa",
    "surrogate_loss",
    "zo_sgd_sign",
    "zo_svrg",
]
