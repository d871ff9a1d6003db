"""A training loop that uses each gradient parameter by parameter, torch's optimizers, and training checkpoints.

A resumed training gives the same bits as one that never stopped.
"""

from gradcost.training.loop import StepResult, Trainable, train
from gradcost.training.optimizers import SGD, Adam, AdamW, Nesterov, Optimizer
from gradcost.training.rounding import Master, StochasticallyRounded
from gradcost.training.train_state import TrainState

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Master",
    "Nesterov",
    "Optimizer",
    "StepResult",
    "StochasticallyRounded",
    "TrainState",
    "Trainable",
    "train",
]
