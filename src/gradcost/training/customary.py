"""The optimizer that is customary for each method: AdamW for exact gradients, SGD for estimated ones."""

from __future__ import annotations

from gradcost.core.value import value
from gradcost.estimators.estimator import Estimator
from gradcost.training.optimizers import SGD, AdamW, Optimizer


@value
class Customary:
    """Each method with the optimizer that is customary for it. In a study its learning rate is searched.

    - A method with the exact gradient: `AdamW`, with torch's defaults.
    - A method with an estimated gradient: `SGD` without momentum, as in the papers on forward gradients and MeZO.
      Adam's second moment would mostly measure the noise of the estimates, and costs the memory that they save.

    Source: Loshchilov and Hutter 2019; Baydin et al. 2022; Malladi et al. 2023.
    """

    def of(self, estimator: Estimator) -> Optimizer:
        """Return the customary optimizer of an estimator, with a learning rate to replace.

        Args:
            estimator: the method.
        """
        return AdamW(1.0) if estimator.exact else SGD(1.0)


def optimizer_of(optimizer: Optimizer | Customary, estimator: Estimator) -> Optimizer:
    """Return the optimizer of a method: the same for all, or the customary one."""
    return optimizer.of(estimator) if isinstance(optimizer, Customary) else optimizer
