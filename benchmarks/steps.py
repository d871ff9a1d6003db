"""Time one training step of each preset against the same step written without gradcost.

    python benchmarks/steps.py [--rounds 30]

Every round takes one step of everything in a new random order, so a slow minute of the machine slows all of them. A
ratio is taken within a round; the script prints its median and quartiles over the rounds. The peers:

- torch's backward and optimizer
- torch.utils.checkpoint around each block
- torch.func.jvp with a dictionary of tangents
- MeZO's published loop (Malladi et al. 2023, algorithm 1): seeded torch.normal per tensor, +eps, -2 eps, +eps, update

The bare forward runs without gradients.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gradcost
from gradcost import Key
from gradcost.core.blocks import find_blocks
from gradcost.core.isolation import seeded_generators
from gradcost.tasks.architectures import Architecture, Gpt, Mlp
from gradcost.tasks.task import Batch, cross_entropy

RATE = 1e-6
EPS = 1e-3
PEERS = {
    "backprop()": "torch backward",
    "checkpointed()": "torch checkpoint",
    "forward_gradient()": "torch.func.jvp",
    "spsa()": "MeZO's loop",
    "mezo()": "MeZO's loop",
}


class OneBatch:
    """A model that is trained on the same batch in every step."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch

    def objective(self, key: Key) -> gradcost.Objective:
        return gradcost.Objective(self.model, cross_entropy)

    def batch_at(self, key: Key, step: int) -> Batch:
        return self.batch


def mlp() -> tuple[Architecture, tuple[int, ...], int, Batch]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 28, 28, generator=generator)
    return Mlp((1024, 1024)), (1, 28, 28), 10, Batch(x, torch.randint(10, (64,), generator=generator))


def gpt() -> tuple[Architecture, tuple[int, ...], int, Batch]:
    tokens = torch.randint(96, (8, 129), generator=torch.Generator().manual_seed(0))
    return Gpt(layers=6, width=384, heads=6), (128,), 96, Batch(tokens[:, :-1], tokens[:, 1:])


def ours(estimator: gradcost.Estimator, model: nn.Module, batch: Batch) -> Callable[[], object]:
    steps = gradcost.train(OneBatch(model, batch), estimator, gradcost.SGD(RATE))
    return lambda: next(steps)


def bare(model: nn.Module, batch: Batch) -> Callable[[], object]:
    def step() -> Tensor:
        with torch.no_grad():
            return cross_entropy(model, batch)

    return step


def torch_backward(model: nn.Module, batch: Batch) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()

    return step


def torch_checkpoint(model: nn.Module, batch: Batch) -> Callable[[], object]:
    for block in find_blocks(model):
        forwards = [module.forward for module in block]

        def run_block(x: Tensor, forwards: Any = forwards) -> Tensor:
            for forward in forwards:
                x = forward(x)
            return x

        block[0].forward = lambda x, run_block=run_block: checkpoint(run_block, x, use_reentrant=False)  # type: ignore[method-assign]
        for module in block[1:]:
            module.forward = lambda x: x  # type: ignore[method-assign]
    return torch_backward(model, batch)


def torch_jvp(model: nn.Module, batch: Batch) -> Callable[[], object]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return cross_entropy(lambda x: functional_call(model, weights, (x,)), batch)  # type: ignore[arg-type]

    def step() -> None:
        tangents = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            slope: Any = jvp(loss, (parameters,), (tangents,))[1]
            for name, p in parameters.items():
                p.sub_(tangents[name] * (RATE * slope))

    return step


def mezo_loop(model: nn.Module, batch: Batch) -> Callable[[], object]:
    parameters = list(model.parameters())
    seeds = itertools.count()

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            p.data += scale * torch.normal(0.0, 1.0, size=p.shape)

    def step() -> None:
        seed = next(seeds)
        with torch.no_grad():
            perturb(seed, EPS)
            plus = cross_entropy(model, batch)
            perturb(seed, -2 * EPS)
            minus = cross_entropy(model, batch)
            perturb(seed, EPS)
            slope = ((plus - minus) / (2 * EPS)).item()
            perturb(seed, -RATE * slope)

    return step


def all_steps(make: Callable[[], nn.Module], batch: Batch) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "bare forward", bare(make(), batch)
    yield "torch backward", torch_backward(make(), batch)
    yield "torch checkpoint", torch_checkpoint(make(), batch)
    yield "torch.func.jvp", torch_jvp(make(), batch)
    yield "MeZO's loop", mezo_loop(make(), batch)
    for name in PEERS:
        estimator = getattr(gradcost, name.removesuffix("()"))()
        yield name, ours(estimator, make(), batch)


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step, one number per round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps.items()), random.Random(0).shuffle
    for number in range(rounds + 2):
        shuffle(order)  # a step is faster after one that leaves its caches warm
        for name, step in order:
            start = time.perf_counter()
            step()
            if number >= 2:  # the first two rounds are a warm-up
                times[name].append(time.perf_counter() - start)
    return times


def ratio(over: list[float], under: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each method, at least 2")
    rounds: int = parser.parse_args().rounds
    if rounds < 2:
        parser.error("--rounds is at least 2: the quartiles need two ratios.")
    warnings.simplefilter("ignore", gradcost.core.Note)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds; medians (quartiles)")
    for name, (architecture, inputs, classes, batch) in {"MLP, batch 64": mlp(), "GPT, batch 8 x 128": gpt()}.items():

        def make(
            architecture: Architecture = architecture, inputs: Any = inputs, classes: int = classes
        ) -> nn.Module:
            with seeded_generators(Key(0)):
                return architecture.build(inputs, classes)

        weights = sum(p.numel() for p in make().parameters())
        times = measure(dict(all_steps(make, batch)), rounds)
        print(f"\n{name}, {weights / 1e6:.2f}M weights\n")
        print("| step | ms | in bare forwards | to its peer |\n|---|---|---|---|")
        for step, seconds in times.items():
            peer = ratio(seconds, times[PEERS[step]]) + f" of {PEERS[step]}" if step in PEERS else ""
            ms = 1e3 * statistics.median(seconds)
            print(f"| {step} | {ms:.2f} | {ratio(seconds, times['bare forward'])} | {peer} |")


if __name__ == "__main__":
    main()
