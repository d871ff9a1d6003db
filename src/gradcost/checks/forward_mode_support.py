"""Find all modules that forward-mode differentiation does not support, not only the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gradcost.core.interrupts import Hooks, undoing
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Rademacher
from gradcost.slopes.forward_mode import Blocked, first_blocked
from gradcost.slopes.slope import Jvp


def blocked_modules(objective: Objective, batch: Any, key: Key) -> tuple[Blocked, ...]:
    """Return each module that fails in forward mode, with its line of code and the error message.

    The search evaluates the loss with tangents until nothing raises. After each failure:

    - It records the innermost module that raised, and replaces the forward of that module.
    - The replacement returns the outputs of an evaluation without tangents, each with a tangent of ones.
    - A failure in the loss or the outermost module ends the search, because neither can be replaced.
    - A second failure in the same module ends the search too.

    Cost: at most 2n + 1 forwards if n modules fail.
    """
    modules = dict(objective.model.named_modules())
    found: list[Blocked] = []
    with ExitStack() as replacements:
        replays: list[_Replay] = []

        def attempt() -> object:
            for replay in replays:
                replay.calls = 0
            return Jvp().measure(objective, batch, key, Rademacher(), [0])

        while (blocked := first_blocked(objective.model, attempt)) is not None:
            is_repeated = any(blocked.module == other.module for other in found)
            if not is_repeated:
                found.append(blocked)
            if is_repeated or not blocked.module:  # None: in the loss; "": in the outermost module
                break
            module = modules[blocked.module]
            replay = _Replay(module.forward, _outputs(objective, batch, key, module))
            replacements.enter_context(_replaced_forward(module, replay))
            replays.append(replay)
    return tuple(found)


class _Replay:
    """Replaces `module.forward`: in forward mode, returns recorded outputs with tangents; otherwise, calls it."""

    def __init__(self, forward: Callable[..., Any], outputs: list[Any]) -> None:
        self.forward, self.outputs, self.calls = forward, outputs, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level < 0:  # not in forward mode
            return self.forward(*args, **kwargs)
        self.calls += 1
        return pytree.tree_map(_with_tangent, self.outputs[(self.calls - 1) % len(self.outputs)])


def _with_tangent(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return forward_ad.make_dual(leaf, torch.ones_like(leaf))


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward inside the context."""
    attributes = vars(module)
    before = attributes.get("forward")

    def restore() -> None:
        if before is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = before

    with undoing(restore):
        module.forward = forward
        yield


def _outputs(objective: Objective, batch: Any, key: Key, module: nn.Module) -> list[Any]:
    """Return the output of each call of a module in a plain evaluation."""
    outputs: list[Any] = []

    def save(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output))

    hooks = Hooks()
    with undoing(hooks.remove):
        hooks.after(module, save)
        objective.evaluate(batch, key)
    return outputs


def uses_fused_attention(objective: Objective, batch: Any, key: Key) -> bool:
    """Return whether the loss calls `scaled_dot_product_attention`. Its kernels have no forward-mode rule."""
    with _AttentionDetector() as detector:
        objective.evaluate(batch, key)
    return detector.is_called


class _AttentionDetector(TorchFunctionMode):
    is_called = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.is_called = self.is_called or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))
