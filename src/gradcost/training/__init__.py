"""A training loop for every estimator, torch's optimizers, and training checkpoints.

Each parameter moves as soon as its gradient is complete. A resumed training run has the same bits as an
uninterrupted one.
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
