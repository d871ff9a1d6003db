"""Check an estimator on the user's own model: is it correct, and how good are its estimates?

`check` compares it with backpropagation once. A `Recorder` compares them repeatedly during a training. `audit` runs
the laws on a gradient function of another package.
"""

from gradcost.checks.audit import audit
from gradcost.checks.check import check
from gradcost.checks.recorder import Alignment, Recorder, Recording
from gradcost.checks.reference import Reference
from gradcost.checks.report import CheckLine, CheckReport

__all__ = [
    "Alignment",
    "CheckLine",
    "CheckReport",
    "Recorder",
    "Recording",
    "Reference",
    "audit",
    "check",
]
