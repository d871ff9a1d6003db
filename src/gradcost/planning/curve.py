"""What memory costs, along curves: checkpointing is never one point."""

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
    """What memory costs in forwards along two curves of checkpointing: `Segments(k)`, and the best schedules.

    Each point is followed on fakes: {"curve", "method", "peak" in bytes, "forwards"}; at most `points` of each
    curve, evenly spread. Nothing where the model has no chain of blocks.
    """
    forecasts = Forecasts(objective, batch, optimizer, device_type(objective, device))
    counts = _spread(range(1, len(find_blocks(objective.model)) + 1), points)
    series: list[tuple[str, Sequence[Estimator]]] = [("Segments(k)", [Reverse(Segments(k)) for k in counts])]
    try:
        best = _spread(forecasts.tradeoff()[0].points, points)
        series.append(("best schedules", [Reverse(Schedule(point.items)) for point in best]))
    except GradcostError:
        pass
    found = []
    for name, estimators in series:
        for estimator in estimators:
            on_progress(f"the curve of {name}")
            step = forecasts.of(estimator)
            if isinstance(step, Forecast):
                made = {"curve": name, "method": label(estimator), "peak": step.peak, "forwards": step.forwards}
                found.append(made)
    return found


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """The first, the last and evenly chosen ones between them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
