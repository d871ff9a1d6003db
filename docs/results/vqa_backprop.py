"""Does the vision-language model learn? Backprop on questions about CIFAR-10, scored on images of the test file.

    python docs/results/vqa_backprop.py docs/results/vqa-backprop.json

It trains the projector and LoRA adapters of SmolLM2-135M behind a frozen EfficientNet-Lite0, one seed, at a learning
rate that was not tuned, and writes the score of generated answers. It takes about six minutes of one core.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from gradcost import backprop, train
from gradcost.core.key import Key
from gradcost.tasks.vision_language import VisionLanguage
from gradcost.tasks.vqa import Vqa
from gradcost.training.optimizers import AdamW

TASK = Vqa(VisionLanguage(size=64), batch=16, length=12, examples=2000, held_out=100)
OPTIMIZER, STEPS, GUESSING = AdamW(2e-3), 90, 0.35


def main(file: str) -> None:
    """Train, score on the test split, and write the numbers."""
    torch.set_num_threads(1)
    start, losses, last = time.process_time(), [], None
    for last in train(TASK, backprop(), OPTIMIZER, Key(1), STEPS):
        losses.append(round(float(last.loss), 4))
        if last.number % 10 == 0:
            print(last.number, losses[-1], flush=True)
    assert last is not None
    score = TASK.score(last.objective.model, TASK.splits().test)
    record = {
        "task": repr(TASK),
        "optimizer": repr(OPTIMIZER),
        "steps": STEPS,
        "seed": 1,
        "test": {**score._asdict(), "questions": TASK.held_out},
        "guessing": GUESSING,
        "losses": losses,
        "core-seconds": round(time.process_time() - start),
        "torch": torch.__version__,
    }
    Path(file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(score)


if __name__ == "__main__":
    main(sys.argv[1])
