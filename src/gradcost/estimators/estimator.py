"""The interface of every way of getting a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.estimators.gradient import Gradient

State = Any  # a tree (tuples, dictionaries) of tensors and numbers
LeafConsumer = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class Estimate:
    """The result of one call of an estimator.

    Args:
        loss: the loss at the present parameters, a scalar tensor.
        gradient: the estimate of the gradient; `Streamed` if `stream` has already passed it on.
        slopes: the slope along each probe, float64, shape (probes,), before any clipping. None for backprop.
        state: what a stateful estimator needs at its next call. None if it has no state.
        clipped: the share of slopes that `Clipped` cut, in [0, 1]. None without clipping.
    """

    loss: Tensor
    gradient: Gradient
    slopes: Tensor | None = None
    state: State | None = None
    clipped: float | None = None


class Facts(NamedTuple):
    """What an estimator is, known without running it; each fact is also a member of the estimator.

    Args:
        inner: the estimator that this one wraps; None if it wraps none, or two.
        exact: the estimate is the gradient of the batch itself.
        unbiased: the mean of the estimate over its randomness is the gradient, up to the bias of finite differences.
        replayable: the gradient is seeded along directions that do not depend on parameters or on the past, so its
            seeds and coefficients reproduce it at any later step.
        scales_with_slopes: probe k contributes slope k times direction k, times a constant, and nothing else.
        transparent: cost, variance and cosine are those of `inner` (exactly, or as long as nothing is clipped).
    """

    inner: Estimator | None = None
    exact: bool = False
    unbiased: bool = False
    replayable: bool = False
    scales_with_slopes: bool = False
    transparent: bool = False


class Estimator(ABC):
    """A way of getting a gradient: an immutable value, the same for every objective.

    Laws: the same key gives the same estimate, bit for bit. Nothing of the model is disturbed.
    """

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What the estimator is, known without running it."""

    @property
    def inner(self) -> Estimator | None:
        """The estimator that this one wraps; None if it wraps none, or two."""
        return self.facts.inner

    @property
    def exact(self) -> bool:
        """Whether the estimate is the gradient of the batch itself."""
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
        """Whether each probe contributes its slope times its direction, times a constant."""
        return self.facts.scales_with_slopes

    @abstractmethod
    def init(self, objective: Objective) -> State | None:
        """Return the first state for `estimate`; None for an estimator without state.

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
            state: the `state` of the previous estimate. None begins with `init`.
        Returns:
            The loss, the gradient, the slopes and the next state.
        Raises:
            BadInput: the loss is not a differentiable scalar.
            Unsupported: the estimator cannot be used here; see `objection`.
        """

    @abstractmethod
    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        """Estimate the gradient and pass it on parameter by parameter, so that it never exists as a whole.

        Args:
            objective: the model and the loss.
            batch: any pytree; passed to the loss as it is.
            key: the only source of randomness.
            use: called as `use(name, gradient)` for each parameter once its gradient is complete. It may change
                that parameter.
            state: the `state` of the previous estimate. None begins with `init`.
        Returns:
            The estimate, with a gradient of type `Streamed`.
        Raises:
            BadInput: the loss is not a differentiable scalar.
            Unsupported: the estimator cannot be used here; see `objection`.
        """

    @abstractmethod
    def objection(self, objective: Objective, batch: Any) -> str | None:
        """Return why the estimator cannot be used here and what to use instead; None if it can be used.

        Args:
            objective: the model and the loss.
            batch: a batch like those to come.
        """
