"""Read the records of a study, and derive statistics, rankings, lint findings and the verdict.

Three functions are not exported here, because their modules have the same names: `results.lint.lint`,
`results.rankings.rankings` and `results.status.status`. This package does not import torch.
"""

from gradcost.results.records import Results, StudyRecord, TrialRecord, read
from gradcost.results.summary import summarise
from gradcost.results.verdict import verdict

__all__ = [
    "Results",
    "StudyRecord",
    "TrialRecord",
    "read",
    "summarise",
    "verdict",
]
