"""The smallest changes of a training setup under which an exact gradient fits a memory budget."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gradcost.checkpointing.policies import Segments
from gradcost.core.batching.mixed_examples import mixing_layer
from gradcost.core.errors import GradcostError
from gradcost.core.objective import Leaf, Objective
from gradcost.core.pytree import tensors
from gradcost.core.units import size
from gradcost.estimators.accumulated import Accumulated
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.estimators.structure import find, micro_batches
from gradcost.planning.candidates import described, label, options, splits_mixed
from gradcost.planning.forecast import Forecast, device_type
from gradcost.planning.forecasts import Forecasts, offloads
from gradcost.planning.within import Within
from gradcost.training.optimizers import Optimizer

_SAMPLE = 4096  # weights; bitsandbytes stores the state of smaller leaves in 32 bits


@dataclass(frozen=True, eq=False)
class Setup:
    """What is trained: an objective, a typical batch, and the optimizer (None: the update is left out)."""

    objective: Objective
    batch: Any
    optimizer: Optimizer | None


@dataclass(frozen=True, eq=False)
class Change:
    """A changed setup, and the exact gradient with the fewest FLOPs that fits.

    Args:
        options: the changed options of `gradcost plan`, with their values.
        estimator: the estimator of the gradient.
        forecast: its cost.
    """

    options: Mapping[str, str]
    estimator: Estimator
    forecast: Forecast

    def cells(self) -> list[str]:
        """Return the cells of a table: the options as they are typed, the method, its peak and its forwards."""
        typed = shlex.join(word for name, value in self.options.items() for word in (f"--{name}", value))
        return [typed, described(self.estimator), size(self.forecast.peak), f"{self.forecast.forwards:.2f}"]

    def record(self) -> dict[str, Any]:
        """Return the change as plain JSON data."""
        return {
            "options": dict(self.options),
            "method": described(self.estimator),
            "peak": self.forecast.peak,
            "forwards": self.forecast.forwards,
        }


Level = Iterable[tuple[Mapping[str, str], Callable[[], Setup]]]  # changes of about the same size, the smallest first


def smallest_changes(
    levels: Iterable[Level], budget: int, device: str | None = None, most: int = 3
) -> Iterator[Change]:
    """Yield the first change of each level under which an exact gradient fits, for at most `most` levels.

    A setup whose weights, batch and optimizer state exceed the budget is not simulated.

    Args:
        levels: the changes to try; each makes a setup.
        budget: bytes for the whole step.
        device: where the step would run; None for the device of the model.
        most: the number of changes after which the search ends.
    """
    for level in levels:
        if not most:
            return
        for changed, make in level:
            try:
                found = cheapest_exact(make(), budget, device)
            except GradcostError:  # this model cannot be changed so
                continue
            if found is not None:
                most -= 1
                yield Change(changed, *found)
                break


def cheapest_exact(setup: Setup, budget: int, device: str | None = None) -> tuple[Estimator, Forecast] | None:
    """Return the exact gradient that `plan` chooses by FLOPs; None if none fits the budget.

    The candidates are those of a plan without `Segments`, since `Within(budget)` needs no more FLOPs. Micro-batches
    do not need fewer FLOPs than the whole batch. If neither recomputed blocks nor their most micro-batches fit, it is
    computed whether any schedule fits with one example per micro-batch, because most setups end there.
    """
    if least_possible(setup) > budget:
        return None
    objective, batch, where = setup.objective, setup.batch, device_type(setup.objective, device)
    forecasts = Forecasts(objective, batch, setup.optimizer, where)
    examples = forecasts.examples or 1
    candidates = [
        each
        for each in options(objective, examples, budget, where, probes=())
        if not offloads(each) and not list(find(each, Segments))
    ]
    split = [each for each in candidates if micro_batches(each) > 1]

    def fits(each: Estimator) -> tuple[Estimator, Forecast] | None:
        found = forecasts.cost_within(budget) if each == Reverse(Within(budget)) else forecasts.of(each)
        return (each, found) if isinstance(found, Forecast) and found.peak <= budget else None

    recomputed = split[0].inner if split else None  # of the whole batch
    if not any(each is not None and fits(each) for each in (recomputed, *split[-1:])):
        least = forecasts.least(examples)
        if least is not None and least > budget:
            return None
    fitting = [found for each in candidates if each not in split and (found := fits(each))]
    fewest = min((found.flops for _, found in fitting), default=None)
    of_recomputed = None if recomputed is None else forecasts.of(recomputed)
    if fewest is None or not isinstance(of_recomputed, Forecast) or fewest > of_recomputed.flops:
        fitting += [found for each in split if (found := fits(each))]
    if not fitting and (parts := forecasts.fewest_parts(budget)) is not None:
        found = forecasts.cost_within(budget, parts)
        fitting = [(Accumulated(Reverse(Within(budget)), parts), found)] if isinstance(found, Forecast) else []
    mixing = mixing_layer(objective.model)

    def preference(pair: tuple[Estimator, Forecast]) -> tuple[float, ...]:
        return splits_mixed(pair[0], mixing), pair[1].flops, len(label(pair[0])), pair[1].peak

    return min(fitting, key=preference, default=None)


def least_possible(setup: Setup) -> int:
    """Return the bytes that every step needs: parameters, buffers, batch and the optimizer's state."""
    model = setup.objective.model
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    held = sum(storage.nbytes() for storage in storages.values()) + sum(leaf.nbytes for leaf in tensors(setup.batch))
    return held if setup.optimizer is None else held + _state_bytes(setup.optimizer, setup.objective)


def _state_bytes(optimizer: Optimizer, objective: Objective) -> int:
    """Return the bytes of the optimizer's state, in proportion to its state for `_SAMPLE` weights of each dtype."""
    elements: dict[torch.dtype, int] = {}
    for leaf in objective.leaves:
        elements[leaf.parameter.dtype] = elements.get(leaf.parameter.dtype, 0) + leaf.parameter.numel()
    total = 0
    for dtype, count in elements.items():
        weight = torch.nn.Parameter(torch.zeros(_SAMPLE, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        built = optimizer.build([Leaf("weight", weight, 0, _SAMPLE)])
        built.step()
        state = sum(held.nbytes for held in tensors(built.state_dict()) if held.numel() == _SAMPLE)
        total += state * count // _SAMPLE
    return total
