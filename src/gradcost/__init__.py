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
    from gradcost.diagnostics.diagnose import diagnose as diagnose
    from gradcost.diagnostics.diagnosis import Diagnosis as Diagnosis
    from gradcost.diagnostics.recorder import Recorder as Recorder
    from gradcost.directions import Coordinates as Coordinates
    from gradcost.directions import Directions as Directions
    from gradcost.directions import EachBlock as EachBlock
    from gradcost.directions import EachLeaf as EachLeaf
    from gradcost.directions import EachModule as EachModule
    from gradcost.directions import Fixed as Fixed
    from gradcost.directions import Gaussian as Gaussian
    from gradcost.directions import Grouping as Grouping
    from gradcost.directions import Guided as Guided
    from gradcost.directions import Largest as Largest
    from gradcost.directions import Layerwise as Layerwise
    from gradcost.directions import Mask as Mask
    from gradcost.directions import Masked as Masked
    from gradcost.directions import Named as Named
    from gradcost.directions import Rademacher as Rademacher
    from gradcost.directions import Random as Random
    from gradcost.directions import Situated as Situated
    from gradcost.directions import Smallest as Smallest
    from gradcost.directions import Sphere as Sphere
    from gradcost.directions.lowrank import LazyLowRank as LazyLowRank
    from gradcost.directions.lowrank import LowRank as LowRank
    from gradcost.directions.orthogonal import Orthogonal as Orthogonal
    from gradcost.estimators.accumulated import Accumulated as Accumulated
    from gradcost.estimators.activity import ActivityPerturbation as ActivityPerturbation
    from gradcost.estimators.adaptive import Adaptive as Adaptive
    from gradcost.estimators.adaptive import Flattest as Flattest
    from gradcost.estimators.adaptive import Steepest as Steepest
    from gradcost.estimators.by_length import ByLength as ByLength
    from gradcost.estimators.clipped import Clipped as Clipped
    from gradcost.estimators.estimator import Estimate as Estimate
    from gradcost.estimators.estimator import Estimator as Estimator
    from gradcost.estimators.hessian_informed import HessianInformed as HessianInformed
    from gradcost.estimators.mixed import Mixed as Mixed
    from gradcost.estimators.momentum import Momentum as Momentum
    from gradcost.estimators.presets import activity_perturbation as activity_perturbation
    from gradcost.estimators.presets import addax as addax
    from gradcost.estimators.presets import backprop as backprop
    from gradcost.estimators.presets import checkpointed as checkpointed
    from gradcost.estimators.presets import forward_gradient as forward_gradient
    from gradcost.estimators.presets import fzoo as fzoo
    from gradcost.estimators.presets import hizoo as hizoo
    from gradcost.estimators.presets import mezo as mezo
    from gradcost.estimators.presets import multi_tangent as multi_tangent
    from gradcost.estimators.presets import spsa as spsa
    from gradcost.estimators.presets import zo_sgd_sign as zo_sgd_sign
    from gradcost.estimators.presets import zo_svrg as zo_svrg
    from gradcost.estimators.probing import Probing as Probing
    from gradcost.estimators.reverse import Reverse as Reverse
    from gradcost.estimators.variance_reduced import VarianceReduced as VarianceReduced
    from gradcost.gradient import Dense as Dense
    from gradcost.gradient import Gradient as Gradient
    from gradcost.gradient import Seeded as Seeded
    from gradcost.gradient import Signed as Signed
    from gradcost.gradient import Sum as Sum
    from gradcost.key import Key as Key
    from gradcost.note import Note as Note
    from gradcost.objective import Objective as Objective
    from gradcost.precision import best_eps as best_eps
    from gradcost.precision import best_forward_eps as best_forward_eps
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
    from gradcost.theory.convergence import gradient_bound as gradient_bound
    from gradcost.theory.cosines import cosine_along_coordinates as cosine_along_coordinates
    from gradcost.theory.cosines import expected_cosine as expected_cosine
    from gradcost.theory.moments import second_moment as second_moment
    from gradcost.theory.quadratic import expected_losses as expected_losses
    from gradcost.theory.selection import selection_bias as selection_bias
    from gradcost.theory.slowdown import effective_slowdown as effective_slowdown
    from gradcost.theory.slowdown import probes_to_match as probes_to_match
    from gradcost.theory.slowdown import slowdown as slowdown
    from gradcost.theory.slowdown import stable_step as stable_step
    from gradcost.training.loop import Step as Step
    from gradcost.training.loop import train as train
    from gradcost.training.optimizers import SGD as SGD
    from gradcost.training.optimizers import Adam as Adam
    from gradcost.training.optimizers import AdamW as AdamW
    from gradcost.training.optimizers import Nesterov as Nesterov
    from gradcost.training.rounding import Master as Master
    from gradcost.training.rounding import StochasticallyRounded as StochasticallyRounded

_HOME = {
    "Accumulated": "estimators.accumulated",
    "ActivityPerturbation": "estimators.activity",
    "Adam": "training.optimizers",
    "AdamW": "training.optimizers",
    "Adaptive": "estimators.adaptive",
    "Allocator": "cost.measure",
    "Attention": "saving",
    "Blocks": "saving",
    "ByLength": "estimators.by_length",
    "Bytes": "cost.measure",
    "CentralDifference": "slopes",
    "Clipped": "estimators.clipped",
    "Coordinates": "directions",
    "Dense": "gradient",
    "Diagnosis": "diagnostics.diagnosis",
    "Directions": "directions",
    "EachBlock": "directions",
    "EachLeaf": "directions",
    "EachModule": "directions",
    "Estimate": "estimators.estimator",
    "Estimator": "estimators.estimator",
    "Everything": "saving",
    "Fixed": "directions",
    "Flattest": "estimators.adaptive",
    "Forecast": "cost.forecast",
    "ForwardDifference": "slopes",
    "Gaussian": "directions",
    "Gradient": "gradient",
    "Grouping": "directions",
    "Guided": "directions",
    "HessianInformed": "estimators.hessian_informed",
    "Jvp": "slopes",
    "Key": "key",
    "Largest": "directions",
    "Layerwise": "directions",
    "LazyLowRank": "directions.lowrank",
    "LowRank": "directions.lowrank",
    "Mask": "directions",
    "Masked": "directions",
    "Master": "training.rounding",
    "Matmuls": "saving",
    "Mean": "combine",
    "Measurement": "cost.measure",
    "Mixed": "estimators.mixed",
    "Momentum": "estimators.momentum",
    "Named": "directions",
    "Nesterov": "training.optimizers",
    "Normalized": "combine",
    "Note": "note",
    "Objective": "objective",
    "Offloaded": "saving",
    "Operations": "cost.measure",
    "Orthogonal": "directions.orthogonal",
    "Plan": "cost.plan",
    "Probing": "estimators.probing",
    "Projection": "combine",
    "Rademacher": "directions",
    "Random": "directions",
    "Recorder": "diagnostics.recorder",
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
    "Smallest": "directions",
    "Sphere": "directions",
    "Steepest": "estimators.adaptive",
    "Step": "training.loop",
    "Steps": "cost.measure",
    "StochasticallyRounded": "training.rounding",
    "Sum": "gradient",
    "VarianceReduced": "estimators.variance_reduced",
    "Within": "cost.within",
    "activity_perturbation": "estimators.presets",
    "addax": "estimators.presets",
    "backprop": "estimators.presets",
    "best_eps": "precision",
    "best_forward_eps": "precision",
    "checkpointed": "estimators.presets",
    "chunked_cross_entropy": "chunked",
    "cosine_along_coordinates": "theory.cosines",
    "diagnose": "diagnostics.diagnose",
    "effective_slowdown": "theory.slowdown",
    "expected_cosine": "theory.cosines",
    "expected_losses": "theory.quadratic",
    "forecast": "cost.forecast",
    "forward_gradient": "estimators.presets",
    "fzoo": "estimators.presets",
    "gradient_bound": "theory.convergence",
    "hizoo": "estimators.presets",
    "measure": "cost.measure",
    "mezo": "estimators.presets",
    "multi_tangent": "estimators.presets",
    "plan": "cost.plan",
    "probes_to_match": "theory.slowdown",
    "second_moment": "theory.moments",
    "selection_bias": "theory.selection",
    "slowdown": "theory.slowdown",
    "spsa": "estimators.presets",
    "stable_step": "theory.slowdown",
    "train": "training.loop",
    "zo_sgd_sign": "estimators.presets",
    "zo_svrg": "estimators.presets",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gradcost' has no attribute {name!r}")
    return getattr(import_module(f"gradcost.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
