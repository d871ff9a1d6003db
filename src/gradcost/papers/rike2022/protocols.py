"""Two protocols for the same rows: what the paper says, and what its code ran."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from gradcost.core.value import value
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient
from gradcost.papers.rike2022.table import BATCH, EXAMPLES, TableRow
from gradcost.papers.rike2022.tasks import NotebookData
from gradcost.results.records import Results
from gradcost.tasks.task import Task
from gradcost.training.optimizers import SGD, Adam, Nesterov, Optimizer

CAP = 1.0  # the largest absolute value of a slope
_OPTIMIZERS: dict[str, Callable[[TableRow, float], Optimizer]] = {
    "sgd": lambda row, decay: SGD(row.lr, decay=decay),
    "nesterov": lambda row, decay: Nesterov(row.lr, row.momentum, decay=decay),
    "adam": lambda row, decay: Adam(row.lr, row.beta1, row.beta2, decay=decay),
}


class Protocol(ABC):
    """How the rows of Table 1 are trained."""

    @abstractmethod
    def cap(self, row: TableRow) -> float | None:
        """Return the cap on the slopes of a row; None without one."""

    @abstractmethod
    def decay(self, row: TableRow) -> float:
        """Return the decay rate of a row's learning rate, per step."""

    @abstractmethod
    def task(self, task: Task) -> Task | NotebookData:
        """Return the task with the split and the batches of the protocol."""

    @abstractmethod
    def steps(self, row: TableRow) -> int:
        """Return the number of steps of a row's published number of epochs."""

    def estimator(self, row: TableRow) -> Estimator:
        """Return the gradient estimator of a row."""
        if row.gradient == "backprop":
            return backprop()
        cap = self.cap(row)
        return forward_gradient() if cap is None else Clipped(forward_gradient(), cap)

    def optimizer(self, row: TableRow) -> Optimizer:
        """Return the optimizer of a row."""
        return _OPTIMIZERS[row.optimizer](row, self.decay(row))


@value
class AsStated(Protocol):
    """What the paper says: every forward row has a cap of 1, and the decay is that of Table 1.

    The paper does not say how the training data are split, or what happens to an incomplete batch: the task's own
    split is used, and the incomplete batch is left out.
    """

    def cap(self, row: TableRow) -> float | None:
        return CAP if row.gradient == "forward" else None

    def decay(self, row: TableRow) -> float:
        return row.decay

    def task(self, task: Task) -> Task | NotebookData:
        return task

    def steps(self, row: TableRow) -> int:
        return row.epochs * (EXAMPLES[row.dataset] // BATCH)


@value
class AsRun(Protocol):
    """What the authors' notebooks ran.

    - No cap in the forward rows with Adam: MNIST.ipynb, cells 49 and 92.
    - The decay of "forward NN Nesterov" is 1e-6, not the 1e-5 of Table 1: cell 35 with the default of optimizers.py.
    - The random split, the incomplete batch and the clamped loss of `NotebookData`.
    """

    def cap(self, row: TableRow) -> float | None:
        return CAP if row.gradient == "forward" and row.optimizer != "adam" else None

    def decay(self, row: TableRow) -> float:
        return 1e-6 if (row.gradient, row.model, row.optimizer) == ("forward", "nn", "nesterov") else row.decay

    def task(self, task: Task) -> Task | NotebookData:
        return NotebookData(task)

    def steps(self, row: TableRow) -> int:
        return row.epochs * -(-EXAMPLES[row.dataset] // BATCH)


PROTOCOLS: dict[str, Protocol] = {"paper": AsStated(), "code": AsRun()}


def protocol_of(results: Results) -> Protocol:
    """Return the protocol of the records in a results folder, from the repr of their task."""
    return AsRun() if "NotebookData(" in results.study.task else AsStated()
