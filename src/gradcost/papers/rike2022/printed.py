"""The test losses that the authors' notebooks print after every epoch, as data.

Each printed loss is the mean over the last batch of a shuffled pass over the test images: 16 of 10,000. Ten of them
have the error of a mean over 160 images.

Source: the saved output of MNIST.ipynb and CIFAR.ipynb, https://github.com/benjaminrike1/forward_gradient, commit
827a478 (15 June 2022). The losses are rounded to five significant digits.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean, stdev

REPOSITORY = "https://github.com/benjaminrike1/forward_gradient"
COMMIT = "827a478"
LAST = 10  # number of epochs, the last ones, whose printed losses are averaged


@dataclass(frozen=True)
class PrintedRun:
    """One training run in the saved output of the notebooks.

    Args:
        notebook: file name of the notebook.
        cell: number of the cell, from 0.
        losses: the printed test loss of every epoch.
    """

    notebook: str
    cell: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the last ten printed losses."""
        return fmean(self.losses[-LAST:])

    @property
    def error(self) -> float:
        """The standard error of `mean`, from the spread of the ten losses."""
        return stdev(self.losses[-LAST:]) / LAST**0.5


def _read() -> dict[str, PrintedRun]:
    lines = files("gradcost.papers.rike2022").joinpath("printed_losses.csv").read_text(encoding="utf-8").splitlines()
    return {
        line["run"]: PrintedRun(line["notebook"], int(line["cell"]), tuple(map(float, line["losses"].split())))
        for line in csv.DictReader(lines)
    }


PRINTED = _read()  # by the name of the row; and one run without a cap
UNCAPPED = "forward NN SGD, uncapped"
