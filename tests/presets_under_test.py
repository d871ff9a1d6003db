"""Every public preset with arguments for a small task, and the optimizers that it is combined with in tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost import SGD, Adam, AdamW, Key, Objective
from gradcost.core.value import value
from gradcost.estimators import presets
from gradcost.tasks.architectures import Architecture, Mlp
from gradcost.tasks.task import Split, Splits, Task
from gradcost.training import Nesterov


@value
class Points(Task):
    """Random points; the class of a point is its largest coordinate. An example of class c has c + 1 tokens.

    It is loaded without scikit-learn, whose import takes seconds.
    """

    model: Architecture = Mlp((32,))
    batch: int = 32
    models: ClassVar[dict[str, Architecture]] = {}

    @property
    def inputs(self) -> tuple[int, ...]:
        return (10,)

    @property
    def classes(self) -> int:
        return 10

    def splits(self) -> Splits:
        return _splits()

    def objective(self, key: Key) -> Objective:
        return Objective(super().objective(key).model, loss, data=self.once_through)

    def once_through(self) -> Iterator[Any]:
        return map(with_mask, super().once_through())

    def batch_at(self, key: Key, step: int) -> Any:
        return with_mask(super().batch_at(key, step))


@lru_cache(maxsize=1)
def _splits() -> Splits:
    x = torch.randn(600, 10, generator=torch.Generator().manual_seed(1))
    return Splits(*(Split(part, part.argmax(1)) for part in x.split(200)))


def with_mask(batch: Split) -> dict[str, Tensor]:
    return {"x": batch.x, "y": batch.y, "attention_mask": (torch.arange(11) <= batch.y.unsqueeze(1)).long()}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


METHODS = {
    "backprop": gradcost.backprop(),
    "checkpointed": gradcost.checkpointed(),
    "forward_gradient": gradcost.forward_gradient(),
    "spsa": gradcost.spsa(),
    "mezo": gradcost.mezo(),
    "zo_svrg": gradcost.zo_svrg(every=7),
    "zo_sgd_sign": gradcost.zo_sgd_sign(),
    "fzoo": gradcost.fzoo(),
    "multi_tangent": gradcost.multi_tangent(),
    "hizoo": gradcost.hizoo(),
    "activity_perturbation": gradcost.activity_perturbation(),
    "addax": gradcost.addax(longest=5),
}
OPTIMIZERS = {"SGD": SGD(1e-3), "Nesterov": Nesterov(1e-3), "Adam": Adam(1e-3), "AdamW": AdamW(1e-3)}


def public_presets() -> set[str]:
    """The names of all presets of the package."""
    public = {name for name, each in vars(presets).items() if getattr(each, "__module__", "") == presets.__name__}
    return {name for name in public if not name.startswith("_")}
