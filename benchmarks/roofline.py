"""Compare the roofline's time estimates with measurements.

    python benchmarks/roofline.py [--threads 1] [--samples 10]

The script calibrates the machine, forecasts a step of each method on fake tensors, and then times the step. It prints
one line per method: the estimate, the measured median, and estimate / measured. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import warnings

import torch

from gradcost import (
    SGD,
    Accumulated,
    Estimator,
    Key,
    Objective,
    Probing,
    Rademacher,
    backprop,
    checkpointed,
    forecast,
    forward_gradient,
    mezo,
    spsa,
)
from gradcost.core import Note
from gradcost.core.isolation import seeded_generators
from gradcost.instruments.measure import TrainingStep
from gradcost.instruments.timing import time_steps
from gradcost.noise.philox import Normals, Signs, Stream
from gradcost.planning.roofline import calibrate, seconds
from gradcost.tasks.architectures import Gpt, Mlp
from gradcost.tasks.task import Batch, cross_entropy

METHODS = (backprop(), checkpointed(), Accumulated(backprop(), 4), forward_gradient(), spsa(), mezo())


def mlp() -> tuple[Objective, Batch]:
    with seeded_generators(Key(0)):
        model = Mlp((1024, 1024)).build((1, 28, 28), 10)
        batch = Batch(torch.rand(64, 1, 28, 28), torch.randint(10, (64,)))
    return Objective(model, cross_entropy), batch


def gpt() -> tuple[Objective, Batch]:
    with seeded_generators(Key(0)):
        model = Gpt(layers=6, width=384, heads=6).build((128,), 96)
        tokens = torch.randint(96, (8, 129))
    return Objective(model, cross_entropy), Batch(tokens[:, :-1], tokens[:, 1:])


def stream_of(estimator: Estimator) -> Stream:
    signs = isinstance(estimator, Probing) and isinstance(estimator.directions, Rademacher)
    return Signs() if signs else Normals()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the calibration")
    parser.add_argument("--samples", type=int, default=10, help="timed steps per method")
    parser.add_argument("--attempts", type=int, default=3, help="measurements of a step until one is reliable")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", Note)
    rates = calibrate(seconds=arguments.seconds)
    print(f"torch {torch.__version__}")
    for name, rate in rates.rows():
        print(f"{name:<18}{rate}")
    for name, make in {"MLP, batch 64": mlp, "GPT, batch 8 x 128": gpt}.items():
        print(f"\n{name}\n\n| step | estimate ms | measured ms | estimate / measured | |\n|---|---|---|---|---|")
        for estimator in METHODS:
            counts = forecast(estimator, *make(), SGD(1e-6)).counts
            estimate = 1e3 * seconds(counts, rates, torch.float32, stream_of(estimator))
            steps = TrainingStep(*make(), estimator, SGD(1e-6))
            reading = time_steps(steps, arguments.samples, warmup=2, attempts=arguments.attempts)
            ratio = estimate / reading.median
            print(f"| {estimator} | {estimate:.2f} | {reading.median:.2f} | {ratio:.2f} | {reading.doubt or ''} |")


if __name__ == "__main__":
    main()
