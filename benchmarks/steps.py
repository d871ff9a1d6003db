"""Time one training step of each method against the same step written without gradcost.

    python benchmarks/steps.py [--rounds 30] [--models mlp gpt smollm2 lora]

Every round takes two steps of everything in a new random order, so a slow minute of the machine slows all of them.
The second of the two is timed: in training, the step before has left the caches as the next one finds them. A ratio
is taken within a round; the script prints its median and quartiles over the rounds. The peers:

- torch's backward and optimizer
- torch.utils.checkpoint around each block
- torch.func.jvp with a dictionary of tangents; torch.func.vmap over it for 8 directions
- MeZO's published loop (Malladi et al. 2023, algorithm 1): seeded torch.normal per tensor, +eps, -2 eps, +eps, update

The peers perturb the trained weights only. The bare forward runs without gradients. "products", "noise", "other": the
shares of a step's time in matrix products and attention, in the kernels that draw directions, and in all other
operations, by torch's profiler in one more step; the rest is Python, which the profiler makes slower. smollm2: a
Llama of SmolLM2-135M's shapes with random weights, batch 1 x 64; lora: the same with adapters of rank 8 on q_proj and
v_proj (needs the extra `transformers`).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

import gradcost
from gradcost import Key
from gradcost.core.blocks import find_blocks
from gradcost.core.isolation import seeded_generators
from gradcost.noise import add
from gradcost.tasks.architectures import Architecture, Gpt, Mlp
from gradcost.tasks.task import Batch, cross_entropy

RATE = 1e-6
EPS = 1e-3
LOOP, LOOP_8, JVP, VMAP = "MeZO's loop", "MeZO's loop, n = 8", "torch.func.jvp", "vmap of jvp, n = 8"
# A method as an expression of the names of gradcost, and its peer.
METHODS = {
    "backprop()": "torch backward",
    "checkpointed()": "torch checkpoint",
    "mezo()": LOOP,
    "spsa()": LOOP,
    "mezo(probes=8)": LOOP_8,
    "spsa(probes=8)": LOOP_8,
    "fzoo(probes=8)": LOOP_8,
    "forward_gradient()": JVP,
    "Probing(Jvp(), directions.Rademacher())": JVP,
    "forward_gradient(8)": VMAP,
    "forward_gradient(8, together=1)": VMAP,
    "Probing(Jvp(8), directions.LowRank(1), 8)": VMAP,
}
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot")} | {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}
LARGE = ("backprop()", "checkpointed()", "mezo()", "spsa()", "forward_gradient()")  # of the models of 135M weights


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

        def run_block(x: Tensor, *args: Any, forwards: Any = forwards, **kwargs: Any) -> Tensor:
            for forward in forwards:
                x = forward(x, *args, **kwargs)
            return x

        block[0].forward = functools.partial(checkpoint, run_block, use_reentrant=False)  # type: ignore[method-assign]
        for module in block[1:]:
            module.forward = lambda x, *_, **__: x  # type: ignore[method-assign]
    return torch_backward(model, batch)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def torch_jvp(model: nn.Module, batch: Batch) -> Callable[[], object]:
    parameters = trained(model)
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


def torch_vmap(model: nn.Module, batch: Batch, probes: int = 8) -> Callable[[], object]:
    parameters = trained(model)
    generator = torch.Generator().manual_seed(0)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return cross_entropy(lambda x: functional_call(model, weights, (x,)), batch)  # type: ignore[arg-type]

    def step() -> None:
        tangents = {name: torch.randn((probes, *p.shape), generator=generator) for name, p in parameters.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            slopes: Any = torch.func.vmap(lambda tangent: jvp(loss, (parameters,), (tangent,))[1])(tangents)
            for name, p in parameters.items():
                p.sub_(torch.tensordot(slopes, tangents[name], 1), alpha=RATE / probes)

    return step


def mezo_loop(model: nn.Module, batch: Batch, probes: int = 1) -> Callable[[], object]:
    parameters = list(trained(model).values())
    seeds = itertools.count()

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            p += scale * torch.normal(0.0, 1.0, size=p.shape)

    def step() -> None:
        slopes = {}
        with torch.no_grad():
            for seed in (next(seeds) for _ in range(probes)):
                perturb(seed, EPS)
                plus = cross_entropy(model, batch)
                perturb(seed, -2 * EPS)
                minus = cross_entropy(model, batch)
                perturb(seed, EPS)
                slopes[seed] = ((plus - minus) / (2 * EPS)).item()
            for seed, slope in slopes.items():
                perturb(seed, -RATE / probes * slope)

    return step


PEERS: dict[str, Callable[[nn.Module, Batch], Callable[[], object]]] = {
    "torch backward": torch_backward,
    "torch checkpoint": torch_checkpoint,
    LOOP: mezo_loop,
    LOOP_8: functools.partial(mezo_loop, probes=8),
    JVP: torch_jvp,
    VMAP: torch_vmap,
}


def all_steps(
    make: Callable[[], nn.Module], batch: Batch, methods: Iterable[str]
) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "bare forward", bare(make(), batch)
    for peer in dict.fromkeys(METHODS[method] for method in methods):
        yield peer, PEERS[peer](make(), batch)
    names = {name: getattr(gradcost, name) for name in (*gradcost.__all__, "directions")}
    for method in methods:
        yield method, ours(eval(method, names), make(), batch)


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step, one number per round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps.items()), random.Random(0).shuffle
    for number in range(rounds + 2):
        shuffle(order)  # a step is faster after one that leaves its caches warm
        for name, step in order:
            step()
            start = time.perf_counter()
            step()
            if number >= 2:  # the first two rounds are a warm-up
                times[name].append(time.perf_counter() - start)
    return times


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Return the shares of one step's time in products, noise and other operations."""
    kernel = add.fused

    def recorded(*args: Any) -> None:
        with record_function("noise"):
            kernel(*args)

    add.fused = recorded
    try:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as events:
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
    finally:
        add.fused = kernel
    found = {"products": 0.0, "noise": 0.0, "other": 0.0}
    for event in events.key_averages():
        kind = "products" if event.key in PRODUCTS else "noise" if event.key == "noise" else "other"
        found[kind] += event.self_cpu_time_total / 1e6 / seconds
    return found


def ratio(over: list[float], under: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def smollm2(rank: int | None) -> tuple[Callable[[], nn.Module], Batch]:
    transformers: Any = importlib.import_module("transformers")
    peft: Any = importlib.import_module("peft")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        use_cache=False,
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = transformers.LlamaForCausalLM(config)
            if rank is not None:
                adapters = peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])
                self.language_model = peft.get_peft_model(self.language_model, adapters)

        def forward(self, x: Tensor) -> Tensor:
            return self.language_model(input_ids=x).logits

    tokens = torch.randint(49152, (1, 65), generator=torch.Generator().manual_seed(0))
    return Logits, Batch(tokens[:, :-1], tokens[:, 1:])


def built(name: str) -> tuple[str, Callable[[], nn.Module], Batch, Sequence[str]]:
    """Return (title, a function that makes the model, batch, methods)."""
    if name in ("smollm2", "lora"):
        make, batch = smollm2(None if name == "smollm2" else 8)
        return f"SmolLM2-135M{' with LoRA r = 8' if name == 'lora' else ''}, batch 1 x 64", make, batch, LARGE
    architecture, inputs, classes, batch = mlp() if name == "mlp" else gpt()
    title = "MLP, batch 64" if name == "mlp" else "GPT, batch 8 x 128"
    return title, lambda: architecture.build(inputs, classes), batch, list(METHODS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each method, at least 2")
    parser.add_argument("--models", nargs="+", default=["mlp", "gpt"], choices=["mlp", "gpt", "smollm2", "lora"])
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds is at least 2: the quartiles need two ratios.")
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {options.rounds} rounds; medians (quartiles)")
    for title, make, batch, methods in map(built, options.models):

        def seeded(make: Callable[[], nn.Module] = make) -> nn.Module:
            with seeded_generators(Key(0)):
                return make()

        weights = sum(weight.numel() for weight in trained(seeded()).values())
        steps = dict(all_steps(seeded, batch, methods))
        times = measure(steps, options.rounds)
        print(f"\n{title}, {weights / 1e6:.2f}M trained weights\n")
        print(
            "| step | ms | in bare forwards | products | noise | other | to its peer |\n|---|---|---|---|---|---|---|"
        )
        for step, seconds in times.items():
            peer = ratio(seconds, times[METHODS[step]]) + f" of {METHODS[step]}" if step in METHODS else ""
            parts = " | ".join(f"{share:.0%}" for share in shares(steps[step]).values())
            ms = 1e3 * statistics.median(seconds)
            print(f"| {step} | {ms:.2f} | {ratio(seconds, times['bare forward'])} | {parts} | {peer} |", flush=True)


if __name__ == "__main__":
    main()
