"""What was found out about an estimator, line by line, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gradcost.core.errors import BadInput
from gradcost.core.units import number

Verdict = Literal["ok", "failed", "note"]
_WIDEST = 60  # a longer finding is a sentence, and moves no column


@dataclass(frozen=True)
class Line:
    """One thing that was looked at: what, what was found, what follows from it, and the numbers behind it.

    verdict: "note" is a figure, or a thing to know, that is neither right nor wrong.
    """

    what: str
    found: str
    verdict: Verdict
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What `diagnose` found: `print` it for the table, or read `lines` and their `numbers`."""

    estimator: Any
    subject: str
    lines: tuple[Line, ...]

    @property
    def failed(self) -> tuple[Line, ...]:
        """The lines that failed; none when all is well."""
        return tuple(line for line in self.lines if line.verdict == "failed")

    def line(self, what: str) -> Line:
        """The first line whose subject starts with `what`. Raises: ValueError when there is none."""
        for line in self.lines:
            if line.what.startswith(what):
                return line
        raise BadInput(f"nothing was found out about {what!r}, but about {[line.what for line in self.lines]}.")

    def record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        lines = [asdict(line) | {"numbers": dict(line.numbers)} for line in self.lines]
        return {"method": repr(self.estimator), "subject": self.subject, "ok": not self.failed, "lines": lines}

    def __str__(self) -> str:
        left = max(len(line.what) for line in self.lines)
        middle = max((len(line.found) for line in self.lines if len(line.found) <= _WIDEST), default=0)
        rows = [f"    {line.what:<{left}}   {line.found:<{middle}}   {line.verdict}" for line in self.lines]
        return "\n".join([f"{self.estimator!r}   {self.subject}", *rows])


def short(x: float) -> str:
    """A figure in few signs: 0.0031, 284,419, 1.3e-7."""
    if x != x or abs(x) == float("inf") or (x != 0 and not 1e-4 <= abs(x) < 1e12):
        mantissa, _, exponent = f"{x:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return number(x)
