"""What every caption says: how many runs, how they were made, and what an interval is."""

from __future__ import annotations

from gradcost.report.palette import marks
from gradcost.report.theme import Look
from gradcost.results.records import Results
from gradcost.results.summary import summarise
from gradcost.results.wording import count, listed


def look_of(results: Results) -> Look:
    """How the methods of a study are drawn."""
    methods = [row.method for row in summarise(results)]
    return Look(methods, marks(list(dict.fromkeys([*results.study.methods, *methods]))))


def protocol(results: Results) -> str:
    """5 seeds, 200 steps of batch 64, SGD at each method's tuned learning rate."""
    study = results.study
    used = {run.optimizer.partition("(")[0] for run in results.trials if run.phase == "final"}
    tuned = any(run.phase == "tune" for run in results.trials)
    rate = "each method's tuned learning rate" if tuned else "the learning rates that the study gives"
    batch = "" if study.batch is None else f" of batch {study.batch}"
    runs = f"{count(len(study.seeds), 'seed')}, {count(study.steps, 'step')}{batch}"
    return f"{runs}, {listed(sorted(used)) or study.optimizer} at {rate}."


def intervals(results: Results) -> str:
    """What whiskers and brackets are, and at what confidence."""
    kinds = sorted({(row.accuracy.n, row.accuracy.confidence) for row in summarise(results) if row.accuracy})
    told = listed([f"{100 * sure:.4g}% over {count(n, 'seed')}" for n, sure in kinds if n > 1])
    return "the distribution-free interval of the median" + (f" (confidence {told})" if told else "")
