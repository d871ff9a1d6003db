"""Weights that a loop changes in place between a forward pass and its backward pass: no wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from gradcost.checkpointing import Blocks, Saving, Schedule, Segments, Selective, checkpoint
from gradcost.checkpointing.versioned_tensor import RecomputationError
from gradcost.planning import Within

SAVINGS = [Blocks(), Segments(2), Schedule((((1,), 1), (2,))), Within(12_000)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.teacher, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.teacher.requires_grad_(False)
        self.scale, self.scales = torch.ones(8), [torch.ones(8)]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.teacher(x).sigmoid() * self.scale * self.scales[0]
        return torch.tanh(self.linear(self.norm(x))) * gate


def change(*paths: str) -> Callable[[nn.Module], None]:
    @torch.no_grad()
    def changed(block: nn.Module) -> None:
        for path in paths:
            owner, _, name = path.rpartition(".")
            value = getattr(block.get_submodule(owner), name)
            (value[0] if isinstance(value, list) else value).mul_(0.5)

    return changed


CHANGES = ["teacher.weight", "teacher.bias", "linear.bias", "scale", "scales", "norm.running_mean"]


def made() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4))), torch.randn(16, 8)


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize("saving", SAVINGS, ids=repr)
def test_a_weight_changed_before_the_backward_pass_is_refused(saving: Saving, path: str):
    model, x = made()
    for block in model:
        block.get_submodule("norm").train("running" not in path)
    with checkpoint(model, saving):
        model(x).square().mean().backward()
        loss = model(x).square().mean()
        change(path)(model[0])
        with pytest.raises(RuntimeError) as refused:
            loss.backward()
    if isinstance(refused.value, RecomputationError):
        assert f"`{path}` of a Block was changed in place" in str(refused.value)
    else:  # the schedule keeps this block, so torch checks the running statistics that the block saves
        assert "running" in path
        assert isinstance(saving, Within)
        assert "modified by an inplace operation" in str(refused.value)


def test_an_attribute_changed_before_the_backward_pass_is_refused_by_selective():
    class Scaled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x) * self.scale) * self.scale

    model, x = nn.Sequential(*(Scaled() for _ in range(4))), torch.randn(16, 8)
    with checkpoint(model, Selective()):
        loss = model(x).square().mean()
        change("scale")(model[2])
        with pytest.raises(RecomputationError):
            loss.backward()


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("saving", [*SAVINGS, Selective()], ids=repr)
def test_updates_after_or_during_the_backward_pass_are_those_of_a_plain_loop(saving: Saving, hooked: bool):
    def trained(context: Callable[[nn.Module], AbstractContextManager[object]]) -> list[Tensor]:
        model, x = made()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        @torch.no_grad()
        def move(parameter: Tensor) -> None:
            parameter.sub_(0.1 * parameter.grad)  # type: ignore[operator]
            parameter.grad = None

        for parameter in model.parameters() if hooked else ():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(move)
        with context(model):
            for _ in range(3):
                losses = [model(part).square().mean() for part in (x.split(16) if hooked else x.split(8))]
                for loss in losses:
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                for block in model:
                    change(*CHANGES)(block)
        return [*model.state_dict().values()]

    ours, theirs = trained(lambda model: checkpoint(model, saving)), trained(lambda model: nullcontext())
    assert all(map(torch.equal, ours, theirs))
