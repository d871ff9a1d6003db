"""How an amount is written, alike for people at a terminal, in a report and in a sentence of the library."""

from __future__ import annotations

from math import floor, log10

DASH = "–"  # what a cell says that has nothing to say


def size(n: float | None) -> str:
    """Bytes in binary units, three digits at most: 812 B, 9.5 KiB, 31.2 KiB, 318 KiB."""
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
    """`digits` significant digits, whole numbers in full, no exponent and no zeros at the end."""
    if x is None:
        return DASH
    if x == 0:
        return "0"
    places = max(digits - 1 - floor(log10(abs(x))), 0)
    text = f"{x:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(n: int, what: str) -> str:
    """1 seed, 2 seeds, 1,200 steps."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"
