"""Read the records of a study, and derive statistics, rankings, lint findings and the verdict.

Functions named like their module stay there: `results.lint.lint`, `results.rankings.rankings`,
`results.status.status`. Nothing here imports torch.
"""

from gradcost.results.records import Results, StudyRecord, TrialRecord, read
from gradcost.results.summary import summarise, verdict

__all__ = [
    "Results",
    "StudyRecord",
    "TrialRecord",
    "read",
    "summarise",
    "verdict",
]
