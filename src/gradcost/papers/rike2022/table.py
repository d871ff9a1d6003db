"""Table 1 of Rike and Foerland (2022) as data, with the published facts about how its numbers were computed.

Source: Rike and Foerland, "A comparison of backpropagation and forward gradients for deep learning" (EPFL, 2022),
and the notebooks published with it. The saved output of the notebooks shows how the test loss was computed.
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Rike and Førland (2022), A comparison of backpropagation and forward gradients for deep learning"
BATCH = 64
STEPS_PER_EPOCH = 50_000 // BATCH  # of MNIST: 50,000 of its images train, see ASSUMPTIONS
DECIMALS = 3  # number of decimals of the losses in the table
TUNED_SUFFIX = ", tuned"  # the method name of a tuned run is the name of the row plus this


@dataclass(frozen=True)
class TableRow:
    """One row of Table 1, as printed.

    Args:
        gradient: "forward" or "backprop".
        model: "nn" (dense layers of 1024, 1024 and 10 units) or "cnn".
        dataset: "mnist" or "cifar10".
        optimizer: "sgd", "nesterov" or "adam".
        lr: the learning rate.
        decay: the rate of the exponential decay of the learning rate.
        momentum: the momentum of Nesterov; 0 for other optimizers.
        beta1: beta1 of Adam; 0 for other optimizers.
        beta2: beta2 of Adam; 0 for other optimizers.
        epochs: the number of training epochs.
        loss: the published test loss, in nats.
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
        """The name of the row, such as `forward NN SGD`; also the method name of its runs with published settings."""
        optimizer = {"sgd": "SGD", "nesterov": "Nesterov", "adam": "Adam"}[self.optimizer]
        return f"{self.gradient} {self.model.upper()} {optimizer}"


TABLE = (
    TableRow("forward", "nn", "mnist", "sgd", 0.000464, 1e-5, 0, 0, 0, 50, 0.332),
    TableRow("backprop", "nn", "mnist", "sgd", 0.1, 0, 0, 0, 0, 50, 0.000),
    TableRow("forward", "nn", "mnist", "nesterov", 0.00032, 1e-5, 0.367, 0, 0, 50, 0.270),
    TableRow("backprop", "nn", "mnist", "nesterov", 0.1, 0, 0.5, 0, 0, 50, 0.000),
    TableRow("forward", "nn", "mnist", "adam", 0.0005, 5e-5, 0, 0.99, 0.999, 50, 0.283),
    TableRow("backprop", "nn", "mnist", "adam", 0.0001, 0, 0, 0.9, 0.999, 50, 0.000),
    TableRow("forward", "cnn", "mnist", "sgd", 0.000398, 1e-5, 0, 0, 0, 50, 0.548),
    TableRow("backprop", "cnn", "mnist", "sgd", 0.1, 0, 0, 0, 0, 50, 0.000),
    TableRow("forward", "cnn", "mnist", "nesterov", 0.0001, 1e-4, 0.9, 0, 0, 50, 0.559),
    TableRow("backprop", "cnn", "mnist", "nesterov", 0.01, 0, 0.783, 0, 0, 50, 0.000),
    TableRow("forward", "cnn", "mnist", "adam", 0.00025, 1e-4, 0, 0.9, 0.9999, 50, 0.669),
    TableRow("backprop", "cnn", "mnist", "adam", 0.000236, 0, 0, 0.9, 0.999, 50, 0.000),
    TableRow("forward", "cnn", "cifar10", "sgd", 0.000433, 1e-6, 0, 0, 0, 100, 6.955),
    TableRow("backprop", "cnn", "cifar10", "sgd", 0.01, 1e-4, 0, 0, 0, 100, 1.685),
)


def rows(model: str, dataset: str = "mnist") -> tuple[TableRow, ...]:
    """Return the rows of one model and one dataset, in the order of the table."""
    return tuple(row for row in TABLE if (row.model, row.dataset) == (model, dataset))


def counterpart(row: TableRow) -> TableRow:
    """Return the row with the other gradient and the same model, dataset and optimizer."""
    (other,) = (
        candidate
        for candidate in rows(row.model, row.dataset)
        if candidate.optimizer == row.optimizer and candidate is not row
    )
    return other


PUBLISHED_FACTS = (
    "MNIST, batch 64, dense layers of 1024, 1024 and 10 units, ReLU between them, softmax at the end.",
    "Forward gradient: (grad loss . v) v with one v ~ N(0, I). The directional derivative is clipped to [-1, 1].",
    "Learning rate, its exponential decay, momentum and betas of every row: Table 1.",
    "50 epochs. Hyperparameters by grid search on a validation set, separately for each gradient. One seed.",
    "The test loss is the mean over the last batch of a shuffled pass over the test images: 16 of 10,000.",
)


@dataclass(frozen=True)
class Assumption:
    """A detail that the paper leaves open or unclear, and what this study assumes for it."""

    detail: str
    assumed: str


ASSUMPTIONS = (
    Assumption("size of the validation set", "the first 50,000 images train, the other 10,000 validate"),
    Assumption("scale of the pixels", "0 to 1, not centred"),
    Assumption("initial weights", "PyTorch's default for a dense layer"),
    Assumption("the 16 training images that remain after the last full batch of an epoch", "not used in that epoch"),
    Assumption("unit of the decay", "lr exp(-decay step), one step per batch"),
    Assumption("clipping of the gradient, in addition to that of the directional derivative", "none"),
    Assumption("whether the gradients of backprop were clipped", "not clipped"),
    Assumption("eps of Adam", "1e-8, PyTorch's default"),
    Assumption("epoch at which the printed loss was measured", "the last"),
    Assumption(
        "which 16 images form the last batch", "those of one fixed shuffle; the spread is over 1,000 shuffles"
    ),
)
