"""Evaluations in which the weights carry tangents: forward-mode differentiation without a graph."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.core.errors import Unsupported
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.notes import Note
from gradcost.core.objective import Leaf, Objective
from gradcost.core.precision import LOSSES_IN_FLOAT32
from gradcost.directions import Directions
from gradcost.directions.direction import combination, touches
from gradcost.directions.low_rank import Factored, Factors
from gradcost.slopes.low_rank_linear import Products, passes_its_weight_on
from gradcost.slopes.substitution import substituted


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

    def tangent(draw: Callable[[int], Tensor]) -> Tensor:
        if index is None:
            return tag("tangents", draw(seeds[0]))
        with temporarily_clear_interpreter_stack():  # a tensor made at a functorch level has no memory to fill
            stack = torch.stack([tag("tangents", draw(seed)) for seed in seeds])
        return stack.index_select(0, index.reshape(1)).squeeze(0)

    whole, spared = False, False

    def make(leaf: Leaf) -> Tensor:
        nonlocal spared
        if not (whole or touches(directions, leaf, seeds)):
            spared = True
            return leaf.parameter.detach()
        along = tangent(lambda seed: combination(directions, leaf, [seed], [1.0]))
        return carrying(leaf.name, leaf.parameter.detach(), along)

    with ExitStack() as nets:
        nets.enter_context(sdpa_kernel(SDPBackend.MATH))
        rules = _RULES if index is None else _RULES | _RULES_UNDER_VMAP
        if isinstance(directions, Factored):
            nets.enter_context(substituted(objective, make, rules, passes_its_weight_on))

            def factors(leaf: Leaf) -> Factors:
                side_by_side = tangent(lambda seed: torch.cat(directions.factors(leaf, seed), dim=1))
                return Factors(*side_by_side.split(list(leaf.parameter.shape), dim=1))

            nets.enter_context(Products(objective, factors, carrying))
        else:
            nets.enter_context(substituted(objective, make, rules))
        loss = objective.evaluate(batch, key)
        if spared and forward_ad.unpack_dual(loss).tangent is None:
            # Either the loss depends on none of the leaves that are reached, and the slope is 0, or its tangent was
            # cut, and it never has one: with zeros for the leaves that were spared the two differ.
            whole = True
            loss = objective.evaluate(batch, key)
    if forward_ad.unpack_dual(loss).tangent is None:
        raise Unsupported(
            "the loss came out without a tangent: it does not depend on the trainable parameters by a "
            "differentiable path (.data, .detach() or .item() inside the model or the loss cut it)."
        )
    return loss


def carrying(name: str, primal: Tensor, tangent: Tensor) -> Tensor:
    """The tensor of this name with a tangent.

    Raises: ValueError where the tangent would be lost.
    """
    if not torch._C._is_fwd_grad_enabled():
        raise Unsupported(
            f"`{name}` is used inside a custom autograd.Function (reentrant checkpointing is one), where "
            "forward-mode differentiation is off and its tangent would be lost. Use use_reentrant=False, "
            "call the operation outside the function, or take mezo(), which needs no derivative."
        )
    return forward_ad.make_dual(primal, tangent)


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


def _normalizing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A normalisation whose arguments all have tangents or none: PyTorch's rules put in tensors of zeros that are no
    memory where one is missing (a frozen weight), and those have no likeness among fake tensors."""

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        def dual(argument: Any) -> bool:
            return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None

        def filled(argument: Any) -> Any:
            wanted = isinstance(argument, Tensor) and argument.is_floating_point() and not dual(argument)
            return forward_ad.make_dual(argument, torch.zeros_like(argument)) if wanted else argument

        if not any(map(dual, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        return function(*map(filled, args), **{name: filled(argument) for name, argument in kwargs.items()})

    return rule


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


_RULES = {F.layer_norm: _normalizing(F.layer_norm), F.group_norm: _normalizing(F.group_norm)}
_RULES |= {F.linear: _linear, F.scaled_dot_product_attention: _attention} | LOSSES_IN_FLOAT32
_RULES_UNDER_VMAP = {F.batch_norm: _batch_norm, F.dropout: _dropout, torch.dropout: _dropout}


# Frames that a user cannot change: the line that failed is the innermost one outside of them.
_OURS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


class Blocked(NamedTuple):
    """Where an evaluation with tangents failed: the innermost module (None: outside of all), the line, why."""

    module: str | None
    line: str
    reason: str


def blocked(model: nn.Module, attempt: Callable[[], object]) -> Blocked | None:
    """Try an evaluation with tangents; None when it succeeds."""
    failed: list[str] = []
    with _failing_module(model, failed):
        try:
            attempt()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
            line = (frames[-1].line or "") if frames else ""
            return Blocked(failed[0] if failed else None, line, str(error).split("\n")[0].rstrip("."))
    return None


def failure(model: nn.Module, attempt: Callable[[], object]) -> str | None:
    """Try an evaluation with tangents; where it fails, a sentence with the module, the operator and the way out."""
    found = blocked(model, attempt)
    if found is None:
        return None
    where = "the loss" if found.module is None else f"`{found.module or type(model).__name__}`"
    return (
        f"{where} cannot be differentiated forward, at `{found.line}`: {found.reason}. For attention use "
        'attn_implementation="eager"; otherwise mezo(), which needs no derivative, or backprop().'
    )


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
