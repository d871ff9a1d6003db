"""What a gradient costs, and which way of getting one to train with: the public names, each loaded when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcost.chunked import chunked_cross_entropy as chunked_cross_entropy
    from gradcost.combine import Mean as Mean
    from gradcost.combine import Normalized as Normalized
    from gradcost.combine import Projection as Projection
    from gradcost.combine import Sign as Sign
    from gradcost.cost.forecast import Forecast as Forecast
    from gradcost.cost.forecast import forecast as forecast
    from gradcost.cost.measure import Allocator as Allocator
    from gradcost.cost.measure import Bytes as Bytes
    from gradcost.cost.measure import Measurement as Measurement
    from gradcost.cost.measure import Operations as Operations
    from gradcost.cost.measure import Seconds as Seconds
    from gradcost.cost.measure import Steps as Steps
    from gradcost.cost.measure import measure as measure
    from gradcost.cost.plan import Plan as Plan
    from gradcost.cost.plan import plan as plan
    from gradcost.cost.within import Within as Within
    from gradcost.directions import Coordinates as Coordinates
    from gradcost.directions import Directions as Directions
    from gradcost.directions import Gaussian as Gaussian
    from gradcost.directions import Rademacher as Rademacher
    from gradcost.directions import Situated as Situated
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
    from gradcost.gradient import Signed as Signed
    from gradcost.gradient import Sum as Sum
    from gradcost.key import Key as Key
    from gradcost.objective import Objective as Objective
    from gradcost.saving import Attention as Attention
    from gradcost.saving import Blocks as Blocks
    from gradcost.saving import Everything as Everything
    from gradcost.saving import Matmuls as Matmuls
    from gradcost.saving import Offloaded as Offloaded
    from gradcost.saving import Schedule as Schedule
    from gradcost.saving import Segments as Segments
    from gradcost.saving import Selective as Selective
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
    "Allocator": "cost.measure",
    "Attention": "saving",
    "Blocks": "saving",
    "Bytes": "cost.measure",
    "CentralDifference": "slopes",
    "Clipped": "estimators.clipped",
    "Coordinates": "directions",
    "Dense": "gradient",
    "Directions": "directions",
    "Estimate": "estimators.estimator",
    "Estimator": "estimators.estimator",
    "Everything": "saving",
    "Forecast": "cost.forecast",
    "ForwardDifference": "slopes",
    "Gaussian": "directions",
    "Gradient": "gradient",
    "Jvp": "slopes",
    "Key": "key",
    "Matmuls": "saving",
    "Mean": "combine",
    "Measurement": "cost.measure",
    "Nesterov": "training.optimizers",
    "Normalized": "combine",
    "Note": "dual",
    "Objective": "objective",
    "Offloaded": "saving",
    "Operations": "cost.measure",
    "Plan": "cost.plan",
    "Probing": "estimators.probing",
    "Projection": "combine",
    "Rademacher": "directions",
    "Reverse": "estimators.reverse",
    "SGD": "training.optimizers",
    "Schedule": "saving",
    "Seconds": "cost.measure",
    "Seeded": "gradient",
    "Segments": "saving",
    "Selective": "saving",
    "Sign": "combine",
    "Signed": "gradient",
    "Situated": "directions",
    "Sphere": "directions",
    "Step": "training.loop",
    "Steps": "cost.measure",
    "Sum": "gradient",
    "Within": "cost.within",
    "backprop": "estimators.presets",
    "checkpointed": "estimators.presets",
    "chunked_cross_entropy": "chunked",
    "forecast": "cost.forecast",
    "forward_gradient": "estimators.presets",
    "measure": "cost.measure",
    "mezo": "estimators.presets",
    "plan": "cost.plan",
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
