"""The changes of the options of `gradcost plan` that are tried when no exact gradient fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gradcost.cli import spec
from gradcost.cli.options import PlanOptions
from gradcost.core.objective import Objective
from gradcost.estimators.presets import backprop
from gradcost.integrations.transformers import has_adapters
from gradcost.planning.changes import Level, Setup
from gradcost.training.customary import optimizer_of

CHUNKS, RANK = 16, 8
OPTIMIZERS = ("SGD(lr=0.1, momentum=0.9)", "SGD(lr=0.1)")  # by falling state
EIGHT_BIT = "AdamW8bit(lr=0.001)"  # with the state of 16-bit momentum

Make = Callable[[PlanOptions], tuple[Objective, Any]]


def levels(options: PlanOptions, objective: Objective, batch: Any, make: Make) -> Iterator[Level]:
    """Yield levels of changes, the smallest first.

    1. The head and the loss in chunks: the gradient stays the same up to rounding.
    2. An optimizer with less state. 3. Weights in 16 bits. 4. LoRA. 5. LoRA, and frozen weights in 4 bits.

    Args:
        options: the options as given.
        objective: the objective that they make.
        batch: the batch that they make.
        make: makes an objective and a batch from options.
    """
    is_language = isinstance(batch, Tensor) and options.task is None and options.data is None
    chunks = {"chunks": str(CHUNKS)} if is_language and options.chunks is None else {}

    def level(*changes: Mapping[str, str]) -> Level:
        for change in changes:
            for each in (change, {**change, **chunks})[: 2 if chunks else 1]:
                yield each, partial(setup, options, each, make)

    if chunks:
        yield [(chunks, partial(setup, options, chunks, make))]
    has_eight_bit = find_spec("bitsandbytes") and not options.optimizer.startswith("AdamW8bit")
    optimizers = (EIGHT_BIT, *OPTIMIZERS) if has_eight_bit else OPTIMIZERS
    if not options.optimizer.startswith("SGD"):
        yield level(*({"optimizer": optimizer} for optimizer in optimizers))
    if options.dtype is None and options.task is None and _are_wide(objective):
        wide = {"dtype": "bfloat16"}
        yield level(wide, *({**wide, "optimizer": optimizer} for optimizer in optimizers))
    lora = {} if options.lora is not None or has_adapters(objective.model) else {"lora": str(RANK)}
    if lora and options.task is None:
        yield level(lora)
    if options.bits is None and options.task is None:
        yield level({**lora, "bits": "4"})


def setup(options: PlanOptions, change: Mapping[str, str], make: Make) -> Setup:
    """Return what is trained under changed options."""
    numbers = {name: int(value) if value.isdecimal() else value for name, value in change.items()}
    changed = replace(options, **numbers)
    optimizer = optimizer_of(spec.optimizer_or_customary(changed.optimizer), backprop())
    return Setup(*make(changed), optimizer)


def _are_wide(objective: Objective) -> bool:
    return any(leaf.parameter.dtype == torch.float32 for leaf in objective.leaves)
