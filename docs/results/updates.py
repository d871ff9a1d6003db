"""How far do the methods of Panchal et al. move the weights, and what does that change on other data?

    python docs/results/updates.py docs/results/panchal2025 docs/results/updates.json

It repeats the final runs of the study of MiniLM on TREC: method, learning rate, steps and random key. So initial
weights, batches and noise are those of the final run. It compares the model before and after: the trained weights,
and the features of the first token for validation questions of TREC and for sentences of movie reviews, a data set
that no run sees. It takes about 20 minutes of one core.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcost import train
from gradcost.core.inner_model import inner_model
from gradcost.core.isolation import eval_mode
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.papers.claims import markdown_table
from gradcost.papers.intervals import format_interval
from gradcost.papers.panchal2025.methods import method
from gradcost.papers.panchal2025.study import Reproduction
from gradcost.results.records import read
from gradcost.results.tuning import final_runs
from gradcost.tasks.task import score
from gradcost.tasks.texts import Movies, Trec
from gradcost.training.optimizers import AdamW

TASK = Reproduction().task
HELD_OUT = {"TREC": Trec(), "movies": Movies(length=24)}
TEXTS = 256  # of each data set
COLUMNS = {
    "distance": "distance of the weights",
    "evenness": "evenness",
    "TREC": "features, TREC",
    "movies": "features, movies",
    "accuracy": "test accuracy, %",
}


def main(folder: str, file: str) -> None:
    """Repeat every final run, and write what each training changed."""
    torch.set_num_threads(1)
    results, changes = read(folder), []
    for name in dict.fromkeys(run.method for run in results.trials):
        for run in final_runs(results, name):
            key = Key(run.seed).fold("final")
            last = deque(train(TASK, method(name).estimator, AdamW(run.lr), key, run.steps), maxlen=1).pop()
            changed = change(TASK.objective(key.fold("init")), last.objective)
            changes.append({"method": name, "lr": run.lr, "steps": run.steps, "seed": run.seed, **changed})
            print(changes[-1], flush=True)
            record = {"task": repr(TASK), "texts": TEXTS, "torch": torch.__version__, "changes": changes}
            Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def change(before: Objective, after: Objective) -> dict[str, float]:
    """Return how far the weights and the features moved, and the accuracy on the test questions.

    - distance: |w - w0| / |w0|, over the trained weights, for the w0 of `before`;
    - evenness: (sum |u|)^2 / (d sum u^2) of the update u = w - w0. It is 1 if all weights move equally, 0.64 for
      normally distributed moves, and k/d if k weights move equally and the others do not;
    - the name of a data set: mean over texts of |h - h0| / |h0|, for the features h of the first token.
    """
    start, end = (torch.cat([leaf.parameter.detach().flatten() for leaf in each.leaves]) for each in (before, after))
    update = (end - start).double()
    found = {
        "distance": float(update.norm() / start.double().norm()),
        "evenness": float(update.abs().sum() ** 2 / (update.numel() * update.square().sum())),
    }
    for name, task in HELD_OUT.items():
        texts = task.splits().validation.x[:TEXTS]
        old, new = (features(each.model, texts) for each in (before, after))
        found[name] = float(((new - old).norm(dim=1) / old.norm(dim=1)).mean())
    return {**found, "accuracy": 100 * score(after.model, TASK.splits().test).accuracy}


def features(model: Any, texts: Tensor) -> Tensor:
    """Return the last hidden state of the first token of each text."""
    with eval_mode(model), torch.no_grad():
        encoder = inner_model(model.model).base_model
        mask = (texts != model.padding).long()
        return encoder(input_ids=texts, attention_mask=mask).last_hidden_state[:, 0]


def table(file: Path) -> str:
    """Return the changes, one row per method, with the median over seeds and Student's interval."""
    changes = json.loads(file.read_text("utf-8"))["changes"]
    rows = []
    for name in dict.fromkeys(each["method"] for each in changes):
        runs = [each for each in changes if each["method"] == name]
        rows.append(
            [name, f"{runs[0]['steps']:,}", *(format_interval([run[key] for run in runs]) for key in COLUMNS)]
        )
    return markdown_table(["method", "steps", *COLUMNS.values()], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
