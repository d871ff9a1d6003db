"""Forward-mode differentiation: evaluate the loss with a tangent on each weight, without an autograd graph."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradcost.core.errors import BadInput, Unsupported, first_line
from gradcost.core.evaluation.autograd_use import ORDINARY, known_use
from gradcost.core.evaluation.gradient_mode import in_constant_part
from gradcost.core.interrupts import Hooks, raise_interrupt, undoing
from gradcost.core.key import Key
from gradcost.core.memory_events import tag
from gradcost.core.objective import Leaf, Objective
from gradcost.core.user_errors import line_outside
from gradcost.directions import Directions, SparseDirections
from gradcost.directions.low_rank import Factored, Factors
from gradcost.slopes import lost_tangents, tangent_rules
from gradcost.slopes.duals import ordinary, with_directions, with_tangent
from gradcost.slopes.low_rank_linear import LowRankLinearMode, only_linear_reads
from gradcost.slopes.perturbed_products import only_products_read
from gradcost.slopes.rules import RULES
from gradcost.slopes.substitution import substituted
from gradcost.slopes.tangent_products import TangentProducts


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
    _load_torchs_rules()
    use = known_use(objective) or ORDINARY
    if use.pads and use.transforms:
        raise Unsupported(
            "the loss applies torch.func transforms to an embedding with a padding_idx, and the tangent of the "
            "padding row would not be 0, as its gradient is. Set padding_idx to None, or use backprop()."
        )
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


@functools.cache
def _load_torchs_rules() -> None:
    """Import what torch imports at the first dual tensor, without its own dozen warnings about torch.jit.script."""
    with warnings.catch_warnings(), suppress(ImportError):
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


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
    level = None if index is None else functorch.maybe_get_level(index)

    def drawn(leaf: Leaf) -> Tensor:
        """Return the directions of all seeds on a leaf, drawn into one tensor."""
        stack = leaf.parameter.detach().new_empty((len(seeds), *leaf.parameter.shape))
        for out, seed in zip(stack, seeds, strict=True):
            directions.draw(leaf, [seed], [1.0], out)
        return tag("tangents", stack)

    all_leaves = False  # whether leaves on which all directions are zero get a tangent too
    has_skipped = False  # whether some leaf got no tangent

    def make(leaf: Leaf) -> Tensor:
        nonlocal has_skipped
        if in_constant_part():
            return leaf.parameter.detach()
        if not all_leaves and isinstance(directions, SparseDirections) and not directions.touches(leaf, seeds):
            has_skipped = True
            return leaf.parameter.detach()
        with ordinary():
            stack = drawn(leaf)
        return with_tangent(leaf.name, leaf.parameter.detach(), with_directions(stack, level))

    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        use = known_use(objective) or ORDINARY
        rules = RULES | ({} if use.transforms else tangent_rules.at_this_level())
        rules |= lost_tangents.rules() | (tangent_rules.IN_TRANSFORM if in_transform else {})
        if isinstance(directions, Factored) and not (use.differentiates or use.transforms):
            stack.enter_context(substituted(objective, make, rules, only_linear_reads))

            def factors(leaf: Leaf) -> Factors:
                stack = torch.stack([torch.cat(directions.factors(leaf, seed), dim=1) for seed in seeds])
                return Factors(*tag("tangents", stack).split(list(leaf.parameter.shape), dim=2))

            stack.enter_context(LowRankLinearMode(objective, factors, level))
        elif _in_blocks(directions) and not (use.needs_gradients or use.transforms or use.forward_mode):
            products = TangentProducts(objective, directions, seeds, level)
            stack.enter_context(substituted(objective, make, rules, only_products_read, products.rules()))
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


def _in_blocks(directions: Directions) -> bool:
    """Return whether `TangentProducts` serves these directions: all leaves have a tangent, defined by positions."""
    return directions.elementwise and not isinstance(directions, SparseDirections)


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
            line = line_outside(error)
            name = next((name for name, failure in failed if failure in causes), None)
            return Blocked(name, (line.line or "") if line is not None else "", first_line(error))
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
