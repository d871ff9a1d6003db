"""What a gradient costs, and which way of getting one to train with: the public names, each loaded when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcost.combine import Mean as Mean
    from gradcost.directions import Coordinates as Coordinates
    from gradcost.directions import Gaussian as Gaussian
    from gradcost.directions import Rademacher as Rademacher
    from gradcost.directions import Sphere as Sphere
    from gradcost.dual import Note as Note
    from gradcost.estimators.accumulated import Accumulated as Accumulated
    from gradcost.estimators.clipped import Clipped as Clipped
    from gradcost.estimators.estimator import Estimate as Estimate
    from gradcost.estimators.estimator import Estimator as Estimator
    from gradcost.estimators.presets import backprop as backprop
    from gradcost.estimators.presets import checkpointed as checkpointed
    from gradcost.estimators.presets import forward_gradient as forward_gradient
    from gradcost.estimators.presets import mezo as mezo
    from gradcost.estimators.presets import spsa as spsa
    from gradcost.estimators.probing import Probing as Probing
    from gradcost.estimators.reverse import Reverse as Reverse
    from gradcost.gradient import Dense as Dense
    from gradcost.gradient import Gradient as Gradient
    from gradcost.gradient import Seeded as Seeded
    from gradcost.key import Key as Key
    from gradcost.objective import Objective as Objective
    from gradcost.saving import Blocks as Blocks
    from gradcost.saving import Everything as Everything
    from gradcost.saving import Segments as Segments
    from gradcost.slopes import CentralDifference as CentralDifference
    from gradcost.slopes import ForwardDifference as ForwardDifference
    from gradcost.slopes import Jvp as Jvp
    from gradcost.training.loop import Step as Step
    from gradcost.training.loop import train as train
    from gradcost.training.optimizers import SGD as SGD
    from gradcost.training.optimizers import Adam as Adam
    from gradcost.training.optimizers import AdamW as AdamW
    from gradcost.training.optimizers import Nesterov as Nesterov

_HOME = {
    "Accumulated": "estimators.accumulated",
    "Adam": "training.optimizers",
    "AdamW": "training.optimizers",
    "Blocks": "saving",
    "CentralDifference": "slopes",
    "Clipped": "estimators.clipped",
    "Coordinates": "directions",
    "Dense": "gradient",
    "Estimate": "estimators.estimator",
    "Estimator": "estimators.estimator",
    "Everything": "saving",
    "ForwardDifference": "slopes",
    "Gaussian": "directions",
    "Gradient": "gradient",
    "Jvp": "slopes",
    "Key": "key",
    "Mean": "combine",
    "Nesterov": "training.optimizers",
    "Note": "dual",
    "Objective": "objective",
    "Probing": "estimators.probing",
    "Rademacher": "directions",
    "Reverse": "estimators.reverse",
    "SGD": "training.optimizers",
    "Seeded": "gradient",
    "Segments": "saving",
    "Sphere": "directions",
    "Step": "training.loop",
    "backprop": "estimators.presets",
    "checkpointed": "estimators.presets",
    "forward_gradient": "estimators.presets",
    "mezo": "estimators.presets",
    "spsa": "estimators.presets",
    "train": "training.loop",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradcost' has no attribute {name!r}")
    return getattr(import_module(f"gradcost.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
