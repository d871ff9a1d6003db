"""Laws 2, 5, 7 and 8 on models as people have them: transformers, convolutions, recurrence, derived weights.

The reference is torch alone: autograd on a copy of the model, with the generators seeded as an evaluation seeds them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradcost.checkpointing.policies import Blocks, Everything, Saving, Segments, Selective
from gradcost.core.errors import Unsupported
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Rademacher
from gradcost.estimators.estimator import Estimate, Estimator
from gradcost.estimators.gradient import Seeded
from gradcost.estimators.probing import Probing
from gradcost.estimators.reverse import Reverse
from gradcost.planning.within import MemoryTradeoff, Within
from gradcost.slopes.slope import CentralDifference, Jvp
from snapshot import differences, snapshot
from zoo import ZOO

KEY = Key(15)
SAVINGS: dict[str, Saving | None] = {
    "everything": Everything(),
    "blocks": Blocks(),
    "segments": Segments(2),
    "selective": Selective(),
    "within": None,  # a quarter of the way down from the peak of plain backprop to the least
}
PROBES: dict[str, tuple[Estimator, float]] = {  # with the tolerance, in units of |grad|
    "jvp": (Probing(Jvp(), Rademacher()), 1e-5),  # transformers computes norms and softmax in float32
    "jvp together": (Probing(Jvp(2), Rademacher(), 2), 1e-5),
    "difference": (Probing(CentralDifference(1e-4), Rademacher()), 2e-2),
}
# Refused, with a fragment of the sentence.
NO_FORWARD_RULE = "cannot be differentiated forward"
REFUSED: dict[tuple[str, str], str] = {
    (name, method): NO_FORWARD_RULE
    for name in ("weight_norm", "weight_norm_by_hooks", "wav2vec2_with_masked_spans")
    for method in ("jvp", "jvp together")
} | {
    ("bart_with_layerdrop", "within"): "reads values of a tensor",
    ("wav2vec2_with_masked_spans", "within"): "reads values of a tensor",
    ("mixtral", "within"): "reads values of a tensor",
    ("qwen2_vl", "within"): "fails on tensors without data",
    ("clip", "within"): "do not run once each",
}


def reference(name: str, has_cache: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradient by torch alone, on a model of its own, with or without a key-value cache."""
    objective, batch = ZOO[name]()
    for module in () if has_cache else objective.model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False  # type: ignore[union-attr]
    with seeded_generators(KEY.fold("part", 0)):
        loss = objective.loss(objective.model, batch)
    loss.backward()
    trainable = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
    return loss.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}


def undisturbed(estimator: Estimator, objective: Objective, batch: Any) -> Estimate:
    """An estimate that changes neither the model nor the batch, and that a second one repeats."""
    before, seen = snapshot(objective.model), copy.deepcopy(batch)
    estimates = [estimator.estimate(objective, batch, KEY) for _ in range(2)]
    assert differences(before, snapshot(objective.model)) == []
    for entry, original in zip(pytree.tree_leaves(batch), pytree.tree_leaves(seen), strict=True):
        assert torch.equal(entry, original) if isinstance(entry, Tensor) else entry == original
    assert torch.equal(estimates[0].loss, estimates[1].loss)
    return estimates[0]


def refused(name: str, method: str, objective: Objective, batch: Any, estimator: Estimator) -> bool:
    """Whether this pair is refused, as `REFUSED` says it is."""
    reason = REFUSED.get((name, method))
    if reason is None:
        assert estimator.objection(objective, batch) is None
        return False
    with pytest.raises(Unsupported, match=reason):
        estimator.estimate(objective, batch, KEY)
    return True


# Chains with breaks are searched by simulation; the other three are like a model that stays.
SLOW = {(name, "within") for name in ("t5", "whisper", "llama_with_lora", "bert", "gru")}
CELLS = [
    pytest.param(name, method, marks=[pytest.mark.slow] * ((name, method) in SLOW))
    for name in ZOO
    for method in SAVINGS
]


@pytest.mark.parametrize(("name", "method"), CELLS)
def test_every_policy_gives_the_bits_of_backpropagation(name: str, method: str):
    objective, batch = ZOO[name]()
    saving = SAVINGS[method]
    if saving is None:
        if (name, method) in REFUSED:
            with pytest.raises(Unsupported, match=REFUSED[name, method]):
                MemoryTradeoff(objective, batch)
            return
        Reverse(Blocks()).estimate(objective, batch, KEY)  # finds out whether blocks can run again
        trade = MemoryTradeoff(objective, batch)
        saving = Within((trade.peak(0) + 3 * trade.points[-1].peak) // 4)
    if refused(name, method, objective, batch, Reverse(saving)):
        return
    loss, gradient = reference(name)
    estimate = undisturbed(Reverse(saving), objective, batch)
    assert torch.equal(estimate.loss, loss)
    differing = [leaf for leaf, found in estimate.gradient.leaves() if not torch.equal(found, gradient[leaf])]
    if differing:  # recomputed blocks get no empty cache, and a kernel may round keys that one copied otherwise
        _, gradient = reference(name, has_cache=False)
        differing = [leaf for leaf, found in estimate.gradient.leaves() if not torch.equal(found, gradient[leaf])]
    assert differing == []


AUTOCAST = ("gpt2", "t5", "llama_with_lora", "resnet")  # by default; the others are slow


def in_float32(name: str) -> tuple[Objective, Any]:
    objective, batch = ZOO[name]()
    model = objective.model.float()

    def converted(entry: Any) -> Any:
        return entry.float() if isinstance(entry, Tensor) and entry.is_floating_point() else entry

    return Objective(model, objective.loss), pytree.tree_map(converted, batch)


@pytest.mark.parametrize("method", ["everything", "blocks", "segments", "selective"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in AUTOCAST else [pytest.mark.slow]) for name in ZOO]
)
def test_under_autocast_every_policy_gives_the_bits_of_backpropagation(name: str, method: str):
    saving = SAVINGS[method]
    assert saving is not None
    plain, batch = in_float32(name)
    with torch.autocast("cpu", torch.bfloat16):
        with seeded_generators(KEY.fold("part", 0)):
            loss = plain.loss(plain.model, batch)
        parameters = {name: p for name, p in plain.model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        objective, batch = in_float32(name)
        estimate = undisturbed(Reverse(saving), objective, batch)
    assert torch.equal(estimate.loss, loss.detach())
    expected = dict(zip(parameters, gradients, strict=True))
    for leaf, found in estimate.gradient.leaves():
        gradient = expected[leaf]
        assert torch.equal(found, torch.zeros_like(found) if gradient is None else gradient), leaf


@pytest.mark.parametrize("method", PROBES)
@pytest.mark.parametrize("name", ZOO)
def test_every_slope_is_that_of_the_gradient(name: str, method: str):
    objective, batch = ZOO[name]()
    estimator, tolerance = PROBES[method]
    if refused(name, method, objective, batch, estimator):
        return
    loss, gradient = reference(name)
    length = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    estimate = undisturbed(estimator, objective, batch)
    assert isinstance(estimate.gradient, Seeded)
    assert estimate.slopes is not None
    for seed, slope in zip(estimate.gradient.seeds, estimate.slopes, strict=True):
        z = dict(Seeded(objective, Rademacher(), (seed,), (1.0,)).leaves())
        assert abs(float(slope) - sum(float((z[n] * g).sum()) for n, g in gradient.items())) <= tolerance * length
    assert float(estimate.loss) == pytest.approx(float(loss), rel=1e-3)
