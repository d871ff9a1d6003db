"""Memory and time of a step: checkpointing policies against torch.compile's activation memory budget.

    python benchmarks/activation_budget.py [--rounds 15] [docs]

The model is a Llama of transformers with 8 blocks, width 128, batch 4 x 128, random weights. Peaks are the
allocator's own count of what a step requests beyond the weights and the batch. Times are medians; in every round each
row takes one step, in a new random order. torch.compile partitions the graph of the loss, and gradcost's policies
run eagerly, so each time is also divided by that of its own plain backpropagation: eager, or compiled with the full
budget. With a folder as argument, a picture is written to its folder `images`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradcost
from gradcost import Key, Objective, Reverse
from gradcost.checkpointing.policies import Saving
from gradcost.instruments import allocator
from gradcost.planning import Within
from gradcost.planning.within import MemoryTradeoff

BUDGETS = (1.0, 0.6, 0.4, 0.2, 0.0)
POINTS = 6  # of the frontier of Within


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=128,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def eager_step(objective: Objective, batch: Any, saving: Saving | None) -> None:
    """Take a gradient, each parameter's of which is dropped when it is complete."""
    estimator = Reverse() if saving is None else Reverse(saving)
    estimator.stream(objective, batch, Key(0), lambda name, gradient: None)


def compiled_step(function: Callable[..., Any], module: nn.Module, batch: Any) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    function(module, batch).backward()


def compiled(budget: float, batch: Any) -> Callable[[], None]:
    """Return a step of a new copy of the model, compiled with this activation memory budget."""
    import torch._functorch.config as config
    import torch._inductor.config as inductor

    inductor.force_disable_caches = True  # a cached graph would be that of another budget
    config.activation_memory_budget = budget
    module = model()
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    # A code object of its own, or the model would run the code that was compiled for another budget.
    own = types.FunctionType(loss.__code__.replace(co_name=f"loss_{budget}"), globals())
    step = partial(compiled_step, torch.compile(own, fullgraph=True), module, batch)
    step()  # compiles
    return step


def medians(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(some) for name, some in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    batch = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(1))
    objective = Objective(model(), loss)
    tradeoff = MemoryTradeoff(objective, batch)
    peaks = [point.peak for point in tradeoff.points]
    chosen = sorted({peaks[round(i * (len(peaks) - 1) / (POINTS - 1))] for i in range(POINTS)})
    savings: dict[str, Saving | None] = {
        "backprop()": None,
        "Reverse(Selective())": gradcost.checkpointing.Selective(),
    }
    savings["checkpointed()"] = gradcost.checkpointing.Blocks()
    savings |= {f"Within({budget / 1e6:.1f} MB)": Within(budget) for budget in chosen}
    steps: dict[str, Callable[[], None]] = {n: partial(eager_step, objective, batch, s) for n, s in savings.items()}
    steps |= {f"torch.compile, budget {budget}": compiled(budget, batch) for budget in BUDGETS}
    for step in steps.values():
        step()
    # `allocated` would also run each step under a dispatch mode, which compiled code does not support.
    memory = {name: max(allocator._totals(allocator._profiled_events(step))) / 1e6 for name, step in steps.items()}
    took = medians(steps, options.rounds)
    lines = ["| step | peak beyond the weights, MB | ms | time / own plain backprop |", "|:---|---:|---:|---:|"]
    rows = []
    for name in steps:
        own = took["torch.compile, budget 1.0" if name.startswith("torch") else "backprop()"]
        lines.append(f"| {name} | {memory[name]:.1f} | {took[name]:.0f} | {took[name] / own:.2f} |")
        kind = "torch.compile" if name.startswith("torch") else "gradcost"
        rows.append({"step": name, "MB": memory[name], "ms": took[name], "ratio": took[name] / own, "of": kind})
    print("\n".join(lines))
    if options.folder is not None:
        draw(rows, options.folder / "images" / "activation-budget.svg")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import altair

    chart = (
        altair.Chart(altair.Data(values=rows))
        .mark_point(filled=True, size=80)
        .encode(
            x=altair.X("MB:Q", title="peak of a step beyond the weights, MB"),
            y=altair.Y("ratio:Q", title="time / own plain backprop", scale=altair.Scale(zero=False)),
            color=altair.Color("of:N", title=None),
            shape=altair.Shape("of:N", title=None),
        )
    )
    chart.properties(width=560, height=320).save(str(path))


if __name__ == "__main__":
    main()
