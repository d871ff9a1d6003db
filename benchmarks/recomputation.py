"""Backpropagation of a 24-block GPT under ten memory budgets, against per-block checkpointing by torch.

    python benchmarks/recomputation.py > docs/recomputation.md

Peak memory is measured in a real step (`MemoryTracker`), and recomputation is counted (`OpCounter`). "optimal" is the
least recomputation of any nested schedule at that peak, by dynamic programming over the memory and FLOPs of the
blocks; a test checks it by brute force. Milliseconds are medians of interleaved steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradcost import Key, Objective, Reverse, backprop, checkpointed
from gradcost.checkpointing.optimal import cheapest
from gradcost.core.isolation import seeded_generators
from gradcost.instruments.flops import OpCounter
from gradcost.instruments.memory import MemoryTracker
from gradcost.planning import Within
from gradcost.planning.within import MemoryTradeoff
from gradcost.tasks.architectures import Gpt

LAYERS, WIDTH, LENGTH, BATCH, VOCABULARY, ROUNDS = 24, 128, 128, 4, 256, 11
KEY = Key(0)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def problem() -> tuple[Objective, Any]:
    with seeded_generators(Key(1)):
        model = Gpt(layers=LAYERS, width=WIDTH, heads=4).build((LENGTH,), VOCABULARY)
        words = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    return Objective(model, loss), (words[:, :-1].contiguous(), words[:, 1:].contiguous())


def step(objective: Objective, batch: Any, estimator: Reverse) -> None:
    estimator.stream(objective, batch, KEY, lambda name, gradient: None)


def peak_and_flops(objective: Objective, batch: Any, work: Callable[[], object]) -> tuple[int, int]:
    memory, counter = MemoryTracker(objective.model), OpCounter(objective.model)
    memory.register("inputs", batch)
    for instrument in (memory, counter):
        with instrument.followed():
            work()
    return memory.memory().peak, counter.counts.flops


def milliseconds(*works: Callable[[], None]) -> list[float]:
    times: list[list[float]] = [[] for _ in works]
    for number in range(ROUNDS + 1):
        for work, samples in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            if number:  # the first round is a warm-up
                samples.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(samples) for samples in times]


def mib(size: int) -> str:
    return f"{size / 2**20:.2f}"


def main() -> None:
    objective, batch = problem()
    tradeoff = MemoryTradeoff(objective, batch)
    most, flops = peak_and_flops(objective, batch, lambda: step(objective, batch, backprop()))
    forward = peak_and_flops(objective, batch, lambda: objective.evaluate(batch, KEY))[1]
    plain = dict(backprop().estimate(objective, batch, KEY).gradient.leaves())
    least = tradeoff.peak(0)

    print("# What a budget costs in recomputation\n")
    print(
        "Each row is one step of backprop with [`Within(budget)`](methods.md), the checkpointing schedule with the "
        f"fewest FLOPs within that budget. The model is a GPT of {LAYERS} blocks, width {WIDTH}, "
        f"{objective.dimension:,} weights; the batch is {BATCH} x {LENGTH} tokens "
        f"({torch.get_num_threads()} thread(s), torch {torch.__version__}). "
        "Written by `python benchmarks/recomputation.py`.\n\n"
        "- Peaks are of the whole step, weights included. Each parameter's gradient is used and freed before the "
        "next one.\n"
        f"- A forward is one forward pass without gradient: {forward:,} FLOPs. Backprop without recomputation takes "
        f"{flops / forward:.2f} forwards.\n"
        "- recomputed: counted in the real step. optimal: the least possible in the budget, from the dynamic "
        "program. Equal columns show that the step does what was planned.\n"
        "- same bits: the gradient is bitwise that of `backprop()`.\n"
        "- schedule: a number n is n blocks that save their activations. A tuple is a region that saves only its "
        "input and runs again in the backward pass. A 0 before a last 1 is one more part in which the region's last "
        "block runs again. -n is n blocks that save the outputs of their matrix products only.\n"
    )
    print("| budget, MiB | measured peak, MiB | recomputed, forwards | optimal | same bits | schedule |")
    print("|---:|---:|---:|---:|:---:|:---|")
    for tenth in range(10):
        budget = least + (most - least) * tenth // 9
        saving = Within(budget)
        estimator = Reverse(saving)
        peak, needed = peak_and_flops(objective, batch, partial(step, objective, batch, estimator))
        same = all(torch.equal(g, plain[n]) for n, g in estimator.estimate(objective, batch, KEY).gradient.leaves())
        best = cheapest(tradeoff.points, max(budget, tradeoff.points[0].peak))
        optimal = "–" if best is None else f"{best.flops / forward:.3f}"
        print(
            f"| {mib(budget)} | {mib(peak)} | {(needed - flops) / forward:.3f} | {optimal} "
            f"| {'yes' if same else 'NO'} | `{saving.schedule(objective, batch)}` |"
        )

    peer, _ = problem()
    for block in peer.model.blocks:  # type: ignore[union-attr]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch_peak, torch_flops = peak_and_flops(peer, batch, lambda: step(peer, batch, backprop()))
    ours = Reverse(Within(torch_peak))
    rows = {
        "backprop()": (objective, backprop()),
        "torch.utils.checkpoint, each block": (peer, backprop()),
        "checkpointed()": (objective, checkpointed()),
        "Within(that of torch.utils.checkpoint)": (objective, ours),
    }
    figures = {name: peak_and_flops(o, batch, partial(step, o, batch, e)) for name, (o, e) in rows.items()}
    times = milliseconds(*(partial(step, o, batch, e) for o, e in rows.values()))
    assert figures["torch.utils.checkpoint, each block"] == (torch_peak, torch_flops)
    print(
        f"\n## At the peak of per-block checkpointing\n\nThe times are medians of {ROUNDS} steps; the rows take "
        "turns. The last row's budget is the peak of torch.utils.checkpoint. \"time / torch's\" divides the time by "
        "that of torch.utils.checkpoint.\n"
    )
    print("| | peak, MiB | FLOPs, forwards | ms | time / torch's |\n|:---|---:|---:|---:|---:|")
    reference = times[list(rows).index("torch.utils.checkpoint, each block")]
    for (name, (peak, needed)), took in zip(figures.items(), times, strict=True):
        print(f"| {name} | {mib(peak)} | {needed / forward:.3f} | {took:.0f} | {took / reference:.3f} |")


if __name__ == "__main__":
    main()
