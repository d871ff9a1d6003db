"""Measure the error of finite-difference slopes in half precision and write docs/precision.md.

    python benchmarks/precision.py

The models are a small GPT and a small Llama with LoRA adapters, fresh and trained for 60 steps. The error of a slope
is |slope - <grad, z>| / |grad|, with z of random signs and grad computed in float64 at the same weights. Each figure
is the median over 24 directions.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gradcost import Key, Objective, backprop
from gradcost.core.errors import BadInput
from gradcost.core.isolation import seeded_generators
from gradcost.core.precision import central_eps
from gradcost.directions import Rademacher
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import Probing
from gradcost.slopes.rounding_check import loss_noise
from gradcost.slopes.slope import CentralDifference, Jvp, Slope, shifted
from gradcost.tasks.architectures import Gpt
from gradcost.tasks.task import Batch, cross_entropy

PAGE = Path(__file__).parent.parent / "docs" / "precision.md"
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
DIRECTIONS = 24
Around = Callable[[], AbstractContextManager[Any]]


class Case(NamedTuple):
    """A model at some weights, with the context in which its loss is evaluated."""

    name: str
    objective: Objective
    batch: Any
    around: Around


def bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def trained(model: nn.Module, loss: Any, batch: Any, steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def gpt(steps: int) -> tuple[nn.Module, Batch]:
    with seeded_generators(Key(0)):
        model, words = Gpt(layers=4, width=64, heads=4).build((32,), 64), torch.randint(64, (4, 33))
    batch = Batch(words[:, :-1], words[:, 1:])
    trained(model, cross_entropy, batch, steps)
    return model, batch


def own_loss(model: nn.Module, batch: Any) -> Any:
    return model(**batch).loss


def adapters(rank: int, steps: int) -> tuple[nn.Module, Any]:
    """LoRA adapters on a Llama that was trained for 60 steps on another batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded_generators(Key(0)):
        widths: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
        }
        model = LlamaForCausalLM(LlamaConfig(**widths, vocab_size=64))
        before, batch = ({"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (2, 4, 32)))
        trained(model, own_loss, before, 60)
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(model, lora)
    trained(adapted, own_loss, batch, steps)
    return adapted, batch


class WithoutAutocast(nn.Module):
    """A layer that computes in the dtype of its weights inside autocast."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.layer(x.to(self.layer.weight.dtype))


def with_float32_head(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    name, head = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    setattr(model, name, WithoutAutocast(head))  # the last layer is an attribute of the model itself
    return model


def cases() -> list[Case]:
    found = []
    for steps, state in ((0, "fresh"), (60, "trained")):
        model, batch = gpt(steps)
        for name, dtype, around in (
            ("float32", torch.float32, nullcontext),
            ("autocast to bfloat16", torch.float32, bfloat16),
            ("bfloat16 weights", torch.bfloat16, nullcontext),
            ("float16 weights", torch.float16, nullcontext),
        ):
            cast = copy.deepcopy(model).to(dtype)
            found.append(Case(f"GPT, {state}, {name}", Objective(cast, cross_entropy), batch, around))
        head = Objective(with_float32_head(model), cross_entropy)
        found.append(Case(f"GPT, {state}, autocast, last layer in float32", head, batch, bfloat16))
    for rank, steps, state in ((4, 0, "fresh"), (4, 60, "trained"), (16, 60, "trained")):
        model, batch = adapters(rank, steps)
        for name, around in (("float32", nullcontext), ("autocast to bfloat16", bfloat16)):
            found.append(Case(f"LoRA rank {rank}, {state}, {name}", Objective(model, own_loss), batch, around))
    return found


def errors(case: Case, slopes: list[Slope]) -> list[float]:
    """The median error of each slope, in units of |grad|."""
    exact = Objective(copy.deepcopy(case.objective.model).double(), case.objective.loss)
    gradient = dict(backprop().estimate(exact, case.batch, Key(0)).gradient.leaves())
    length = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    medians = []
    for slope in slopes:
        found = []
        for number in range(DIRECTIONS):
            try:
                with case.around():
                    estimate = Probing(slope, Rademacher()).estimate(case.objective, case.batch, Key(number))
            except BadInput:  # the slope overflowed
                found.append(math.nan)
                continue
            assert isinstance(estimate.gradient, Seeded)
            assert estimate.slopes is not None
            z = dict(Seeded(exact, Rademacher(), estimate.gradient.seeds, (1.0,)).leaves())
            true = sum(float((z[name] * g).sum()) for name, g in gradient.items())
            found.append(abs(float(estimate.slopes[0]) - true) / length)
        medians.append(statistics.median(found))
    return medians


def noise(case: Case, eps: float) -> float:
    """The median rounding error of the loss over 8 directions."""

    def of(seed: int) -> float:
        with case.around():
            steps = [eps * (1 + step / 16) for step in range(7)]
            return loss_noise(
                [float(shifted(case.objective, case.batch, Key(0), Rademacher(), seed, step)) for step in steps]
            )

    return statistics.median(of(seed) for seed in range(8))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for case in cases():
        with case.around():
            eps = central_eps(case.objective)
        slopes: list[Slope] = [Jvp(), *(CentralDifference(eps * factor) for factor in FACTORS)]
        figures = [f"{error:.2g}" for error in errors(case, slopes)]
        with torch.no_grad():
            loss = float(case.objective.loss(case.objective.model, case.batch))
        rows.append(f"| {case.name} | {loss:.3g} | {noise(case, eps):.1e} | {eps:.1e} | {' | '.join(figures)} |")
        print(rows[-1], flush=True)
    titles = " | ".join("**eps**" if factor == 1 else f"{factor:g} eps" for factor in FACTORS)
    table = [f"| case | loss | noise | eps | Jvp | {titles} |", "|---" * (5 + len(FACTORS)) + "|", *rows]
    text = PAGE.read_text()
    start, end = text.index("<!-- table -->"), text.index("<!-- end -->")
    PAGE.write_text(text[:start] + "<!-- table -->\n\n" + "\n".join(table) + "\n\n" + text[end:])


if __name__ == "__main__":
    main()
