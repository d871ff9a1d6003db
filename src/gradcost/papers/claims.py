"""Claims of a paper, the rules of their verdicts, and the page that lists them, in one format for all papers.

A claim has a published number, or a range. It may have a reference: the value that means no effect, such as a ratio
of 1. The verdict depends on the published number with its error and on one measured value per seed, by RULES.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf, isfinite

from gradcost.core.errors import BadInput
from gradcost.core.units import number
from gradcost.core.value import value
from gradcost.papers.intervals import STUDENT, Measured, format_interval, log_or_inf, measured_interval
from gradcost.results.records import Results

LEAST_SEEDS = 3
STANDARD_ERRORS = 1.96  # half the width of a 95% interval of a normal variable
RULES = (
    "Published interval: the published number or range, extended by 1.96 standard errors if they are known, "
    "otherwise by half a unit in the last printed digit.",
    f"Our interval, from {max(STUDENT) + 1} seeds on: the 95% interval of the median, from order statistics. With 2 "
    f"to {max(STUDENT)} seeds: Student's 95% interval, extended to all values, without those that the quantity "
    "cannot have. A ratio is computed on a logarithmic scale. With an infinite value: all values, 75% for 3 seeds.",
    "A value of which only bounds are known, since a run did not reach a target, is a range: the interval covers it.",
    "Reference: the value that means no effect, such as a ratio of 1. Published effect: the distance from it, or "
    "from 0 if there is none, to the farther end of the published range.",
    f"Fewer than {LEAST_SEEDS} seeds: **inconclusive**.",
    "The two intervals do not overlap: **holds in direction only** if all of ours is on the published side of the "
    "reference, else **does not hold**.",
    "They overlap, and all of ours is on the other side of the reference: **inconclusive** if the published interval "
    "contains the reference, else **does not hold**.",
    "They overlap, and ours contains the reference or is wider than the published effect: **inconclusive**.",
    "They overlap, and all of ours is on the published side of the reference: **holds in direction only** if the "
    "published interval contains the reference, else **holds**.",
    "*reduced scale*: fewer steps, a smaller model, a smaller batch or other data than in the paper.",
)


class Verdict(Enum):
    """Whether a claim holds in our runs, by RULES."""

    HOLDS = "holds"
    DIRECTION = "holds in direction only"
    FAILS = "does not hold"
    INCONCLUSIVE = "inconclusive"


@value
class Published:
    """A published number, or a range if `high` is given. For a claim of direction alone, one end is infinite.

    Args:
        low: the number, or the low end of the range.
        high: the high end of the range. None: equal to `low`.
        error: standard error of the number, such as that of a mean over 16 images. None: not known.
        rounding: half a unit in the last printed digit.
    Raises:
        BadInput: high < low, or error or rounding is negative.
    """

    low: float
    high: float | None = None
    error: float | None = None
    rounding: float = 0.0

    def __post_init__(self) -> None:
        if self.high is not None and self.high < self.low:
            raise BadInput(f"a published range has low <= high, not {self}: swap them.")
        if self.rounding < 0 or (self.error or 0.0) < 0:
            raise BadInput(f"error and rounding of a published number are 0 or more, not {self}.")

    @property
    def ends(self) -> tuple[float, float]:
        """The number twice, or the two ends of the range."""
        return self.low, self.low if self.high is None else self.high

    @property
    def interval(self) -> tuple[float, float]:
        """The ends, extended by 1.96 standard errors; by the rounding if this is more or the error is not known."""
        margin = max(STANDARD_ERRORS * (self.error or 0.0), self.rounding)
        low, high = self.ends
        return low - margin, high + margin

    def __str__(self) -> str:
        low, high = self.ends
        if not isfinite(low) or not isfinite(high):
            text = f"below {number(high)}" if isfinite(high) else f"above {number(low)}"
        else:
            text = number(low) if low == high else f"{number(low)} to {number(high)}"
        return text if self.error is None else f"{text} (standard error {number(self.error)})"


@value
class Claim:
    """A claim of a paper.

    Args:
        name: a short name, unique on its page.
        words: the claim in our words, one sentence.
        location: where it stands, such as "Table 1, row 1".
        quantity: what is measured, with its unit, such as "ratio of test losses, forward gradient to backprop".
        published: the published number.
        reference: the value of the quantity that means no effect. None: the claim has no direction.
        is_ratio: whether the quantity is a ratio of two positive numbers. Then the intervals of a/b and b/a say the
            same, and neither has a negative end.
        bounds: the least and the largest value that the quantity can have.
    Raises:
        BadInput: the reference is strictly inside the published range.
    """

    name: str
    words: str
    location: str
    quantity: str
    published: Published
    reference: float | None = None
    is_ratio: bool = False
    bounds: tuple[float, float] = (-inf, inf)

    def __post_init__(self) -> None:
        low, high = self.published.ends
        if self.reference is not None and (low < self.reference < high or low == high == self.reference):
            raise BadInput(
                f"the reference of the claim {self.name!r} must be on one side of {self.published}, not "
                f"{self.reference:g}: a claim of no effect has no direction, so its reference is None."
            )


@dataclass(frozen=True)
class Evidence:
    """What our runs show about a claim.

    Args:
        values: one measured value of the claim's quantity per seed, or its bounds; inf or -inf for a run that
            diverged. Empty if the claim was not tested.
        command: the command that runs the experiment.
        records: the folder of the records, or a link to it.
        scale: the size of the experiment, such as "50 epochs, 3 seeds".
        is_reduced: whether the experiment is smaller than the published one.
        note: one or two further sentences; "" for none.
        missing: why there are no values, in a few words.
    """

    values: tuple[Measured, ...]
    command: str
    records: str
    scale: str
    is_reduced: bool = False
    note: str = ""
    missing: str = "not run"


@dataclass(frozen=True)
class Glance:
    """The first lines of a page.

    Args:
        scope: which experiments of the paper were run, and which were not.
        hardware: versions and the machine.
        hours: core-hours of all runs.
    """

    scope: str
    hardware: str
    hours: float

    @classmethod
    def of(cls, scope: str, results: Results) -> Glance:
        """Return the first lines of the page of a study. The number of threads is that of the training runs."""
        facts = {name: str(fact) for name, fact in results.environment.items() if name != "command"}
        threads = {(run.environment or {}).get("threads") for run in results.trials} - {None}
        if threads:
            facts["threads"] = " or ".join(sorted(map(str, threads)))
        hours = sum(run.seconds or 0.0 for run in results.trials) / 3600
        return cls(scope, ", ".join(f"{name} {fact}" for name, fact in facts.items()) or "not recorded", hours)


def verdict(claim: Claim, values: Sequence[Measured]) -> Verdict:
    """Return the verdict on a claim, by RULES.

    Args:
        claim: the claim.
        values: one measured value per seed, or its bounds.
    """
    if len(values) < LEAST_SEEDS:
        return Verdict.INCONCLUSIVE
    found = measured_interval(values, claim.is_ratio, claim.bounds)
    reference = 0.0 if claim.reference is None else claim.reference
    numbers = (found.low, found.high, *claim.published.interval, *claim.published.ends, reference)
    low, high, near, far, start, end, reference = map(log_or_inf, numbers) if claim.is_ratio else numbers
    if start < reference:  # mirror all numbers, so that the published side is above the reference
        (low, high), (near, far), end, reference = (-high, -low), (-far, -near), -start, -reference
    overlap = low <= far and near <= high
    is_wide = high - low > end - reference
    if claim.reference is None:
        return (Verdict.INCONCLUSIVE if is_wide and end else Verdict.HOLDS) if overlap else Verdict.FAILS
    if not overlap:
        return Verdict.DIRECTION if low > reference else Verdict.FAILS
    if high <= reference:
        return Verdict.INCONCLUSIVE if near < reference else Verdict.FAILS
    if low <= reference or is_wide:
        return Verdict.INCONCLUSIVE
    return Verdict.DIRECTION if near < reference else Verdict.HOLDS


def outcome(claim: Claim, evidence: Evidence) -> str:
    """Return the verdict in words, with the mark for a reduced scale: `holds`, `does not hold (reduced scale)`."""
    if not evidence.values:
        return f"{Verdict.INCONCLUSIVE.value} ({evidence.missing})"
    words = verdict(claim, evidence.values).value
    return f"{words} (reduced scale)" if evidence.is_reduced else words


def measured(claim: Claim, evidence: Evidence) -> str:
    """Return the measured value of the claim's quantity with its interval in words, or why there is none."""
    return format_interval(evidence.values, evidence.missing, claim.is_ratio, claim.bounds)


def claims_page(
    title: str, glance: Glance, claims: Sequence[tuple[Claim, Evidence]], sections: Sequence[str] = ()
) -> str:
    """Return the page on a paper as Markdown.

    Args:
        title: the heading of the page.
        glance: scope, hardware and hours.
        claims: each claim with its evidence, in the order of the page.
        sections: further parts in Markdown, such as tables and figures; they follow the claims.
    Returns:
        The table "At a glance", then one section per claim, the further sections, and the rules of the verdicts.
    Raises:
        BadInput: two claims have one name.
    """
    names = [claim.name for claim, _ in claims]
    if len(set(names)) < len(names):
        raise BadInput(f"the claims of a page need different names, not {', '.join(names)}.")
    parts = [f"# {title}", _glance_section(glance, claims), "## Claim by claim"]
    parts += [_claim_section(claim, evidence) for claim, evidence in claims]
    parts += [*sections, "## Rules of the verdicts\n\n" + "\n".join(f"- {rule}" for rule in RULES)]
    return "\n\n".join(parts) + "\n"


def _glance_section(glance: Glance, claims: Sequence[tuple[Claim, Evidence]]) -> str:
    rows = [("scope", glance.scope), ("hardware", glance.hardware), ("core-hours", number(glance.hours, 2))]
    rows += [(f"*{claim.name}*", f"**{outcome(claim, evidence)}**") for claim, evidence in claims]
    return "## At a glance\n\n" + markdown_table(("", ""), rows)


def _claim_section(claim: Claim, evidence: Evidence) -> str:
    return f"### {claim.name}\n\n{claim.words}\n\n" + markdown_table(("", ""), list(_claim_rows(claim, evidence)))


def _claim_rows(claim: Claim, evidence: Evidence) -> Iterator[tuple[str, str]]:
    yield "in the paper", claim.location
    yield "quantity", claim.quantity
    yield "published", str(claim.published)
    if claim.reference is not None:
        yield "no effect", number(claim.reference)
    yield "measured here", measured(claim, evidence)
    yield "scale", f"{evidence.scale} (reduced)" if evidence.is_reduced else evidence.scale
    yield "command", f"`{evidence.command}`"
    yield "records", evidence.records
    if evidence.note:
        yield "note", evidence.note
    yield "verdict", f"**{outcome(claim, evidence)}**"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        headers: the cells of the first line.
        rows: the cells of the other lines. A `|` in a cell is escaped.
    """
    lines = [list(headers), ["---"] * len(headers), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
