"""Evaluations in which the weights carry tangents: forward-mode differentiation without a graph."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.directions import Directions, combination
from gradcost.key import Key
from gradcost.objective import Leaf, Objective
from gradcost.substitute import substituted
from gradcost.watch import tell


class Note(UserWarning):
    """Something that a method does on the user's behalf and says once."""


def differentiate(
    objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The loss and its slopes along all of `seeds`, in one forward whose tangents are alive together."""
    if len(seeds) == 1:
        with forward_ad.dual_level():
            loss, slope = forward_ad.unpack_dual(_evaluate(objective, batch, key, directions, seeds, None))
        assert slope is not None
        return loss, slope.reshape(1)

    # vmap carries the index of the direction: the primal is computed once, each tangent in a stack of them.
    # Inside vmap a dual exists only at a functorch level, which jvp opens; its own argument is of no use.
    def slope_of(index: Tensor) -> tuple[Tensor, Tensor]:
        def loss_of(_: Tensor) -> Tensor:
            return _evaluate(objective, batch, key, directions, seeds, index)

        nothing = torch.zeros(())
        loss, slope = torch.func.jvp(loss_of, (nothing,), (nothing,))  # pyright: ignore[reportAssignmentType]
        return loss, slope

    indices = torch.arange(len(seeds), device=objective.leaves[0].parameter.device)
    losses, slopes = torch.func.vmap(slope_of, randomness="same")(indices)
    return losses[0], slopes


def _evaluate(
    objective: Objective,
    batch: Any,
    key: Key,
    directions: Directions,
    seeds: Sequence[int],
    index: Tensor | None,
) -> Tensor:
    """The loss, a dual. Under vmap, `index` says which of the seeds is this one's."""

    def tangent(leaf: Leaf) -> Tensor:
        if index is None:
            return tell("tangents", combination(directions, leaf, seeds, [1.0]))
        with temporarily_clear_interpreter_stack():  # a tensor made at a functorch level has no memory to fill
            stack = torch.stack([tell("tangents", combination(directions, leaf, [seed], [1.0])) for seed in seeds])
        return stack.index_select(0, index.reshape(1)).squeeze(0)

    def make(leaf: Leaf) -> Tensor:
        if not torch._C._is_fwd_grad_enabled():
            raise ValueError(
                f"`{leaf.name}` is used inside a custom autograd.Function (reentrant checkpointing is one), where "
                "forward-mode differentiation is off and its tangent would be lost. Use use_reentrant=False, "
                "call the operation outside the function, or take mezo(), which needs no derivative."
            )
        return forward_ad.make_dual(leaf.parameter.detach(), tangent(leaf))

    rules = _RULES if index is None else _RULES | _RULES_UNDER_VMAP
    with sdpa_kernel(SDPBackend.MATH), substituted(objective, make, rules):
        loss = objective.evaluate(batch, key)
    if forward_ad.unpack_dual(loss).tangent is None:
        raise ValueError(
            "the loss came out without a tangent: it does not depend on the trainable parameters by a "
            "differentiable path (.data, .detach() or .item() inside the model or the loss cut it)."
        )
    return loss


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for duals with the matmuls that are needed and no more: PyTorch's own rule multiplies by the
    zeros of a tangent that is not there."""
    x, dx = forward_ad.unpack_dual(input)
    w, dw = forward_ad.unpack_dual(weight)
    b, db = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    out = F.linear(x, w, b)
    tangent = None if dw is None else F.linear(x, dw, db)
    if dx is not None:
        along_input = F.linear(dx, w, db if dw is None else None)
        tangent = along_input if tangent is None else tangent.add_(along_input)
    elif tangent is None and db is not None:
        tangent = db.expand(out.shape).clone()
    return out if tangent is None else forward_ad.make_dual(out, tangent)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    _say_math_attention()
    return F.scaled_dot_product_attention(*args, **kwargs)


@functools.cache
def _say_math_attention() -> None:
    warnings.warn(
        "attention runs on the math kernel while a Jvp slope is measured: the fused kernels have no forward rule.",
        Note,
        stacklevel=2,
    )


def _batch_norm(input: Tensor, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any) -> Tensor:
    """In training the running statistics are written, not read, and functorch cannot write them: the buffers
    of an evaluation are copies that are dropped, so nothing is lost."""
    training = args[2] if len(args) > 2 else kwargs.get("training", False)
    statistics = (None, None) if training else (running_mean, running_var)
    return F.batch_norm(input, *statistics, *args, **kwargs)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
) -> Tensor:
    """The mask that an evaluation outside vmap draws: functorch would draw it in another memory order."""
    if not (training and train) or p == 0:  # `train` is torch.dropout's name for F.dropout's `training`
        return input
    plain = input
    while functorch.is_functorch_wrapped_tensor(plain):
        plain = functorch.get_unwrapped(plain)
    mask = torch.empty_like(plain).bernoulli_(1 - p)
    return input * (mask if p == 1 else mask.div_(1 - p))


_RULES = {F.linear: _linear, F.scaled_dot_product_attention: _attention}
_RULES_UNDER_VMAP = {F.batch_norm: _batch_norm, F.dropout: _dropout, torch.dropout: _dropout}


# Frames that a user cannot change: the line that failed is the innermost one outside of them.
_OURS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


def failure(model: nn.Module, attempt: Callable[[], object]) -> str | None:
    """Try an evaluation with tangents; where it fails, a sentence with the module, the operator and the way out."""
    failed: list[str] = []
    with _failing_module(model, failed):
        try:
            attempt()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            where = f"`{failed[0] or type(model).__name__}`" if failed else "the loss"
            frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
            line = frames[-1].line if frames else ""
            reason = str(error).split("\n")[0].rstrip(".")
            return (
                f"{where} cannot be differentiated forward, at `{line}`: {reason}. For attention use "
                'attn_implementation="eager"; otherwise mezo(), which needs no derivative, or backprop().'
            )
    return None


@contextmanager
def _failing_module(model: nn.Module, failed: list[str]) -> Iterator[None]:
    """Within, the name of the innermost module whose forward raises is put into `failed`."""

    def watch(name: str, module: nn.Module) -> list[Any]:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            # A hook that is always called gets no output after a raise; the innermost module leaves first.
            if output is None and not failed:
                failed.append(name)

        return [module.register_forward_hook(leave, always_call=True)]

    handles = [handle for name, module in model.named_modules() for handle in watch(name, module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
