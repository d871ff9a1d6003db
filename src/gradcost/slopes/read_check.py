"""Detect code that reads the original weights where `substituted` should have replaced them.

Compiled and scripted functions, custom kernels, captured references, and tensors that were computed from a parameter
before the forward pass can read weights without a torch function. A slope would then use wrong weights.

The check evaluates the loss twice with the current weights as replacements. In the second evaluation the parameters
themselves contain other numbers. If the loss changes, some code has read these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradcost.core.errors import GradcostError, Unsupported
from gradcost.core.evaluation.autograd_graph import graph_nodes
from gradcost.core.evaluation.autograd_use import custom_functions, examine, known_use
from gradcost.core.evaluation.compiled import compiled_message
from gradcost.core.evaluation.first_use import can_check, findings, is_due
from gradcost.core.evaluation.mutable_state import Traversal
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.isolation import weights_replaced
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Leaf, Objective
from gradcost.slopes.rules import RULES
from gradcost.slopes.substitution import substituted

_PASSED = "reads of substituted weights"


def check_reads(objective: Objective, batch: Any, key: Key) -> None:
    """Check at first use that substituted weights reach every read of a trainable parameter.

    Each estimate with slopes calls it. Cost: two forward passes at the first call for a model and loss and at the
    8th, 32nd, 128th and so on (`first_use.is_due`), and about five more if a read is found. Nothing is checked on
    fake tensors or inside a torch dispatch mode, which counts FLOPs or memory.

    Args:
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
        key: seeds the random layers.
    Raises:
        Unsupported: some code reads the original weights. The message names the parameter or the attribute.
    """
    objective.prepare(batch, key)
    model, known = objective.model, objective.__dict__.get(_PASSED)
    if known is None or known[0] is not model.training:
        if not can_check(model):
            return
        uses = findings(model, objective.loss).setdefault((_PASSED, model.training), {})
        known = objective.__dict__[_PASSED] = model.training, uses
    # Objectives of one model may train different leaves (`Objective.only`).
    leaves, uses = (objective.leaves[0].name, len(objective.leaves)), known[1]
    count = uses.get(leaves, 0) + 1
    if count == 1 or is_due(count):
        if not can_check(model):
            return
        message = compiled_message(objective)
        if message is None:
            use = known_use(objective) or examine(objective, batch, key)
            message = _direct_read(objective, batch, key)
            if message is None and use is not None and use.depends_on_mode:
                message = _other_function(objective, batch, key)
        if message is not None:
            uses.pop(leaves, None)
            raise Unsupported(message)
        _warn_of_backward_hooks(objective)
    uses[leaves] = count


def _warn_of_backward_hooks(objective: Objective) -> None:
    """Emit a Note if hooks or custom functions may change the gradient in a backward pass (gradient reversal)."""
    use, names = known_use(objective), []
    for name, module in objective.model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            names.append(f"a backward hook of `{name or type(module).__name__}`")
    names += [f"a hook of `{leaf.name}`" for leaf in objective.leaves if leaf.parameter._backward_hooks]
    names += ["a hook that the forward pass registers on a tensor"] if use is not None and use.hooks else []
    names += [f"the backward of `{name}`" for name in custom_functions(objective)]
    if names:
        warn_once(
            objective.model,
            "backward hooks",
            f"slopes are derivatives of the loss alone: {names[0]} runs in backprop only. If it changes the "
            "gradient, use backprop() or checkpointed().",
        )


def reads_message(objective: Objective, batch: Any) -> str | None:
    """Return why substituted weights do not reach this loss and what to use instead, or None.

    Args:
        objective: the model and the loss.
        batch: any pytree; passed to the loss as it is.
    """
    message = compiled_message(objective)
    if message is not None:
        return message
    try:
        check_reads(objective, batch, Key(0))
    except Unsupported as error:
        return str(error)
    except GradcostError:
        return None  # the loss cannot be evaluated; the estimate reports it
    return None


class _Source(NamedTuple):
    """A tensor that code can read directly.

    Args:
        message: the start of the error message.
        tensor: a parameter, or a tensor that was computed from one.
    """

    message: str
    tensor: Tensor


def _direct_read(objective: Objective, batch: Any, key: Key) -> str | None:
    """Return an error message that names a tensor which code reads directly, or None."""
    originals = {leaf.name: leaf.parameter.detach() for leaf in objective.leaves}

    def original(leaf: Leaf) -> Tensor:
        return originals[leaf.name]

    def evaluate(sources: Sequence[_Source]) -> Tensor:
        tensors = [source.tensor for source in sources]
        with (
            weights_replaced(tensors, list(map(_other_numbers, tensors))),
            substituted(objective, original, RULES, constant=original),
        ):
            return objective.evaluate(batch, key)

    expected = evaluate([])
    sources = [*_parameters(objective), *_computed_tensors(objective)]
    if not _differs(evaluate, sources, expected):
        return None
    while len(sources) > 1:
        half = len(sources) // 2
        sources = sources[:half] if _differs(evaluate, sources[:half], expected) else sources[half:]
    return (
        f"{sources[0].message}. A slope would use wrong weights. Pass the weight to torch functions inside the "
        "forward pass of eager code, or use backprop()."
    )


def _other_function(objective: Objective, batch: Any, key: Key) -> str | None:
    """Return an error message if the loss differs when no weight requires a gradient; otherwise None."""
    with substituted(objective, lambda leaf: leaf.parameter.detach(), RULES):
        loss = objective.evaluate(batch, key)
    if torch.allclose(loss, objective.evaluate(batch, key), rtol=1e-4, atol=0, equal_nan=True):
        return None
    return (
        "the loss has another value where weights require no gradient: its code reads `requires_grad` or catches "
        "autograd's errors, and a slope would belong to another function than the gradient. Remove the condition, or "
        "use backprop()."
    )


def _differs(evaluate: Callable[[Sequence[_Source]], Tensor], sources: Sequence[_Source], expected: Tensor) -> bool:
    try:
        loss = evaluate(sources)
    except (GradcostError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise_interrupt(error)
        return True  # the code has read numbers that it does not accept
    if torch.equal(loss, expected) or expected.isnan():
        return False
    noise = (evaluate([]) - expected).abs()  # 0 unless equal evaluations of the loss differ
    return not bool((loss - expected).abs() <= 100 * noise)


def _parameters(objective: Objective) -> Iterator[_Source]:
    for leaf in objective.leaves:
        message = (
            f"`{leaf.name}` is read where substituted weights are not seen: by a compiled or scripted function, a "
            "kernel, or a reference from outside its module"
        )
        if type(leaf.parameter.data) is Tensor and leaf.parameter.layout is torch.strided:
            yield _Source(message, leaf.parameter)


def _computed_tensors(objective: Objective) -> Iterator[_Source]:
    """Yield the tensors stored in the model or the loss that were computed from a leaf before this evaluation."""
    leaves = {id(leaf.parameter): leaf.name for leaf in objective.leaves}
    traversal = Traversal(follow_functions=True)
    traversal.visit("", objective.model)
    traversal.visit("the loss", objective.loss)
    for name, tensor in [*traversal.objects, *objective.model.named_buffers()]:
        origin = _origin(tensor, leaves)
        if origin is not None:
            message = (
                f"`{name}` was computed from `{origin}` before the forward pass, and the loss reads it, so "
                "substituted weights do not change it"
            )
            yield _Source(message, tensor)


def _origin(tensor: Any, leaves: dict[int, str]) -> str | None:
    """Return the name of a leaf in the autograd graph of this tensor, or None."""
    if not isinstance(tensor, Tensor):
        return None
    names = (leaves.get(id(getattr(node, "variable", None))) for node in graph_nodes(tensor))
    return next((name for name in names if name is not None), None)


def _other_numbers(tensor: Tensor) -> Tensor:
    """Return numbers of both signs in the shape of a tensor. Only one row is stored."""
    row = torch.arange(tensor.shape[-1] if tensor.ndim else 1, device=tensor.device, dtype=torch.float32)
    row = (row * 2.3999 + 0.7).sin() + 0.3
    return row.to(tensor.dtype).expand(tensor.shape) if tensor.ndim else row.to(tensor.dtype)[0]
