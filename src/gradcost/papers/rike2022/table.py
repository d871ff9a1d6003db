"""Table 1 of Rike and Foerland (2022) as data.

Source: Rike and Foerland, "A comparison of backpropagation and forward gradients for deep learning" (EPFL, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Rike and Førland (2022), A comparison of backpropagation and forward gradients for deep learning"
BATCH = 64
EXAMPLES = {"mnist": 50_000, "cifar10": 40_000}  # training images; 10,000 others validate (cell 8 of the notebooks)
TUNED_SUFFIX = ", tuned"  # the method name of a tuned run is the name of the row plus this
UNCAPPED_SUFFIX = ", uncapped"  # of a forward run without the cap that its row has
GROUPS = {"nn": ("nn", "mnist"), "cnn": ("cnn", "mnist"), "cifar10": ("cnn", "cifar10")}  # (model, dataset)


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
        net = "CIFAR-10" if self.dataset == "cifar10" else self.model.upper()
        return f"{self.gradient} {net} {optimizer}"


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


def rows(group: str) -> tuple[TableRow, ...]:
    """Return the rows of one key of GROUPS, in the order of the table."""
    return tuple(row for row in TABLE if (row.model, row.dataset) == GROUPS[group])


def counterpart(row: TableRow) -> TableRow:
    """Return the row with the other gradient and the same model, dataset and optimizer."""
    shared = (row.model, row.dataset, row.optimizer)
    (other,) = (
        candidate
        for candidate in TABLE
        if (candidate.model, candidate.dataset, candidate.optimizer) == shared and candidate != row
    )
    return other
