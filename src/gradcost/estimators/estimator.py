"""The interface of estimators: loss and gradient of a batch, exact or estimated."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.arguments import require_key
from gradcost.core.errors import BadInput
from gradcost.core.fake import is_fake
from gradcost.core.interrupts import interruptible
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf, Objective
from gradcost.estimators.gradient import Gradient

State = Any  # a tree (tuples, dictionaries) of tensors and numbers
LeafConsumer = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class Estimate:
    """The result of one call of an estimator.

    Args:
        loss: the loss at the present parameters, a scalar tensor.
        gradient: the estimate of the gradient; a `Streamed` if the estimate is the result of `stream`.
        slopes: the slope along each probe, float64, shape (probes,), before any clipping. None for backprop.
        state: the `state` argument of the next call. None if the estimator has no state.
        clipped: the fraction of slopes that `Clipped` changed, in [0, 1]. None without clipping.
    """

    loss: Tensor
    gradient: Gradient
    slopes: Tensor | None = None
    state: State | None = None
    clipped: float | None = None


class Facts(NamedTuple):
    """Properties of an estimator that are known without running it.

    All of them except `transparent` are also properties of `Estimator`.

    Args:
        inner: the estimator that this one wraps; None if it wraps none or more than one.
        exact: True if the estimate is the gradient of the batch.
        unbiased: True if the mean of the estimate over its randomness is the gradient, up to the bias of finite
            differences.
        replayable: True if the gradient is seeded, along directions that do not depend on parameters or earlier
            steps. Its seeds and coefficients then reproduce it at any later step.
        scales_with_slopes: True if the gradient is the sum of slope k times direction k times a constant.
        transparent: True if cost, variance and cosine are those of `inner` (exactly, or if no slope is clipped).
    """

    inner: Estimator | None = None
    exact: bool = False
    unbiased: bool = False
    replayable: bool = False
    scales_with_slopes: bool = False
    transparent: bool = False


def require_objective(objective: Any) -> None:
    """Raise BadInput if `objective` is not an `Objective`."""
    if not isinstance(objective, Objective):
        raise BadInput(f"the objective is a {type(objective).__name__}: write gradcost.Objective(model, loss).")


def require_estimator(estimator: Any) -> None:
    """Raise BadInput if `estimator` is not an `Estimator`."""
    if not isinstance(estimator, Estimator):
        given = f"{estimator.__name__}, a function" if isinstance(estimator, FunctionType) else repr(estimator)
        raise BadInput(f"the estimator is {given}: write a value such as gradcost.mezo().")


def use_none(use: LeafConsumer, leaf: Leaf) -> None:
    """Pass a parameter on that the loss does not use: by `use.skip(name)` if there is such a method, else as zeros.

    Args:
        use: the argument of `Estimator.stream`.
        leaf: the parameter.
    """
    skip: Callable[[str], None] | None = getattr(use, "skip", None)
    if skip is not None:
        skip(leaf.name)
    else:
        use(leaf.name, tag("gradients", torch.zeros_like(leaf.parameter, requires_grad=False)))


def _checked(function: Callable[..., Estimate]) -> Callable[..., Estimate]:
    """Check the objective and the key before a call of `estimate` or `stream`."""

    @functools.wraps(function)
    def run(self: Any, objective: Any, batch: Any, key: Any, *args: Any, **kwargs: Any) -> Estimate:
        require_objective(objective)
        require_key(key)
        first = objective.leaves[0]
        if first.parameter.is_meta and not is_fake(first.parameter):
            raise BadInput(
                f"`{first.name}` is on the meta device, which stores no numbers: load the weights, or make the model "
                "on the CPU. forecast and plan take a model on the meta device."
            )
        return function(self, objective, batch, key, *args, **kwargs)

    return run


class Estimator(ABC):
    """A method that returns a batch's loss and an estimate of its gradient. Immutable; usable with every objective.

    Laws: the same key gives the same estimate, bit for bit. An estimate changes no parameter, buffer, `.grad`, hook,
    mode or random generator, also after an exception or a KeyboardInterrupt at any moment.
    """

    def __init_subclass__(cls) -> None:
        for name in {"estimate", "stream"} & vars(cls).keys():
            setattr(cls, name, interruptible(_checked(vars(cls)[name])))
        if "objection" in vars(cls):
            cls.objection = interruptible(vars(cls)["objection"])

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Properties of the estimator that are known without running it."""

    @property
    def inner(self) -> Estimator | None:
        """The estimator that this one wraps; None if it wraps none or more than one."""
        return self.facts.inner

    @property
    def exact(self) -> bool:
        """Whether the estimate is the gradient of the batch."""
        return self.facts.exact

    @property
    def unbiased(self) -> bool:
        """Whether the mean estimate is the gradient, up to the bias of finite differences."""
        return self.facts.unbiased

    @property
    def replayable(self) -> bool:
        """Whether seeds and coefficients alone reproduce the gradient at any later step."""
        return self.facts.replayable

    @property
    def scales_with_slopes(self) -> bool:
        """Whether the gradient is the sum of slope k times direction k times a constant."""
        return self.facts.scales_with_slopes

    @abstractmethod
    def init(self, objective: Objective) -> State | None:
        """Return the state for the first call of `estimate`; None if the estimator has no state.

        Args:
            objective: the model and the loss.
        """

    @abstractmethod
    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        """Estimate the gradient at the present parameters.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
            key: the only source of randomness.
            state: the `state` of the previous estimate. None: that of `init(objective)`.
        Returns:
            The loss, the gradient, the slopes and the next state.
        Raises:
            BadInput: the loss is not a differentiable scalar. NotFinite: the loss or a slope is not finite.
            Unsupported: the estimator cannot be used here; see `objection`.
        """

    @abstractmethod
    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        """Estimate the gradient and pass it to `use`, one parameter at a time, so that not all of it is in memory.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
            key: the only source of randomness.
            use: called as `use(name, gradient)` for each parameter once its gradient is complete. `use` may change
                the parameter with this name. For a parameter in `Gradient.unused`, `use.skip(name)` is called if
                `use` has this method, else `use` gets zeros.
            state: the `state` of the previous estimate. None: that of `init(objective)`.
        Returns:
            The estimate, with a gradient of type `Streamed`.
        Raises:
            BadInput: the loss is not a differentiable scalar. NotFinite: the loss or a slope is not finite.
            Unsupported: the estimator cannot be used here; see `objection`.
        """

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Return why the estimator cannot be used here and what to use instead; None if it can be used.

        Args:
            objective: the model and the loss.
            batch: an example of the batches to estimate on.
        """
