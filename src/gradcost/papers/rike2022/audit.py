"""Facts about the tuning and scoring in Rike and Foerland (2022), for the rules of `gradcost.results.lint`.

Source: the notebooks published with the paper, with their saved output
(https://github.com/benjaminrike1/forward_gradient, commit 827a478). Cells count from 0. For each of 14 searches, the
output shows whether the best setting is on the edge of the grid, whether the authors replaced it, and whether
training used other settings than tuning.
"""

from __future__ import annotations

from gradcost.results.effort import TuningEffort
from gradcost.results.facts import (
    Fact,
    OverriddenWinners,
    ScoreCoverage,
    SeedCount,
    Setting,
    TuningWinners,
)
from gradcost.results.publication import Statement

FORWARD, BACKPROP, BOTH = "forward gradient", "backprop", "both gradients"
WINNERS = 14  # number of searches: one per row of Table 1, each with one winner

FACTS: tuple[Fact | Statement, ...] = (
    TuningEffort(FORWARD, points=129),
    TuningEffort(BACKPROP, points=61),
    TuningWinners(BOTH, searches=WINNERS, on_edge=8),
    OverriddenWinners(BOTH, searches=WINNERS, overruled=3),
    Setting(BOTH, "epochs", tuned="10 to 30", trained="50 to 100"),
    # MNIST cells 13 and 59 and CIFAR cell 13, then MNIST cells 22 and 64 and CIFAR cell 18.
    Setting(BOTH, "clip", tuned="none in three of the grids", trained="one"),
    # MNIST cells 43 and 87, then 49 and 92.
    Setting(FORWARD, "decay of Adam", tuned="0", trained="5e-5 and 1e-4"),
    # The saved output of CIFAR cell 15 prints 0.000001; its source, and cell 20, have 1e-4.
    Setting(BACKPROP, "decay on CIFAR-10", tuned="1e-6", trained="1e-4"),
    # MNIST cells 49 and 92: ForwardAdam without `clip`, whose default is False.
    Statement(FORWARD, "cap on the slope", stated="1 in all rows", ran="none in 2 of 7 rows"),
    # MNIST cell 35: ForwardSGD without `decay`, whose default has been 1e-6 since e98bf1b and was 1e-4 before.
    Statement(FORWARD, "decay of NN Nesterov", stated="1e-5", ran="1e-6"),
    # MNIST cell 35 and CIFAR cell 20.
    Statement(BOTH, "test losses in the table", stated="0.270 and 1.685", ran="0.268 and 1.684"),
    # The notebook empties its list of batch losses inside the loop over test batches, so its test loss is that of
    # the last batch alone. This batch has 16 examples, because 10,000 = 156 * 64 + 16.
    ScoreCoverage(BOTH, "test loss", targets=16, of=10_000),
    # MNIST cells 43, 46, 87 and 90 empty the list in the same place. The other grids average all batches.
    ScoreCoverage(BOTH, "validation loss in the grids of Adam", targets=16, of=10_000),
    SeedCount(BOTH, seeds=1),
)
