"""Facts and a rule about publications whose text and code differ. A results folder has no such facts."""

from __future__ import annotations

from collections.abc import Sequence

from gradcost.core.value import value
from gradcost.results.comparability import Violations


@value
class Statement:
    """One setting, as a publication states it and as its published code ran it.

    Args:
        method: the method that ran.
        what: name of the setting.
        stated: its value in the publication.
        ran: its value in the code or in the saved output.
    """

    method: str
    what: str
    stated: str
    ran: str


def contradicted_statements(facts: Sequence[Statement]) -> Violations:
    for fact in facts:
        if fact.stated != fact.ran:
            yield fact.method, f"{fact.what}: the publication states {fact.stated}, but its code ran {fact.ran}"
