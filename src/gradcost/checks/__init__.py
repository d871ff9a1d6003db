"""Check on a user's own model that an estimator computes what it claims, and how good its estimates are.

`check` compares once; a `Recorder` observes a whole training.
"""

from gradcost.checks.check import check
from gradcost.checks.recorder import Recorder
from gradcost.checks.report import CheckReport

__all__ = [
    "CheckReport",
    "Recorder",
    "check",
]
