"""Parse a duration such as `10m`, and a range of learning rates such as `1e-4:10`."""

from __future__ import annotations

import re

from gradcost.core.errors import BadInput

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """Return the seconds of a duration: `90s`, `10m`, `1.5h` or `1h30m`.

    Raises:
        BadInput: the text is not such a duration, or it is 0.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    total = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text.strip() or not 0 < total < 1e9:
        raise BadInput(f"{text!r} is not a duration above 0: write 90s, 10m or 1h30m.")
    return total


def lr_range(text: str) -> tuple[float, float]:
    """Parse LOW:HIGH into two numbers."""
    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        raise BadInput(f"{text!r} is not a range of learning rates: write LOW:HIGH, such as 1e-4:10.") from None
    return low, high
