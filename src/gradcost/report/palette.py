"""One colour and one shape a method, the same in every figure and in the legend.

The colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; black is
grey here because the page has a dark side, and yellow, weak on white, is darkened and comes last. A study
of more than eight methods meets each colour again with another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#C9B400")
SHAPES = (
    "M.95,0A.95,.95,0,1,1,-.95,0A.95,.95,0,1,1,.95,0Z",  # circle
    "M-.85,-.85H.85V.85H-.85Z",  # square
    "M0,-1L1,.8H-1Z",  # triangle
    "M0,-1.15L1.15,0L0,1.15L-1.15,0Z",  # diamond
    "M0,1L1,-.8H-1Z",  # triangle on its tip
    "M-.36,-1H.36V-.36H1V.36H.36V1H-.36V.36H-1V-.36H-.36Z",  # plus
    "M-.55,-.95H.55L1.1,0L.55,.95H-.55L-1.1,0Z",  # hexagon
    "M-.95,-.9H.95L-.95,.9H.95Z",  # hourglass
)
CROSS = "M-.8,-.8L.8,.8M-.8,.8L.8,-.8"


@dataclass(frozen=True)
class Mark:
    """How one method is drawn: a colour, and a path in the square from -1 to 1."""

    colour: str
    shape: str


def marks(methods: Sequence[str]) -> dict[str, Mark]:
    """The mark of each method, by its place in the study."""
    n, m = len(COLOURS), len(SHAPES)
    return {name: Mark(COLOURS[i % n], SHAPES[(i + i // n) % m]) for i, name in enumerate(methods)}
