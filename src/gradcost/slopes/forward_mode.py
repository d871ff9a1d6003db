"""Forward-mode differentiation: evaluate the loss with a tangent on each weight, without an autograd graph."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.core.autograd_use import ORDINARY, known_use
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.gradient_mode import in_constant_part
from gradcost.core.interrupts import Hooks, raise_interrupt, undoing
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.notes import Note
from gradcost.core.objective import Leaf, Objective
from gradcost.directions import Directions, SparseDirections
from gradcost.directions.low_rank import Factored, Factors
from gradcost.slopes import attention
from gradcost.slopes.low_rank_linear import LowRankLinearMode, only_linear_reads
from gradcost.slopes.rules import RULES
from gradcost.slopes.substitution import substituted


def differentiate(
    objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the loss and its slopes along the directions of all `seeds`.

    One forward pass computes all slopes. The tangents of all directions are in memory at once.

    Args:
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
        key: seeds the random layers.
        directions: the distribution of the directions.
        seeds: one seed per direction.
    Returns:
        The loss (a scalar) and the slopes, shape (len(seeds),), both in the loss's dtype.
    Raises:
        Unsupported: the loss has no tangent, or the tangent of a parameter would be lost.
    """
    if torch.is_inference_mode_enabled():
        raise Unsupported(
            "torch.inference_mode() is on around the estimate, and forward mode is off there. Use torch.no_grad() "
            "around the training loop instead, or mezo(), which needs no derivative."
        )
    use = known_use(objective) or ORDINARY
    if len(seeds) > 1 and (use.differentiates or use.forward_mode or use.functions):  # these do not work under vmap
        results = [differentiate(objective, batch, key, directions, [seed]) for seed in seeds]
        return results[-1][0], torch.cat([slope for _, slope in results])
    if len(seeds) == 1:
        if use.forward_mode:  # a dual level cannot contain another one, but a transform can
            loss, slope = _in_transform(lambda: _evaluate(objective, batch, key, directions, seeds, None))
        else:
            with forward_ad.dual_level():
                loss, slope = forward_ad.unpack_dual(_evaluate(objective, batch, key, directions, seeds, None))
        assert slope is not None
        return loss, slope.reshape(1)

    # vmap maps over the index of the direction: the primal is computed once, and the tangents are batched.
    # Inside vmap, dual tensors need a functorch level. torch.func.jvp creates one; its argument has no other use.
    def slope_of(index: Tensor) -> tuple[Tensor, Tensor]:
        return _in_transform(lambda: _evaluate(objective, batch, key, directions, seeds, index))

    indices = torch.arange(len(seeds), device=objective.leaves[0].parameter.device)
    losses, slopes = torch.func.vmap(slope_of, randomness="same")(indices)
    return losses[0], slopes


def _in_transform(evaluate: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss and its tangent. `evaluate` runs inside `torch.func.jvp` and ignores its argument."""
    unused = torch.zeros(())
    return torch.func.jvp(lambda _: evaluate(), (unused,), (unused,))  # pyright: ignore[reportReturnType]


def _evaluate(
    objective: Objective,
    batch: Any,
    key: Key,
    directions: Directions,
    seeds: Sequence[int],
    index: Tensor | None,
) -> Tensor:
    """Return the loss as a dual tensor. `index` is the position of the seed under vmap, None outside."""

    in_transform = functorch.maybe_current_level() is not None

    def tangent(draw: Callable[[int], Tensor], leaf: Leaf | None = None) -> Tensor:
        """Return the tangents of all seeds: `draw(seed)`, or with a leaf its directions, drawn into one tensor."""
        with torch._C._DisableFuncTorch() if in_transform else nullcontext():
            # A functorch level would wrap new tensors, and in-place noise could not fill those.
            if index is None:
                return tag("tangents", draw(seeds[0]))
            if leaf is None:
                stack = torch.stack([draw(seed) for seed in seeds])
            else:
                stack = leaf.parameter.new_zeros((len(seeds), *leaf.parameter.shape))
                for out, seed in zip(stack, seeds, strict=True):
                    directions.add(out, leaf, [seed], [1.0], in_place=True)
            tag("tangents", stack)
        return functorch._add_batch_dim(stack, 0, functorch.maybe_get_level(index))

    all_leaves = False  # whether leaves on which all directions are zero get a tangent too
    has_skipped = False  # whether some leaf got no tangent

    def make(leaf: Leaf) -> Tensor:
        nonlocal has_skipped
        if in_constant_part():
            return leaf.parameter.detach()
        if not all_leaves and isinstance(directions, SparseDirections) and not directions.touches(leaf, seeds):
            has_skipped = True
            return leaf.parameter.detach()
        direction = tangent(lambda seed: directions.draw(leaf, [seed], [1.0]), leaf)
        return with_tangent(leaf.name, leaf.parameter.detach(), direction)

    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        use = known_use(objective) or ORDINARY
        rules = _RULES | _RULES_IN_TRANSFORM if in_transform else _RULES
        rules = rules | {rule: rule for rule in _UNPACKING_DUALS} if use.transforms else rules
        if isinstance(directions, Factored) and not (use.differentiates or use.transforms):
            stack.enter_context(substituted(objective, make, rules, only_linear_reads))

            def factors(leaf: Leaf) -> Factors:
                left_and_right = tangent(lambda seed: torch.cat(directions.factors(leaf, seed), dim=1))
                return Factors(*left_and_right.split(list(leaf.parameter.shape), dim=1))

            stack.enter_context(LowRankLinearMode(objective, factors, with_tangent))
        else:
            stack.enter_context(substituted(objective, make, rules))
        loss = objective.evaluate(batch, key)
        if has_skipped and forward_ad.unpack_dual(loss).tangent is None:
            # Either the loss depends on skipped leaves only (slope 0), or the model cuts the tangent (an error).
            # With zero tangents on the skipped leaves, the loss has a tangent in the first case only.
            all_leaves = True
            loss = objective.evaluate(batch, key)
    if forward_ad.unpack_dual(loss).tangent is None:
        raise Unsupported(
            "the loss came out without a tangent: it does not depend on the trainable parameters by a "
            "differentiable path (.data, .detach() or .item() inside the model or the loss cut it). Remove the cut."
        )
    return loss


def with_tangent(name: str, primal: Tensor, tangent: Tensor) -> Tensor:
    """Return `primal` as a dual tensor.

    Args:
        name: the name of the tensor, for the error message.
        primal: the value of the tensor.
        tangent: the tangent, of the shape of `primal`.
    Returns:
        The dual tensor.
    Raises:
        Unsupported: forward mode is off, as inside a custom autograd.Function, so the tangent would be lost.
    """
    if not torch._C._is_fwd_grad_enabled():
        raise Unsupported(
            f"`{name}` is used inside a custom autograd.Function (reentrant checkpointing is one). Forward mode is "
            "off there and its tangent would be lost. Use use_reentrant=False, call the operation outside the "
            "function, or use mezo(), which needs no derivative."
        )
    return forward_ad.make_dual(primal, tangent)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear on dual tensors, without a matmul for a missing tangent. PyTorch's rule multiplies zeros.

    A loss that calls autograd needs PyTorch's rule, which saves the weight with its tangent for a backward pass.
    """
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return F.linear(input, weight, bias)
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
    """Wrap a normalisation: if one argument has a tangent, the others get zero tangents.

    For a missing tangent (a frozen weight) PyTorch's rule would insert zero tensors without storage, which fake
    tensors do not support.
    """

    def rule(*args: Any, **kwargs: Any) -> Tensor:
        def is_dual(argument: Any) -> bool:
            return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None

        def with_zero_tangent(argument: Any) -> Any:
            missing = isinstance(argument, Tensor) and argument.is_floating_point() and not is_dual(argument)
            return forward_ad.make_dual(argument, torch.zeros_like(argument)) if missing else argument

        if not any(map(is_dual, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        duals = {name: with_zero_tangent(argument) for name, argument in kwargs.items()}
        return function(*map(with_zero_tangent, args), **duals)

    return rule


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    out, is_math = attention.dispatch(*args, **kwargs)
    if is_math:
        _note_math_attention()
    return out


@functools.cache
def _note_math_attention() -> None:
    warnings.warn(
        "attention with dropout or under autocast runs on the math kernel for a Jvp slope, in memory that is "
        "quadratic in the length.",
        Note,
        stacklevel=2,
    )


def _batch_norm(input: Tensor, running_mean: Any, running_var: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Apply batch norm. In training mode, omit the running statistics, which functorch cannot write.

    Training mode does not read them, and an evaluation discards its copies of the buffers.
    """
    training = args[2] if len(args) > 2 else kwargs.get("training", False)
    statistics = (None, None) if training else (running_mean, running_var)
    return F.batch_norm(input, *statistics, *args, **kwargs)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
) -> Tensor:
    """Apply dropout with the mask of plain evaluations. functorch would draw it in another memory order."""
    if not (training and train) or p == 0:  # `train` is torch.dropout's name for F.dropout's `training`
        return input
    unwrapped = input
    while functorch.is_functorch_wrapped_tensor(unwrapped):
        unwrapped = functorch.get_unwrapped(unwrapped)
    mask = torch.empty_like(unwrapped).bernoulli_(1 - p)
    return input * (mask if p == 1 else mask.div_(1 - p))


_RULES = {F.layer_norm: _normalizing(F.layer_norm), F.group_norm: _normalizing(F.group_norm)}
_RULES |= {F.linear: _linear, F.scaled_dot_product_attention: _attention} | RULES
# Functions whose rules unpack dual tensors. Transforms of the loss wrap these, so the rules are not used there.
_UNPACKING_DUALS = (F.linear, F.layer_norm, F.group_norm, F.scaled_dot_product_attention)
_RULES_IN_TRANSFORM = {F.batch_norm: _batch_norm, F.dropout: _dropout, torch.dropout: _dropout}


# Code that a user cannot change. `first_blocked` reports the innermost line outside these folders.
_LIBRARY_FOLDERS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


class Blocked(NamedTuple):
    """Where an evaluation with tangents failed.

    Args:
        module: the name of the innermost module that raised; None if the error is outside of all modules.
        line: the source line of the innermost stack frame outside of torch and gradcost.
        reason: the first line of the error message.
    """

    module: str | None
    line: str
    reason: str


def first_blocked(model: nn.Module, attempt: Callable[[], object]) -> Blocked | None:
    """Call `attempt`, an evaluation with tangents. Return where it fails, or None if it succeeds."""
    failed: list[tuple[str, BaseException | None]] = []
    with _failing_module(model, failed):
        try:
            attempt()
        except BadInput:
            raise  # wrong arguments, not a limit of forward mode
        except (NotImplementedError, RuntimeError, ValueError) as raised:
            raise_interrupt(raised)
            causes = list(_causes(raised))
            # `Jvp.measure` converts a NotImplementedError to Unsupported: report the original error.
            error = next((cause for cause in causes if isinstance(cause, NotImplementedError)), raised)
            frames = [
                f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARY_FOLDERS)
            ]
            line = (frames[-1].line or "") if frames else ""
            name = next((name for name, failure in failed if failure in causes), None)
            return Blocked(name, line, str(error).split("\n")[0].rstrip("."))
    return None


def failure_message(model: nn.Module, attempt: Callable[[], object]) -> str | None:
    """Call `attempt`. If it fails, return a sentence with module, line and alternative; otherwise None."""
    blocked = first_blocked(model, attempt)
    if blocked is None:
        return None
    if blocked.module is None and not blocked.line:
        return f"{blocked.reason}."  # gradcost raised it, with a complete message
    where = "the loss" if blocked.module is None else f"`{blocked.module or type(model).__name__}`"
    return (
        f"{where} cannot be differentiated forward, at `{blocked.line}`: {blocked.reason}. For attention use "
        'attn_implementation="eager"; otherwise mezo(), which needs no derivative, or backprop().'
    )


@contextmanager
def _failing_module(model: nn.Module, failed: list[tuple[str, BaseException | None]]) -> Iterator[None]:
    """If a forward raises inside the context, append the name of the module and the exception, innermost first.

    An always_call hook gets output None after an error, but also if the module returns None: look for a new error.
    """
    outside = sys.exc_info()[1]
    hooks = Hooks()

    def hook(name: str, module: nn.Module) -> None:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            error = sys.exc_info()[1]
            if output is None and error is not outside:
                failed.append((name, error))

        hooks.after(module, leave, always=True)

    with undoing(hooks.remove):
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):  # these are not called
                hook(name, module)
        yield


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and the exceptions during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
