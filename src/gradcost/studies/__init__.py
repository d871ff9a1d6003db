"""Comparisons and studies: run each trial once in a process of its own, store its record, and resume.

`compare` tunes and ranks methods. `run_study` runs a generator of trials that `study` decorates.
"""

from gradcost.studies.compare import compare
from gradcost.studies.comparison import Comparison
from gradcost.studies.executors import Executor, Local, Ray
from gradcost.studies.run import run_study
from gradcost.studies.study import Study, study
from gradcost.studies.trial import Trial

__all__ = [
    "Comparison",
    "Executor",
    "Local",
    "Ray",
    "Study",
    "Trial",
    "compare",
    "run_study",
    "study",
]
