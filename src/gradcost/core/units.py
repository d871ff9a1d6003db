"""Format amounts for the terminal, reports and messages."""

from __future__ import annotations

from math import floor, isfinite, isnan, log10

DASH = "–"  # a missing value


def size(n: float | None) -> str:
    """Format bytes in binary units with at most three digits: 812 B, 9.5 KiB, 31.2 KiB, 318 KiB; None as a dash."""
    if n is None:
        return DASH
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        n /= 1024
        if n < 999.5 or unit == "TiB":
            break
    return f"{number(n)} {unit}"


def number(x: float | None, digits: int = 3) -> str:
    """Format to `digits` significant digits: integers in full, no exponent, no trailing zeros.

    None gives a dash, an infinite number "infinite" or "-infinite".
    """
    if x is None or isnan(x):
        return DASH
    if not isfinite(x):
        return "infinite" if x > 0 else "-infinite"
    if x == 0:
        return "0"
    places = max(digits - 1 - floor(log10(abs(x))), 0)
    text = f"{x:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(n: int, what: str) -> str:
    """Format a count with its noun: 1 seed, 2 seeds, 1,200 steps."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
