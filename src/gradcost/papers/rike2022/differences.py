"""Where the paper and its code differ, or where the paper is silent; and what each protocol of this study does."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_FACTS = (
    "Batch 64; MNIST and CIFAR-10; the nets of the paper's section III, with ReLU and a softmax output.",
    "Forward gradient: (grad loss . v) v with one v ~ N(0, I). The slope, grad loss . v, is capped at 1 in the rows "
    "with SGD and Nesterov.",
    "Learning rate, momentum and betas of every row, and the decay of all rows but one: Table 1.",
    "50 epochs, 100 on CIFAR-10. Hyperparameters by grid search on a validation set. One seed.",
)


@dataclass(frozen=True)
class Difference:
    """One detail of the experiments.

    Args:
        detail: what it is.
        paper: what the paper says; empty if nothing.
        code: what the notebooks ran.
        where: files and cells, numbered from 0, at the commit `printed.COMMIT`.
        as_stated: what a study `AsStated` does.
        as_run: what a study `AsRun` does. Empty: the same as the notebooks.
    """

    detail: str
    paper: str
    code: str
    where: str
    as_stated: str
    as_run: str = ""


DIFFERENCES = (
    Difference(
        "cap on the slope, the two forward rows with Adam",
        "1",
        "none: `clip` is not passed, and its default is False",
        "MNIST cells 49, 92; optimizers.py",
        "1",
    ),
    Difference(
        "decay of forward NN Nesterov",
        "1e-5",
        "1e-6: the default since commit e98bf1b. No committed run has 1e-5",
        "MNIST cell 35; optimizers.py",
        "1e-5",
    ),
    Difference(
        "incomplete batch of an epoch",
        "",
        "used: 782 batches per epoch of MNIST, the last of 16 images",
        "MNIST cell 8",
        "left out; of MNIST, 781 batches remain",
    ),
    Difference(
        "validation images",
        "",
        "10,000 of the 60,000 (CIFAR-10: 50,000) training images, by a permutation from seed 0",
        "cells 5, 8 of both notebooks",
        "those that the task sets aside; of MNIST, the last 10,000",
        "the permutation of the notebooks",
    ),
    Difference(
        "training loss",
        "",
        "forward rows: probabilities are clamped to [1.2e-7, 1 - 1.2e-7], so no loss exceeds 15.94 and its slope is "
        "0 beyond. Backprop: torch's CrossEntropyLoss",
        "loss.py; MNIST cells 22, 24",
        "not clamped",
        "clamped in all rows. It acts on exploded runs; at other losses it changes nothing visible",
    ),
    Difference(
        "what is capped",
        '"gradient clipping", and the slope',
        "the slope alone; nothing in backprop rows",
        "optimizers.py; MNIST cell 24",
        "the slope alone; nothing in backprop rows",
    ),
    Difference("pixels", "", "0 to 1 (ToTensor), not centred", "cell 8 of both notebooks", "the same"),
    Difference(
        "initial weights",
        "",
        "PyTorch's default, from seed 42",
        "models.py; MNIST cell 22",
        "PyTorch's default, from other seeds",
        "PyTorch's default, from other seeds",
    ),
    Difference(
        "unit of the decay",
        "",
        "lr exp(-decay step), one step per batch",
        "optimizers.py; MNIST cell 24",
        "the same",
    ),
    Difference(
        "eps of Adam",
        "",
        "forward: 1e-8 under the root; backprop: PyTorch's default, 1e-8 beside it",
        "optimizers.py; MNIST cell 52",
        "PyTorch's, for both",
        "PyTorch's, for both",
    ),
    Difference(
        "weights that Nesterov scores",
        "",
        "forward: without the momentum step; backprop: PyTorch's form, with it",
        "optimizers.py; MNIST cell 37",
        "PyTorch's, for both",
        "PyTorch's, for both",
    ),
    Difference(
        "test loss in Table 1",
        "after the last epoch",
        "the mean over the last 16 shuffled images: the list of losses is emptied inside the loop over batches",
        "MNIST cell 22; CIFAR cell 18",
        "all test images, and the same metric beside them",
        "all test images, and the same metric beside them",
    ),
    Difference(
        "two numbers of Table 1",
        "0.270 (forward NN Nesterov), 1.685 (backprop CIFAR-10)",
        "0.268, 1.684",
        "MNIST cell 35; CIFAR cell 20",
        "compared with the printed losses",
        "compared with the printed losses",
    ),
)
