"""How Rike and Foerland (2022) tuned and scored, as facts that the rules of `gradcost.results.lint` judge.

Source: the output that stands in the notebooks published with "A comparison of backpropagation and forward gradients
for deep learning" (EPFL, 2022). They tell of both gradients together which of the 14 winners lay on an edge, were
overruled, or were tuned otherwise than trained.
"""

from __future__ import annotations

from gradcost.results.facts import Effort, Fact, Regime, Scored, Seeds, Settled, Winners

BOTH = "both gradients"
WINNERS = 14  # one a row of Table 1

FACTS: tuple[Fact, ...] = (
    Effort("forward gradient", points=129),
    Effort("backprop", points=61),
    Winners(BOTH, searches=WINNERS, on_edge=8),
    Settled(BOTH, searches=WINNERS, overruled=3),
    Regime(BOTH, "epochs", tuned="10 to 30", trained="50 to 100"),
    Regime(BOTH, "clip", tuned="none in three of the grids", trained="one"),
    # The list of batch losses is emptied within the loop over test batches: 10,000 = 156 * 64 + 16.
    Scored(BOTH, "test loss", seen=16, of=10_000),
    Seeds(BOTH, seeds=1),
)
