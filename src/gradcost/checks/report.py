"""The result of a check: one line per question, as numbers and as a printed table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gradcost.core.errors import BadInput
from gradcost.core.units import number

Verdict = Literal["ok", "failed", "note"]
_MAX_WIDTH = 60  # characters; a longer result does not widen its column


@dataclass(frozen=True)
class CheckLine:
    """One question of a check, with its result.

    Args:
        what: the question.
        found: the result, as text.
        verdict: "ok", "failed", or "note" for information without a judgement.
        numbers: the numbers behind the result, by name.
    """

    what: str
    found: str
    verdict: Verdict
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CheckReport:
    """The result of `check`. Print it for a table, or read `lines` and their `numbers`.

    Args:
        estimator: the estimator that was checked.
        subject: the model, the number of its trained weights, and the loss.
        lines: the results, in the order of the table.
    """

    estimator: Any
    subject: str
    lines: tuple[CheckLine, ...]

    @property
    def failed(self) -> tuple[CheckLine, ...]:
        """The lines that failed; empty if nothing did."""
        return tuple(line for line in self.lines if line.verdict == "failed")

    def line(self, what: str) -> CheckLine:
        """Return the first line whose question starts with `what`.

        Args:
            what: the first words of the question.
        Returns:
            The line.
        Raises:
            BadInput: no question starts with `what`; the message lists all questions.
        """
        for line in self.lines:
            if line.what.startswith(what):
                return line
        raise BadInput(
            f"no line of this check starts with {what!r}. Its lines: {[line.what for line in self.lines]}."
        )

    def record(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        lines = [asdict(line) | {"numbers": dict(line.numbers)} for line in self.lines]
        return {"method": repr(self.estimator), "subject": self.subject, "ok": not self.failed, "lines": lines}

    def __str__(self) -> str:
        what_width = max(len(line.what) for line in self.lines)
        found_width = max((len(line.found) for line in self.lines if len(line.found) <= _MAX_WIDTH), default=0)
        rows = [
            f"    {line.what:<{what_width}}   {line.found:<{found_width}}   {line.verdict}" for line in self.lines
        ]
        return "\n".join([f"{self.estimator!r}   {self.subject}", *rows])


def format_number(x: float) -> str:
    """Format a figure for people, in at most three digits below 1,000: 0.0031, 284,419, 1.3e-7."""
    if x != x or abs(x) == float("inf") or (x != 0 and not 1e-4 <= abs(x) < 1e12):
        mantissa, _, exponent = f"{x:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return number(x)
