"""Compare the error of SVRG's estimates with plain estimates at equal FLOPs.

    python benchmarks/variance_reduction.py [--seeds 10]

Setup: the digits MLP (4,810 weights, batches of 64, 19 per epoch). Each method takes 40 steps of SGD, from initial
weights and from weights that backprop has trained for 300 steps.

- Error of a step: |g - grad|^2 / |grad|^2, where grad is the gradient over all training examples, by backprop.
- Error of a period: the same for the mean over 20 steps. The sum of these steps moves the weights, and the error of
  SVRG's full gradient is the same in all of them.
- FLOPs: plain methods use three probes per step. SVRG uses two for its difference, and every twenty steps one pass
  over the data. The script prints the counted FLOPs.
- Seeds are paired; an interval is that of the median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics as st
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradcost import Jvp, Key, Probing, Rademacher, Reverse, VarianceReduced, mezo
from gradcost.core import Note
from gradcost.estimators.estimator import Estimator
from gradcost.estimators.variance_reduced import full_gradient
from gradcost.instruments.flops import OpCounter
from gradcost.results.statistics import interval
from gradcost.tasks.digits import Digits
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState

STEPS, EVERY, WARM_UP = 40, 20, 300
METHODS: dict[str, tuple[Estimator, Estimator]] = {
    "forward gradient, signs": (Probing(Jvp(), Rademacher(), 3), Probing(Jvp(), Rademacher())),
    "MeZO": (mezo(probes=3), mezo()),
}


def train_state(seed: int, warm_up: int) -> TrainState:
    """Return the digits MLP after `warm_up` steps of backprop."""
    task = Digits()
    state = TrainState(task.objective(Key(seed)), Reverse(), SGD(0.1))
    for number in range(warm_up):
        state.step(task.batch_at(Key(seed).fold("data"), number), Key(seed).fold("warm", number))
    return state


def errors(estimator: Estimator, seed: int, warm_up: int, lr: float) -> tuple[float, float, int]:
    """Return the mean error of a step and of a period along the estimator's path, and the FLOPs per step."""
    task, objective = Digits(), train_state(seed, warm_up).objective
    state, single, period, total = estimator.init(objective), [], [], torch.zeros(0)
    counter = OpCounter(objective.model)
    for number in range(STEPS):
        key, batch = Key(seed).fold("step", number), task.batch_at(Key(seed).fold("order"), number)
        with counter.followed():
            estimate = estimator.estimate(objective, batch, key, state)
        state = estimate.state
        exact = flat(full_gradient(Reverse(), objective, key))
        gradient = dict(estimate.gradient.leaves())
        error = (flat(gradient) - exact) / exact.norm()
        single.append(float(error.square().sum()))
        total = error if number % EVERY == 0 else total + error
        if (number + 1) % EVERY == 0:
            period.append(float((total / EVERY).square().sum()))
        with torch.no_grad():
            for leaf in objective.leaves:
                leaf.parameter.sub_(gradient[leaf.name], alpha=lr)
    return st.fmean(single), st.fmean(period), counter.counts.flops // STEPS


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in gradient.values()])


def ratio(reduced: Sequence[float], plain: Sequence[float]) -> str:
    ratios = interval([one / other for one, other in zip(reduced, plain, strict=True)])
    return f"{ratios.median:.3g} [{ratios.low:.3g}, {ratios.high:.3g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(1, parser.parse_args().seeds + 1)
    warnings.simplefilter("ignore", Note)
    print(
        "| method | weights | lr | plain: error of a step | SVRG / plain: step | mean of 20 steps | FLOPs / plain |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (plain, single) in METHODS.items():
        reduced = {
            f"{name}, full gradient by itself": VarianceReduced(single, EVERY),
            f"{name}, full gradient by backprop": VarianceReduced(single, EVERY, Reverse()),
        }
        for start, warm_up in (("fresh", 0), ("trained", WARM_UP)):
            for lr in (1e-3, 1e-5):
                base = [errors(plain, seed, warm_up, lr) for seed in seeds]
                steps, periods, flops = zip(*base, strict=True)
                for label, method in reduced.items():
                    figures = [errors(method, seed, warm_up, lr) for seed in seeds]
                    one, mean, cost = zip(*figures, strict=True)
                    cells = [label, start, f"{lr:g}", f"{st.median(steps):,.0f}", ratio(one, steps)]
                    print(
                        "|", " | ".join([*cells, ratio(mean, periods), f"{cost[0] / flops[0]:.2f}"]), "|", flush=True
                    )


if __name__ == "__main__":
    main()
