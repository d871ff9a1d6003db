"""The status of recorded trials: that of their own monitor. Trials older than the rule of divergence are judged."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

from gradcost.core.divergence import DivergenceMonitor
from gradcost.results import ledger


def last_old_line(path: Path) -> float:
    """Return the number of the last line that an older version may have written; inf if no line has a checksum.

    The checksum of a line marks the version: the rule of divergence is older than checksums. So whatever wrote a
    checksum had the rule, and its monitor saw the loss of each step. Lines without one come first in a file.

    Args:
        path: `records.jsonl`.
    """
    if not path.is_file():
        return inf
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and ledger.parse(line, has_checksum=True) is not None:
                return number - 1
    return inf


def judged(record: dict[str, Any]) -> dict[str, Any]:
    """Return an old trial's record; if it finished although its loss diverged, a copy with status "diverged".

    A version with the rule of divergence (`DivergenceMonitor`) stops a trial where it diverges: its monitor has seen
    the loss of each step. An older version stopped only at a loss that was not finite. Here the rule is applied to
    the recorded curve. This is an approximation: the points of a curve are means over several steps. None is a mean
    that is not finite.

    Args:
        record: JSON of kind "trial", up to the `last_old_line` of its file.
    Returns:
        The record itself, or a copy with status "diverged", cut at the step of divergence.
    """
    curve = record.get("curve") or {}
    if record.get("status") != "finished" or not curve.get("loss"):
        return record
    monitor, last = DivergenceMonitor(), 0
    for last, loss in zip(curve["step"], curve["loss"], strict=False):
        monitor.add(last, nan if loss is None else loss)
        if monitor.diverged is not None:
            break
    else:
        return record
    stopped = {"status": "diverged", "steps": last, "reason": monitor.reason, "curve": _until(curve, last)}
    return {**record, **stopped}


def _until(curve: dict[str, Any], last: int) -> dict[str, Any]:
    """The points of a curve up to the step `last`. "validation_step" has the steps of the validation values."""
    training = sum(step <= last for step in curve["step"])
    validation = sum(step <= last for step in curve.get("validation_step", ()))
    return {
        name: values[: validation if name.startswith("validation") else training] for name, values in curve.items()
    }
