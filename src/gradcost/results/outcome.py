"""Apply the present rule of divergence (`DivergenceMonitor`) to recorded trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradcost.core.divergence import DivergenceMonitor


def judged(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a trial's record; if its loss diverges by the present rule, a copy with status "diverged".

    Trials of this version stop where they diverge. Older versions stopped a trial only at a loss that was not finite.
    If the recorded loss curve of a finished trial diverges, the record is returned as if the trial had stopped there.

    Args:
        record: JSON of kind "trial".
    Returns:
        The record itself, or a copy with status "diverged", cut at the step of divergence.
    """
    curve = record.get("curve") or {}
    if record.get("status") != "finished" or not curve.get("loss"):
        return record
    monitor, last = DivergenceMonitor(), 0
    for last, loss in zip(curve["step"], curve["loss"], strict=False):
        if loss is not None:
            monitor.add(last, loss)
        if monitor.diverged is not None:
            break
    else:
        return record
    stopped = {"status": "diverged", "steps": last, "reason": monitor.reason, "curve": _until(curve, last)}
    return {**record, **stopped}


def _until(curve: Mapping[str, Any], last: int) -> dict[str, Any]:
    """The points of a curve up to the step `last`. "validation_step" has the steps of the validation values."""
    training = sum(step <= last for step in curve["step"])
    validation = sum(step <= last for step in curve.get("validation_step", ()))
    return {
        name: values[: validation if name.startswith("validation") else training] for name, values in curve.items()
    }
