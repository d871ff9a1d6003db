"""Facts about the tuning and scoring in Rike and Foerland (2022), for the rules of `gradcost.results.lint`.

Source: the saved output of the notebooks published with "A comparison of backpropagation and forward gradients for
deep learning" (EPFL, 2022). For each of 14 searches, the output shows whether the best setting is on the edge of the
grid, whether the authors replaced it, and whether training used other settings than tuning. The output does not
separate the two gradients, so most facts are about both together.
"""

from __future__ import annotations

from gradcost.results.facts import (
    Fact,
    OverriddenWinners,
    ScoreCoverage,
    SeedCount,
    Setting,
    TuningEffort,
    TuningWinners,
)

BOTH = "both gradients"
WINNERS = 14  # number of searches: one per row of Table 1, each with one winner

FACTS: tuple[Fact, ...] = (
    TuningEffort("forward gradient", points=129),
    TuningEffort("backprop", points=61),
    TuningWinners(BOTH, searches=WINNERS, on_edge=8),
    OverriddenWinners(BOTH, searches=WINNERS, overruled=3),
    Setting(BOTH, "epochs", tuned="10 to 30", trained="50 to 100"),
    Setting(BOTH, "clip", tuned="none in three of the grids", trained="one"),
    # The notebook empties its list of batch losses inside the loop over test batches, so its test loss is that of
    # the last batch alone. This batch has 16 examples, because 10,000 = 156 * 64 + 16.
    ScoreCoverage(BOTH, "test loss", targets=16, of=10_000),
    SeedCount(BOTH, seeds=1),
)
