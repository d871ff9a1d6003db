"""Records of a study read from its folder, and what follows from them: statistics, rankings, lint and summary.

Nothing here imports torch.
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
