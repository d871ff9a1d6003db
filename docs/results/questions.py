"""Questions that a reviewer asks of forward gradients and MeZO, on MNIST with a small network, each as a study.

    gradcost study docs/results/questions.py:probes -j 2 -o gradcost-runs/questions-probes
    gradcost study docs/results/questions.py:distributions -j 2 -o gradcost-runs/questions-distributions
    gradcost study docs/results/questions.py:optimizers -j 2 -o gradcost-runs/questions-optimizers
    gradcost study docs/results/questions.py:error_rate -j 2 -o gradcost-runs/questions-error-rate
    gradcost study docs/results/questions.py:rank_1 -j 2 -o gradcost-runs/questions-rank-1
    gradcost study docs/results/questions.py:rank_8 -j 2 -o gradcost-runs/questions-rank-8
    gradcost study docs/results/questions.py:all_weights -j 2 -o gradcost-runs/questions-all-weights
    python docs/results/questions.py docs/results

Dense layers of 64, 64 and 10, 55,050 weights. In one study every run has the same FLOPs, every method is tuned over
seven learning rates half a decade apart and one more, and trains on five fresh seeds. A method without backprop has a
cap of 1 on each slope. Every learning rate decays to a tenth. The last command prints the tables of questions.md.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.value import value
from gradcost.directions import (
    Coordinates,
    Directions,
    Gaussian,
    LowRank,
    Masked,
    Orthogonal,
    Rademacher,
    Sphere,
    StatefulDirections,
)
from gradcost.directions.masks import Random
from gradcost.estimators.clipped import Clipped
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.presets import backprop, forward_gradient, mezo
from gradcost.estimators.probing import Probing
from gradcost.papers.claims import markdown_table
from gradcost.papers.intervals import format_interval, format_ratio
from gradcost.planning.forecast import forecast
from gradcost.results.records import read
from gradcost.results.targets import Target, reaches
from gradcost.results.tuning import final_rate, final_runs, log_grid
from gradcost.results.wording import DASH
from gradcost.slopes.slope import Jvp
from gradcost.studies.phases import phases
from gradcost.studies.study import Stages, Study
from gradcost.studies.trial import Trial
from gradcost.tasks import Mnist
from gradcost.tasks.architectures import Mlp
from gradcost.tasks.task import Batch, Split, Splits
from gradcost.training.loop import train
from gradcost.training.optimizers import SGD, Adam, AdamW, Nesterov, Optimizer

TARGET = Target("accuracy", 0.6)  # of the validation examples
TASK = Mnist(model=Mlp((64, 64)))


@value
class ErrorRate(Mnist):
    """Mnist whose loss is the fraction of wrong answers. Its derivative is replaced by that of the cross-entropy."""

    def objective(self, key: Key) -> Objective:
        return super().objective(key).with_loss(error_rate_of)


def error_rate_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the fraction of wrong answers. Backprop sees the derivative of the cross-entropy, differences do not."""
    logits = model(batch.x)
    surrogate = cross_entropy(logits, batch.y)
    return (logits.argmax(1) != batch.y).float().mean() + (surrogate - surrogate.detach())


@cache
def turned(splits: Splits) -> Splits:
    return Splits(*(Split(torch.rot90(part.x, dims=(2, 3)).contiguous(), part.y) for part in splits))


@value
class Turned(Mnist):
    """Mnist with its images turned by a quarter, for a network that 2,000 steps of backprop trained on upright ones.

    Args:
        rank: the rank of the LoRA adapters of all three layers, which alone are trained. None: all weights are.
    """

    rank: int | None = None

    def splits(self) -> Splits:
        return turned(super().splits())

    def objective(self, key: Key) -> Objective:
        base = Mnist(model=self.model, batch=self.batch)
        upright = base.objective(key)
        batches = [base.batch_at(key.fold("upright"), step) for step in range(2000)]
        for _ in train(upright, batches, backprop(), SGD(0.3)):
            pass
        model = upright.model
        if self.rank is not None:
            config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=["1", "3", "5"])
            with seeded_generators(key.fold("adapters")):
                model = inject_adapter_in_model(config, model)
        return Objective(model, upright.loss, data=self.once_through)


class Method(NamedTuple):
    estimator: Estimator
    rates: tuple[float, float]  # the smallest and the largest of the grid
    optimizer: Callable[..., Optimizer] = SGD


def capped(estimator: Estimator) -> Estimator:
    return Clipped(estimator, 1.0)


def along(directions: Directions | StatefulDirections, probes: int = 1) -> Estimator:
    return capped(Probing(Jvp(min(probes, 4)), directions, probes))


BACKPROP = {"backprop": Method(backprop(), (1e-3, 1.0))}
PROBES = BACKPROP | {
    f"forward gradient {n}": Method(capped(forward_gradient(n)), (1e-4 * math.sqrt(n), 0.1 * math.sqrt(n)))
    for n in (1, 2, 4, 8, 16, 32, 64)
}
DISTRIBUTIONS = BACKPROP | {
    "Gaussian": Method(along(Gaussian()), (1e-4, 0.1)),
    "random signs": Method(along(Rademacher()), (1e-4, 0.1)),
    "sphere": Method(along(Sphere()), (1e-4, 0.1)),
    "one coordinate": Method(along(Coordinates()), (1e-4, 0.1)),
    "low rank": Method(along(LowRank()), (1e-4, 0.1)),
    "a tenth of the weights": Method(along(Masked(Random(0.1))), (1e-4, 0.1)),
    "16 Gaussian": Method(along(Gaussian(), 16), (1e-3, 1.0)),
    "16 orthogonal": Method(along(Orthogonal(), 16), (1e-3, 1.0)),
}
OPTIMIZERS = {
    f"{name}, {label}": Method(estimator, tuple(factor * rate for rate in rates), optimizer)  # type: ignore[arg-type]
    for name, estimator, factor in (
        ("backprop", backprop(), 10.0),
        ("forward gradient", capped(forward_gradient()), 1.0),
        ("MeZO", capped(mezo()), 1.0),
    )
    for label, optimizer, rates in (
        ("SGD", SGD, (1e-4, 0.1)),
        ("Nesterov", partial(Nesterov, momentum=0.9), (1e-5, 1e-2)),
        ("Adam", Adam, (1e-5, 1e-2)),
        ("AdamW", AdamW, (1e-5, 1e-2)),
    )
}
ADAPTED = {
    "backprop": Method(backprop(), (1e-4, 1.0)),
    "forward gradient": Method(capped(forward_gradient()), (1e-4, 1.0)),
    "MeZO": Method(capped(mezo()), (1e-4, 1.0)),
}
ERROR_RATE = BACKPROP | {f"MeZO, eps {eps:g}": Method(capped(mezo(eps)), (1e-4, 0.1)) for eps in (1e-3, 1e-2, 1e-1)}


def study(question: str, methods: dict[str, Method], length: int, task: Mnist = TASK, points: int = 7) -> Study:
    """Return a study whose runs have the FLOPs of `length` steps of backprop, with `points` rates in each grid."""

    def flops(method: Method) -> float:
        objective, batch = task.objective(Key(0)), task.batch_at(Key(0), 0)
        return forecast(method.estimator, objective, batch, SGD(1.0)).flops

    def trials() -> Stages:
        budget = length * flops(BACKPROP["backprop"])
        steps = {label: int(budget // flops(method)) for label, method in methods.items()}

        def make(label: str, lr: float, phase: str, seed: int) -> Trial:
            method = methods[label]
            optimizer = method.optimizer(lr, decay=math.log(10) / steps[label])
            target = TARGET.value
            return Trial(task, label, method.estimator, optimizer, steps[label], phase, seed, target=target)

        rates = {label: log_grid(*method.rates, points) for label, method in methods.items()}
        return (yield from phases(rates, make, more=1, confirm=0, seeds=range(1, 6)))

    return Study(question, trials)


probes = study("How many directions per step?", PROBES, 4000)
distributions = study("Which random directions?", DISTRIBUTIONS, 2000)
optimizers = study("Which optimizer?", OPTIMIZERS, 2000)
error_rate = study("Can the error rate itself be the loss?", ERROR_RATE, 2000, ErrorRate(model=TASK.model))
rank_1, rank_8, all_weights = (
    study(f"Which gradient for {what}?", ADAPTED, 2000, Turned(model=TASK.model, rank=rank), points=9)
    for what, rank in (("adapters of rank 1", 1), ("adapters of rank 8", 8), ("all weights", None))
)
STUDIES = {
    **dict.fromkeys(("questions-probes", "questions-distributions", "questions-optimizers"), TARGET),
    "questions-error-rate": TARGET,
    **dict.fromkeys(("questions-rank-1", "questions-rank-8", "questions-all-weights"), Target("accuracy", 0.25)),
}


def table(folder: Path) -> str:
    """Return what each method of a study reaches, and its cost of the target relative to backprop.

    A ratio is missing if a run of backprop does not reach the target.
    """
    results, target = read(folder), STUDIES[folder.name]
    found = {reach.method: reach for reach in reaches(results, [target])}
    rows = []
    for method, reach in found.items():
        runs = final_runs(results, method)
        tested = [100 * (run.test.accuracy or 0.0) for run in runs if run.test is not None]
        row = [
            method,
            f"{max(run.steps for run in runs):,}",
            final_rate(results, method),
            format_interval(tested, bounds=(0.0, 100.0)),
        ]
        row.append(f"{reach.reached} of {reach.runs}")
        ratios = [reach.ratio.get(resource) for resource in ("steps", "flops")]
        rows.append([*row, *(DASH if ratio is None else format_ratio(ratio) for ratio in ratios)])
    headers = [
        "method",
        "steps",
        "learning rate",
        "test accuracy",
        f"runs at {target.value:.0%}",
        "steps / backprop's",
        "FLOPs / backprop's",
    ]
    return markdown_table(headers, rows)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in STUDIES:
        print(f"{name}\n\n{table(Path(sys.argv[1]) / name)}\n")
