"""A training loop for every estimator, torch's optimizers, and training checkpoints.

Each parameter moves as soon as its gradient is complete. A resumed training run has the same bits as an
uninterrupted one.
"""

from gradcost.training.distributed import (
    BatchParallel,
    DirectionParallel,
    part_of,
    require_equal_weights,
    share_log,
)
from gradcost.training.eight_bit import AdamW8bit
from gradcost.training.loop import StepResult, Trainable, train
from gradcost.training.optimizers import SGD, Adam, AdamW, Nesterov, Optimizer
from gradcost.training.recorded import recorded
from gradcost.training.replay import replay
from gradcost.training.rounding import Master, StochasticallyRounded
from gradcost.training.seeded_sgd import SeededSGD
from gradcost.training.step_log import StepLog, read_log
from gradcost.training.train_state import TrainState

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "BatchParallel",
    "DirectionParallel",
    "Master",
    "Nesterov",
    "Optimizer",
    "SeededSGD",
    "StepLog",
    "StepResult",
    "StochasticallyRounded",
    "TrainState",
    "Trainable",
    "part_of",
    "read_log",
    "recorded",
    "replay",
    "require_equal_weights",
    "share_log",
    "train",
]
