"""Table 1 of Rike and Foerland (2022) as data, with what was published of how it came to be.

Source: Rike and Foerland, "A comparison of backpropagation and forward gradients for deep learning" (EPFL, 2022),
and the notebooks published with it, whose own output says how their test loss was computed.
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Rike and Førland (2022), A comparison of backpropagation and forward gradients for deep learning"
BATCH = 64
STEPS_PER_EPOCH = 50_000 // BATCH  # of MNIST, with the split that is chosen below
DIGITS = 3  # decimals that the table prints
TUNED = ", tuned"  # after a row's name: its runs with a rate that was tuned here


@dataclass(frozen=True)
class Row:
    """One row of Table 1, as printed.

    gradient: "forward" or "backprop". model: "nn" (dense 1024, 1024, 10) or "cnn". optimizer: "sgd", "nesterov" or
    "adam". decay: the rate of the exponential decay of the learning rate. loss: the published test loss, in nats.
    """

    gradient: str
    model: str
    dataset: str
    optimizer: str
    lr: float
    decay: float
    momentum: float
    beta1: float
    beta2: float
    epochs: int
    loss: float

    @property
    def name(self) -> str:
        """`forward NN SGD`: what the row's runs are called."""
        optimizer = {"sgd": "SGD", "nesterov": "Nesterov", "adam": "Adam"}[self.optimizer]
        return f"{self.gradient} {self.model.upper()} {optimizer}"


TABLE = (
    Row("forward", "nn", "mnist", "sgd", 0.000464, 1e-5, 0, 0, 0, 50, 0.332),
    Row("backprop", "nn", "mnist", "sgd", 0.1, 0, 0, 0, 0, 50, 0.000),
    Row("forward", "nn", "mnist", "nesterov", 0.00032, 1e-5, 0.367, 0, 0, 50, 0.270),
    Row("backprop", "nn", "mnist", "nesterov", 0.1, 0, 0.5, 0, 0, 50, 0.000),
    Row("forward", "nn", "mnist", "adam", 0.0005, 5e-5, 0, 0.99, 0.999, 50, 0.283),
    Row("backprop", "nn", "mnist", "adam", 0.0001, 0, 0, 0.9, 0.999, 50, 0.000),
    Row("forward", "cnn", "mnist", "sgd", 0.000398, 1e-5, 0, 0, 0, 50, 0.548),
    Row("backprop", "cnn", "mnist", "sgd", 0.1, 0, 0, 0, 0, 50, 0.000),
    Row("forward", "cnn", "mnist", "nesterov", 0.0001, 1e-4, 0.9, 0, 0, 50, 0.559),
    Row("backprop", "cnn", "mnist", "nesterov", 0.01, 0, 0.783, 0, 0, 50, 0.000),
    Row("forward", "cnn", "mnist", "adam", 0.00025, 1e-4, 0, 0.9, 0.9999, 50, 0.669),
    Row("backprop", "cnn", "mnist", "adam", 0.000236, 0, 0, 0.9, 0.999, 50, 0.000),
    Row("forward", "cnn", "cifar10", "sgd", 0.000433, 1e-6, 0, 0, 0, 100, 6.955),
    Row("backprop", "cnn", "cifar10", "sgd", 0.01, 1e-4, 0, 0, 0, 100, 1.685),
)


def rows(model: str, dataset: str = "mnist") -> tuple[Row, ...]:
    """The rows of one model on one data set, in the table's order."""
    return tuple(row for row in TABLE if (row.model, row.dataset) == (model, dataset))


def rival(row: Row) -> Row:
    """The row with the other gradient and the same model, data and optimizer: what `row` is held against."""
    (found,) = (
        other for other in rows(row.model, row.dataset) if other.optimizer == row.optimizer and other is not row
    )
    return found


PUBLISHED = (
    "MNIST, batch 64, dense layers of 1024, 1024 and 10 with ReLU between and a softmax at the end.",
    "Forward gradients (grad loss . v) v with one v ~ N(0, I), the directional derivative capped at 1 in size.",
    "Learning rate, its exponential decay, momentum and betas of every row: Table 1.",
    "50 epochs; hyperparameters by grid search on a validation set, for each gradient by itself; one seed.",
    "The test loss is the mean over the last batch of a shuffled pass over the test images: 16 of 10,000.",
)


@dataclass(frozen=True)
class Choice:
    """What was not published, or not clearly, and what is taken here."""

    silent: str
    taken: str


CHOICES = (
    Choice("how many images validate", "the first 50,000 train, the other 10,000 validate"),
    Choice("the scale of the pixels", "0 to 1, not centred"),
    Choice("the initial weights", "PyTorch's own for a dense layer"),
    Choice("what becomes of the 16 images that an epoch's whole batches leave over", "they sit that epoch out"),
    Choice("the unit of the decay", "lr exp(-decay step), a step being a batch"),
    Choice("a threshold of the gradient clipping beside the cap of 1 on the derivative", "the cap alone"),
    Choice("whether backprop's gradients were clipped", "they are not"),
    Choice("Adam's eps", "1e-8, PyTorch's own"),
    Choice("the epoch whose loss is printed", "the last"),
    Choice("which 16 images came last", "those of one fixed shuffle, and the spread over 1,000 shuffles"),
)
