"""Does SVRG lower the error of an estimate at equal FLOPs? `python benchmarks/variance_reduction.py [--seeds 10]`.

On the digits MLP (4,810 weights, batches of 64, 19 to a pass) each method takes 40 steps of its own SGD, from fresh
weights and from weights that backprop has trained for 300 steps, and at every step the squared distance of its
gradient from the full training gradient (exact, by backprop over all examples) is taken, over that gradient's square.
Plain methods spend three probes a step; SVRG spends two on its difference and one in twenty on its pass: the FLOPs
that were counted are printed beside. What moves the weights is the sum of a period's steps, and SVRG's full gradient
errs alike in all of them: so the error of the mean over each twenty steps is taken too. Seeds are paired; an interval
is that of the median of their ratios.
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

STEPS, EVERY, WARM = 40, 20, 300
WAYS: dict[str, tuple[Estimator, Estimator]] = {
    "forward gradient, signs": (Probing(Jvp(), Rademacher(), 3), Probing(Jvp(), Rademacher())),
    "MeZO": (mezo(probes=3), mezo()),
}


def started(seed: int, warm: int) -> TrainState:
    """The digits MLP with its initial weights, or as backprop leaves them after `warm` steps."""
    task = Digits()
    made = TrainState(task.objective(Key(seed)), Reverse(), SGD(0.1))
    for number in range(warm):
        made.step(task.batch_at(Key(seed).fold("data"), number), Key(seed).fold("warm", number))
    return made


def errors(estimator: Estimator, seed: int, warm: int, lr: float) -> tuple[float, float, int]:
    """Along the estimator's own path the mean squared relative error of a step and of the mean of a period, and the
    FLOPs of an estimate, passes shared."""
    task, objective = Digits(), started(seed, warm).objective
    state, single, period, away = estimator.init(objective), [], [], torch.zeros(0)
    counted = OpCounter(objective.model)
    for number in range(STEPS):
        key, batch = Key(seed).fold("step", number), task.batch_at(Key(seed).fold("order"), number)
        with counted.followed():
            found = estimator.estimate(objective, batch, key, state)
        state = found.state
        true = flat(full_gradient(Reverse(), objective, key))
        gradient = dict(found.gradient.leaves())
        off = (flat(gradient) - true) / true.norm()
        single.append(float(off.square().sum()))
        away = off if number % EVERY == 0 else away + off
        if (number + 1) % EVERY == 0:
            period.append(float((away / EVERY).square().sum()))
        with torch.no_grad():
            for leaf in objective.leaves:
                leaf.parameter.sub_(gradient[leaf.name], alpha=lr)
    return st.fmean(single), st.fmean(period), counted.counts.flops // STEPS


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in gradient.values()])


def ratio(reduced: Sequence[float], plain: Sequence[float]) -> str:
    found = interval([one / other for one, other in zip(reduced, plain, strict=True)])
    return f"{found.median:.3g} [{found.low:.3g}, {found.high:.3g}]"


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    asked.add_argument("--seeds", type=int, default=10)
    seeds = range(1, asked.parse_args().seeds + 1)
    warnings.simplefilter("ignore", Note)
    print(
        "| method | weights | lr | plain: a step | SVRG / plain: a step | of the mean of 20 steps | FLOPs / plain |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (plain, single) in WAYS.items():
        reduced = {
            f"{name}, pass by itself": VarianceReduced(single, EVERY),
            f"{name}, pass by backprop": VarianceReduced(single, EVERY, Reverse()),
        }
        for start, warm in (("fresh", 0), ("trained", WARM)):
            for lr in (1e-3, 1e-5):
                base = [errors(plain, seed, warm, lr) for seed in seeds]
                steps, periods, flops = zip(*base, strict=True)
                for label, method in reduced.items():
                    found = [errors(method, seed, warm, lr) for seed in seeds]
                    one, mean, cost = zip(*found, strict=True)
                    cells = [label, start, f"{lr:g}", f"{st.median(steps):,.0f}", ratio(one, steps)]
                    print(
                        "|", " | ".join([*cells, ratio(mean, periods), f"{cost[0] / flops[0]:.2f}"]), "|", flush=True
                    )


if __name__ == "__main__":
    main()
