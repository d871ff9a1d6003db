"""Does MiniLM learn TREC by backprop? All weights, scored on the test questions of the task.

    python docs/results/trec_backprop.py docs/results/trec-backprop.json

Three seeds of 500 steps with AdamW, at a learning rate that was not tuned. It takes about 15 minutes of one core.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch

from gradcost import backprop, train
from gradcost.core.key import Key
from gradcost.tasks.task import score
from gradcost.tasks.texts import Trec
from gradcost.training.optimizers import AdamW

TASK, STEPS, SEEDS = Trec(), 500, (1, 2, 3)
OPTIMIZER = AdamW(3e-4, decay=math.log(10) / STEPS)


def main(file: str) -> None:
    """Train, score on the test split, and write the numbers."""
    torch.set_num_threads(1)
    start, runs = time.process_time(), []
    for seed in SEEDS:
        last = None
        for last in train(TASK, backprop(), OPTIMIZER, Key(seed), STEPS):
            if last.number % 50 == 0:
                print(seed, last.number, float(last.loss), flush=True)
        assert last is not None
        tested = score(last.objective.model, TASK.splits().test)
        runs.append({"seed": seed, "loss": tested.loss, "accuracy": tested.accuracy})
        print(runs[-1], flush=True)
    record = {
        "task": repr(TASK),
        "optimizer": repr(OPTIMIZER),
        "steps": STEPS,
        "test questions": len(TASK.splits().test.y),
        "test": runs,
        "core-seconds": round(time.process_time() - start),
        "torch": torch.__version__,
    }
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
