"""The tuning and scoring of Rike and Foerland (2022) as facts, which the rules of `gradcost.results.lint` assess.

Source: the saved output of the notebooks published with "A comparison of backpropagation and forward gradients for
deep learning" (EPFL, 2022). For 14 winners it shows which lay on the edge of a grid, were overruled, or were trained
with other settings than tuned. It does not separate these by gradient, so they are facts about both.
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
WINNERS = 14  # one per row of Table 1

FACTS: tuple[Fact, ...] = (
    TuningEffort("forward gradient", points=129),
    TuningEffort("backprop", points=61),
    TuningWinners(BOTH, searches=WINNERS, on_edge=8),
    OverriddenWinners(BOTH, searches=WINNERS, overruled=3),
    Setting(BOTH, "epochs", tuned="10 to 30", trained="50 to 100"),
    Setting(BOTH, "clip", tuned="none in three of the grids", trained="one"),
    # The notebook empties its list of batch losses inside the loop over test batches: 10,000 = 156 * 64 + 16.
    ScoreCoverage(BOTH, "test loss", targets=16, of=10_000),
    SeedCount(BOTH, seeds=1),
)
