"""Format numbers for the terminal, Markdown and HTML."""

from __future__ import annotations

from math import floor, isfinite, log10

from gradcost.core.units import DASH as DASH
from gradcost.core.units import count as count
from gradcost.core.units import number as number
from gradcost.core.units import size as size


def alike(x: float, *others: float) -> list[str]:
    """Write numbers with equal decimals: the first nonzero one gets three digits; from 1e6 on as 1.2e+15."""
    first = next((abs(y) for y in (x, *others) if isfinite(y) and y), 1.0)
    if first >= 1e6:
        return [f"{y:.1e}" if isfinite(y) else "diverged" for y in (x, *others)]
    places = max(2 - floor(log10(first)), 0)
    return [f"{y:,.{places}f}" if isfinite(y) else "diverged" for y in (x, *others)]


def forwards(x: float | None) -> str:
    """Write a cost in forward passes: 3.0."""
    return DASH if x is None else f"{x:,.1f}"


def timing_mark(doubt: str | None) -> str:
    """Return the mark before numbers from an unreliable timing. doubt: why it is unreliable, or None."""
    return "~" if doubt else ""


def rate(lr: float | None) -> str:
    """Write a learning rate: 0.1, 0.0003, 3e-05."""
    return DASH if lr is None else f"{lr:.3g}"


def percent(x: float | None) -> str:
    """Write an accuracy with its unit: 97.1%, or "diverged"."""
    return DASH if x is None else f"{bare(x)}%" if isfinite(x) else bare(x)


def bare(x: float) -> str:
    """Write an accuracy in percent without the percent sign: 97.1, or "diverged"."""
    return f"{100 * x:.1f}" if isfinite(x) else "diverged"


def flops(x: float) -> str:
    """Write a number of floating-point operations: 1.08 GFLOP, 250 kFLOP."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= 0.9995 * factor:
            return f"{number(x / factor)} {unit}FLOP"
    return f"{number(x)} FLOP"


def chance(x: float) -> str:
    """Write a probability or a p-value with three digits: 0.0625, 1."""
    return number(x)


def points(x: float) -> str:
    """Write a difference of accuracies: 6.1 points, 1.0 point, less than 0.1 points."""
    if 0 < x < 0.0005:
        return "less than 0.1 points"
    text = f"{100 * x:.1f}"
    return f"{text} point" if text == "1.0" else f"{text} points"


def times(x: float) -> str:
    """Write a ratio with two digits: 12, 1.2; "no end" if it is infinite."""
    return number(x, 2) if isfinite(x) else "no end"


def duration(seconds: float | None) -> str:
    """Write seconds, minutes or hours with two or three digits: 0.38 s, 4.1 s, 2.5 min, 3.2 h."""
    if seconds is None:
        return DASH
    if seconds < 99.5:
        return f"{number(seconds, 2)} s"
    if seconds < 99.5 * 60:
        return f"{number(seconds / 60, 2)} min"
    return f"{number(seconds / 3600, 3)} h"


def listed(names: list[str]) -> str:
    """Join names: a; a and b; a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
