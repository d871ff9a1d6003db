"""Time a step against the weights d, the directions n, the batch and the length, and fit lines in log-log axes.

    python benchmarks/scaling.py [--rounds 7] [--largest 1e8]

A row is the median over the rounds. A slope near 1 says that time grows in proportion. The residual is the largest
distance of a point from its line, as a factor. Theory: noise has slope 1 in d. A step has slope 1 in n, in the batch
and, at a fixed batch, in d; calls of functions cost time too, which lifts the first points and lowers the slope.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import gradcost
from gradcost import Key
from gradcost.core.isolation import seeded_generators
from gradcost.noise.add import add_noise
from gradcost.noise.philox import Normals, Signs
from gradcost.tasks.architectures import Gpt
from gradcost.training.optimizers import SGD
from gradcost.training.train_state import TrainState

Make = Callable[[float], Callable[[], object]]  # the value on the horizontal axis -> a step


def stack(width: int) -> nn.Module:
    with seeded_generators(Key(0)):
        return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)))


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def step_of(estimator: gradcost.Estimator, model: nn.Module, batch: Tensor) -> Callable[[], object]:
    state = TrainState(gradcost.Objective(model, squares), estimator, SGD(1e-9))
    keys = iter(range(10**9))
    return lambda: state.step(batch, Key(next(keys)))


def against_weights(estimator: gradcost.Estimator) -> Make:
    def make(weights: float) -> Callable[[], object]:
        width = round(math.sqrt(weights / 4))
        return step_of(estimator, stack(width), torch.ones(64, width))

    return make


def against_batch(estimator: gradcost.Estimator) -> Make:
    return lambda batch: step_of(estimator, stack(512), torch.ones(int(batch), 512))


def against_length(estimator: gradcost.Estimator) -> Make:
    def make(length: float) -> Callable[[], object]:
        with seeded_generators(Key(0)):
            model = Gpt(layers=4, width=128, heads=4).build((int(length),), 64)
        return step_of(
            estimator, model, torch.randint(64, (4, int(length)), generator=torch.Generator().manual_seed(0))
        )

    return make


def noise(stream: Normals | Signs) -> Make:
    def make(count: float) -> Callable[[], object]:
        base = torch.zeros(int(count))
        return lambda: add_noise(stream, [1], [1.0], 0, base)

    return make


def fitted(xs: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Return the slope of log(seconds) against log(x), and the largest factor between a point and the line."""
    x, y = np.log(xs), np.log(seconds)
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(np.exp(np.abs(y - slope * x - intercept).max()))


def seconds_of(step: Callable[[], object], rounds: int) -> float:
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each point")
    parser.add_argument("--largest", type=float, default=1e8, help="the largest number of weights")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    weights = [10.0**k for k in range(5, 9) if 10.0**k <= options.largest]
    estimators = {
        "backprop()": gradcost.backprop(),
        "mezo()": gradcost.mezo(),
        "spsa()": gradcost.spsa(),
        "forward_gradient()": gradcost.forward_gradient(),
    }
    probes = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    sweeps: list[tuple[str, str, Sequence[float], Make]] = [
        ("Gaussian noise", "d", weights, noise(Normals())),
        ("random signs", "d", weights, noise(Signs())),
    ]
    sweeps += [(name, "d", weights, against_weights(each)) for name, each in estimators.items()]
    for name, of in (
        ("mezo(n)", lambda n: gradcost.mezo(probes=n)),
        ("forward_gradient(n)", gradcost.forward_gradient),
    ):
        sweeps.append((name, "n", probes, lambda n, of=of: step_of(of(int(n)), stack(256), torch.ones(64, 256))))
    sweeps += [
        (name, "batch", [32.0, 128.0, 512.0, 2048.0], against_batch(each)) for name, each in estimators.items()
    ]
    lengths = [64.0, 128.0, 256.0, 512.0]
    sweeps += [(name, "length", lengths, against_length(each)) for name, each in estimators.items()]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds} steps\n")
    print("| what | against | milliseconds | slope | residual |\n|---|---|---|---|---|")
    for name, axis, xs, make in sweeps:
        seconds = [seconds_of(make(x), options.rounds) for x in xs]
        slope, residual = fitted(xs, seconds)
        points = ", ".join(f"{x:g}: {1e3 * s:.3g}" for x, s in zip(xs, seconds, strict=True))
        print(f"| {name} | {axis} | {points} | {slope:.2f} | {residual:.2f} |", flush=True)


if __name__ == "__main__":
    main()
