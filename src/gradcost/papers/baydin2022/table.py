"""The MNIST experiments of Baydin et al. (2022) as data: settings and published numbers.

Source: Baydin, Pearlmutter, Syme, Wood and Torr, "Gradients without backpropagation" (arXiv 2202.08587): the
abstract, the figure of logistic regression, and Figure 4 with its caption (the dense network: lr 2e-5 in the top row,
2e-4 in the bottom row, five runs each). The figures print T_f, T_b, R_f and R_b. We read them in two public
repositories with copies of these figures: laserkelvin/ml-reviews and GiorgiaRistich/Project-Neural-Networks. We have
not seen the figure of the CNN. The authors published no code.
"""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "Baydin et al. (2022), Gradients without backpropagation"
BATCH = 64
DECAY = 1e-4  # the learning rate at step i is lr exp(-DECAY i)
FORWARD, BACKPROP = "forward", "backprop"
GRADIENTS = (FORWARD, BACKPROP)
TUNED = "tuned"
ABSTRACT = (0.5, 1.0)  # "up to twice as fast in some cases", as a ratio of times


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Args:
        name: its name, part of the method names of its runs.
        rows: the model, a key of `study.MODELS`.
        lr: the learning rate that both gradients share.
        steps: the number of steps.
        times: the printed T_f and T_b in seconds: the time to the same validation loss. None: not printed, or not
            known to us.
        costs: the printed R_f and R_b (the time of a step, divided by that of one evaluation of the loss), and their
            printed ratio. None: as for `times`.
        gap: the final validation loss of forward gradients minus that of backprop, read off the figure. None: the
            figure is not known to us.
        precision: how exactly `gap` can be read.
    """

    name: str
    rows: str
    lr: float
    steps: int
    times: tuple[float, float] | None = None
    costs: tuple[float, float, float] | None = None
    gap: float | None = None
    precision: float = 0.0

    def method(self, gradient: str) -> str:
        """Return the method name of the runs with the shared learning rate."""
        return f"{gradient} {self.name}"


EXPERIMENTS = (
    Experiment("logistic", "logistic", 1e-4, 25_000, (197.326, 356.756), gap=0.0, precision=0.02),
    Experiment("nn 2e-5", "nn", 2e-5, 20_000, (165.842, 292.359), (2.329, 3.971, 0.586), gap=0.0, precision=0.005),
    Experiment("nn 2e-4", "nn", 2e-4, 20_000, (68.014, 296.957), (2.607, 4.359, 0.598), gap=-0.36, precision=0.05),
    Experiment("cnn 2e-4", "cnn", 2e-4, 20_000),
)


def experiments(rows: str) -> tuple[Experiment, ...]:
    """Return the experiments of one model."""
    return tuple(experiment for experiment in EXPERIMENTS if experiment.rows == rows)


def tuned_method(gradient: str, rows: str) -> str:
    """Return the method name of the runs with a learning rate tuned for each gradient."""
    return f"{gradient} {rows}, {TUNED}"


PUBLISHED_FACTS = (
    "MNIST, batch 64, SGD, five runs. The learning rate at step i is lr exp(-1e-4 i), and both gradients share lr.",
    "Forward gradient: (grad loss . v) v with one v ~ N(0, I), not clipped.",
    "Logistic regression: lr 1e-4, 25,000 steps. Dense layers of 1024, 1024 and 10 units with ReLU: lr 2e-5 and "
    "2e-4, 20,000 steps.",
    "CNN: four 3x3 convolutions of 64 channels, 2x2 max-pool after the second and the fourth, dense layers of 1024 "
    "and 10 units.",
    "T_f and T_b, printed in the figures, are the times at which both runs have the same validation loss.",
    "R_f and R_b, printed in Figure 4, are the times of a step, divided by that of one evaluation of the loss.",
)

ASSUMPTIONS = (
    ("validation set", "the last 10,000 of the 60,000 training images; the others train"),
    ("scale of the pixels", "0 to 1, not centred"),
    ("initial weights", "PyTorch's default"),
    ("padding of the convolutions", "none"),
    ("learning rate and steps of the CNN", "those of the dense network with lr 2e-4; we have not seen its figure"),
    ("the common validation loss", "the higher one of the lowest validation losses of the two runs"),
    ("a run that never reaches it", "a run that diverged, or whose loss is never below that of guessing"),
)
