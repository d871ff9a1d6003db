"""The modules through which no tangent passes: all of them, not only the first."""

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

from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.directions import Rademacher
from gradcost.slopes.forward_mode import Blocked, blocked
from gradcost.slopes.slope import Jvp


def blocked_modules(objective: Objective, batch: Any, key: Key) -> tuple[Blocked, ...]:
    """Each module whose forward has an operation without a forward-mode rule, with the line and the reason.

    The loss is evaluated with tangents until it passes. Where it fails, the innermost module that raised is
    noted and cut out: from then on it gives what a plain evaluation gave, with a tangent of ones, so that what
    comes after it is looked at as well. Costs, for n of them, 2n + 1 forwards at most. The loss itself (or the
    outermost module) cannot be cut out: it ends the search.
    """
    modules = dict(objective.model.named_modules())
    found: list[Blocked] = []
    with ExitStack() as cuts:
        replays: list[_Replay] = []

        def attempt() -> object:
            for replay in replays:
                replay.at = 0
            return Jvp().measure(objective, batch, key, Rademacher(), [0])

        while (here := blocked(objective.model, attempt)) is not None:
            again = any(here.module == other.module for other in found)
            if not again:
                found.append(here)
            if again or not here.module:
                break
            module = modules[here.module]
            replay = _Replay(module.forward, _outputs(objective, batch, key, module))
            cuts.enter_context(_instead(module, replay))
            replays.append(replay)
    return tuple(found)


class _Replay:
    """A forward that gives recorded outputs, with tangents, where tangents are asked for."""

    def __init__(self, forward: Callable[..., Any], outputs: list[Any]) -> None:
        self.forward, self.outputs, self.at = forward, outputs, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if forward_ad._current_level < 0:
            return self.forward(*args, **kwargs)
        self.at += 1
        return pytree.tree_map(_with_tangent, self.outputs[(self.at - 1) % len(self.outputs)])


def _with_tangent(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return forward_ad.make_dual(leaf, torch.ones_like(leaf))


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, the module's forward is another."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _outputs(objective: Objective, batch: Any, key: Key, module: nn.Module) -> list[Any]:
    """What each call of a module gives in a plain evaluation."""
    outputs: list[Any] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output))

    handle = module.register_forward_hook(keep)
    try:
        objective.evaluate(batch, key)
    finally:
        handle.remove()
    return outputs


def fuses_attention(objective: Objective, batch: Any, key: Key) -> bool:
    """Whether an evaluation calls `scaled_dot_product_attention`, which a Jvp slope sends to the math kernel."""
    with _Watch() as watch:
        objective.evaluate(batch, key)
    return watch.seen


class _Watch(TorchFunctionMode):
    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))
