"""Run comparisons and studies: each trial runs once, in a separate process, and its record is stored.

`compare` tunes and ranks methods. `run_study` runs a `Study`, which the decorator `study` makes from a generator
function of trials. Both resume if they are called again.
"""

from gradcost.studies.compare import compare
from gradcost.studies.comparison import Comparison
from gradcost.studies.executors import Executor, Local, Ray
from gradcost.studies.run import run_study
from gradcost.studies.study import Study, study
from gradcost.studies.trial import Trial
from gradcost.training.customary import Customary

__all__ = [
    "Comparison",
    "Customary",
    "Executor",
    "Local",
    "Ray",
    "Study",
    "Trial",
    "compare",
    "run_study",
    "study",
]
