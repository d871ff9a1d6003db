"""Parse bytes such as `64MiB`, a duration such as `10m`, and a range of learning rates such as `1e-4:10`."""

from __future__ import annotations

import re

from gradcost.cli.expressions import BYTES
from gradcost.core.errors import BadInput

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def size(text: str) -> int:
    """Parse a number of bytes: `64MiB` is 64 x 2^20, `64MB` is 64 x 10^6. `64mb` is `64MB`; `64Mb` is refused.

    Raises:
        BadInput: the text is not a number of bytes, or its unit usually means bits.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    known = {"B": 1} | BYTES
    units = {unit.lower(): factor for unit, factor in known.items()}
    if not match or match[2].lower() not in units:
        raise BadInput(f"{text!r} is not a number of bytes: write a number above 0 and one of {', '.join(known)}.")
    if re.fullmatch("[A-Z]i?b", match[2]):
        sizes = [f"{match[1]}{unit}" for unit in known if unit[0].upper() == match[2][0] and unit != "B"]
        raise BadInput(f"{text!r} may mean bits: write {' or '.join(sizes)} for bytes.")
    amount = float(match[1]) * units[match[2].lower()]
    if not 1 <= amount < 2**63:
        raise BadInput(f"{text!r} is not a number of bytes: it must be above 0, and below 2^63 bytes.")
    return int(amount)


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
