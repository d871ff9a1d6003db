"""What a gradient costs, and which way of getting one to train with: the public names, each loaded when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcost.checkpointing.chunked_loss import chunked_cross_entropy as chunked_cross_entropy
    from gradcost.checkpointing.policies import Attention as Attention
    from gradcost.checkpointing.policies import Blocks as Blocks
    from gradcost.checkpointing.policies import Everything as Everything
    from gradcost.checkpointing.policies import Matmuls as Matmuls
    from gradcost.checkpointing.policies import Offloaded as Offloaded
    from gradcost.checkpointing.policies import Schedule as Schedule
    from gradcost.checkpointing.policies import Segments as Segments
    from gradcost.checkpointing.policies import Selective as Selective
    from gradcost.checks.check import check as check
    from gradcost.checks.recorder import Recorder as Recorder
    from gradcost.checks.report import CheckReport as CheckReport
    from gradcost.core.key import Key as Key
    from gradcost.core.notes import Note as Note
    from gradcost.core.objective import Objective as Objective
    from gradcost.core.precision import best_eps as best_eps
    from gradcost.core.precision import best_forward_eps as best_forward_eps
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
    from gradcost.directions import Smallest as Smallest
    from gradcost.directions import Sphere as Sphere
    from gradcost.directions import StatefulDirections as StatefulDirections
    from gradcost.directions.low_rank import LazyLowRank as LazyLowRank
    from gradcost.directions.low_rank import LowRank as LowRank
    from gradcost.directions.orthogonal import Orthogonal as Orthogonal
    from gradcost.estimators.accumulated import Accumulated as Accumulated
    from gradcost.estimators.activity import ActivityPerturbation as ActivityPerturbation
    from gradcost.estimators.adaptive import Adaptive as Adaptive
    from gradcost.estimators.adaptive import Flattest as Flattest
    from gradcost.estimators.adaptive import Steepest as Steepest
    from gradcost.estimators.by_length import ByLength as ByLength
    from gradcost.estimators.clipped import Clipped as Clipped
    from gradcost.estimators.combine import Mean as Mean
    from gradcost.estimators.combine import Normalized as Normalized
    from gradcost.estimators.combine import Projection as Projection
    from gradcost.estimators.combine import Sign as Sign
    from gradcost.estimators.estimator import Estimate as Estimate
    from gradcost.estimators.estimator import Estimator as Estimator
    from gradcost.estimators.gradient import Dense as Dense
    from gradcost.estimators.gradient import Gradient as Gradient
    from gradcost.estimators.gradient import Seeded as Seeded
    from gradcost.estimators.gradient import Signed as Signed
    from gradcost.estimators.gradient import Sum as Sum
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
    from gradcost.instruments.measure import Allocator as Allocator
    from gradcost.instruments.measure import Bytes as Bytes
    from gradcost.instruments.measure import Measurement as Measurement
    from gradcost.instruments.measure import Operations as Operations
    from gradcost.instruments.measure import Seconds as Seconds
    from gradcost.instruments.measure import TrainingStep as TrainingStep
    from gradcost.instruments.measure import measure as measure
    from gradcost.planning.forecast import Forecast as Forecast
    from gradcost.planning.forecast import forecast as forecast
    from gradcost.planning.plan import Plan as Plan
    from gradcost.planning.plan import plan as plan
    from gradcost.planning.within import Within as Within
    from gradcost.slopes.slope import CentralDifference as CentralDifference
    from gradcost.slopes.slope import ForwardDifference as ForwardDifference
    from gradcost.slopes.slope import Jvp as Jvp
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
    from gradcost.training.loop import StepResult as StepResult
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
    "Allocator": "instruments.measure",
    "Attention": "checkpointing.policies",
    "Blocks": "checkpointing.policies",
    "ByLength": "estimators.by_length",
    "Bytes": "instruments.measure",
    "CentralDifference": "slopes.slope",
    "Clipped": "estimators.clipped",
    "Coordinates": "directions",
    "Dense": "estimators.gradient",
    "CheckReport": "checks.report",
    "Directions": "directions",
    "EachBlock": "directions",
    "EachLeaf": "directions",
    "EachModule": "directions",
    "Estimate": "estimators.estimator",
    "Estimator": "estimators.estimator",
    "Everything": "checkpointing.policies",
    "Fixed": "directions",
    "Flattest": "estimators.adaptive",
    "Forecast": "planning.forecast",
    "ForwardDifference": "slopes.slope",
    "Gaussian": "directions",
    "Gradient": "estimators.gradient",
    "Grouping": "directions",
    "Guided": "directions",
    "HessianInformed": "estimators.hessian_informed",
    "Jvp": "slopes.slope",
    "Key": "core.key",
    "Largest": "directions",
    "Layerwise": "directions",
    "LazyLowRank": "directions.low_rank",
    "LowRank": "directions.low_rank",
    "Mask": "directions",
    "Masked": "directions",
    "Master": "training.rounding",
    "Matmuls": "checkpointing.policies",
    "Mean": "estimators.combine",
    "Measurement": "instruments.measure",
    "Mixed": "estimators.mixed",
    "Momentum": "estimators.momentum",
    "Named": "directions",
    "Nesterov": "training.optimizers",
    "Normalized": "estimators.combine",
    "Note": "core.notes",
    "Objective": "core.objective",
    "Offloaded": "checkpointing.policies",
    "Operations": "instruments.measure",
    "Orthogonal": "directions.orthogonal",
    "Plan": "planning.plan",
    "Probing": "estimators.probing",
    "Projection": "estimators.combine",
    "Rademacher": "directions",
    "Random": "directions",
    "Recorder": "checks.recorder",
    "Reverse": "estimators.reverse",
    "SGD": "training.optimizers",
    "Schedule": "checkpointing.policies",
    "Seconds": "instruments.measure",
    "Seeded": "estimators.gradient",
    "Segments": "checkpointing.policies",
    "Selective": "checkpointing.policies",
    "Sign": "estimators.combine",
    "Signed": "estimators.gradient",
    "StatefulDirections": "directions",
    "Smallest": "directions",
    "Sphere": "directions",
    "Steepest": "estimators.adaptive",
    "Step": "training.loop",
    "Steps": "instruments.measure",
    "StochasticallyRounded": "training.rounding",
    "Sum": "estimators.gradient",
    "VarianceReduced": "estimators.variance_reduced",
    "Within": "planning.within",
    "activity_perturbation": "estimators.presets",
    "addax": "estimators.presets",
    "backprop": "estimators.presets",
    "best_eps": "core.precision",
    "best_forward_eps": "core.precision",
    "checkpointed": "estimators.presets",
    "chunked_cross_entropy": "checkpointing.chunked_loss",
    "cosine_along_coordinates": "theory.cosines",
    "diagnose": "checks.check",
    "effective_slowdown": "theory.slowdown",
    "expected_cosine": "theory.cosines",
    "expected_losses": "theory.quadratic",
    "forecast": "planning.forecast",
    "forward_gradient": "estimators.presets",
    "fzoo": "estimators.presets",
    "gradient_bound": "theory.convergence",
    "hizoo": "estimators.presets",
    "measure": "instruments.measure",
    "mezo": "estimators.presets",
    "multi_tangent": "estimators.presets",
    "plan": "planning.plan",
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
