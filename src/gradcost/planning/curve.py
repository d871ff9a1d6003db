"""Peak memory against forward passes, for two families of checkpointing schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradcost.checkpointing.policies import Schedule, Segments
from gradcost.core.blocks import find_blocks
from gradcost.core.errors import GradcostError
from gradcost.core.objective import Objective
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.reverse import Reverse
from gradcost.planning.candidates import label
from gradcost.planning.forecast import Forecast, device_type
from gradcost.planning.forecasts import Forecasts
from gradcost.training.optimizers import Optimizer


def curve(
    objective: Objective,
    batch: Any,
    optimizer: Optimizer | None = None,
    device: str | torch.device | None = None,
    points: int = 12,
    on_progress: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:
    """Return points of the curves "Segments(k)" and "best schedules": peak memory against forwards.

    Args:
        objective: the model and the loss.
        batch: a typical training batch.
        optimizer: the optimizer; None leaves the update out of the step.
        device: where the step would run; None for the device of the model.
        points: maximum number of points per curve; they are evenly spaced.
        on_progress: called before each simulation, with its description.
    Returns:
        One dictionary per point: "curve", "method", "peak" in bytes, "forwards". Empty if the model has no blocks.
    """
    forecasts = Forecasts(objective, batch, optimizer, device_type(objective, device))
    counts = evenly_spaced(range(1, len(find_blocks(objective.model)) + 1), points)
    series: list[tuple[str, Sequence[Estimator]]] = [("Segments(k)", [Reverse(Segments(k)) for k in counts])]
    try:
        schedules = evenly_spaced(forecasts.tradeoff()[0].points, points)
        series.append(("best schedules", [Reverse(Schedule(point.items)) for point in schedules]))
    except GradcostError:
        pass  # the blocks have no schedule: only Segments(k) remains
    rows = []
    for name, estimators in series:
        for estimator in estimators:
            on_progress(f"the curve of {name}")
            step = forecasts.of(estimator)
            if isinstance(step, Forecast):
                row = {"curve": name, "method": label(estimator), "peak": step.peak, "forwards": step.forwards}
                rows.append(row)
    return rows


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items: the first, the last, and evenly spaced ones between them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
