"""Check the types of arguments that users often mix up: criterion and loss, integer and key, torch's optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.loss import _Loss

from gradcost.core.errors import BadInput
from gradcost.core.key import Key

Step = TypeVar("Step", float, float | None)


def require_model_and_loss(model: Any, loss: Any) -> None:
    """Raise BadInput if `model` is no module, or `loss` is not called as loss(model, batch)."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"an Objective needs a torch.nn.Module, not {type(model).__name__}.")
    is_criterion = isinstance(loss, _Loss) or getattr(loss, "__module__", None) == "torch.nn.functional"
    if not is_criterion and callable(loss):
        return
    given = getattr(loss, "__name__", type(loss).__name__)
    why, example = (
        ("compares outputs with targets", getattr(loss, "__name__", f"nn.{given}()"))
        if is_criterion
        else ("cannot be called", "cross_entropy")
    )
    raise BadInput(
        f"the loss of an Objective is a function of model and batch, and {given} {why}: write "
        f"lambda model, batch: {example}(model(batch[0]), batch[1])."
    )


def require_key(key: Any) -> None:
    """Raise BadInput if `key` is not a `Key`."""
    if not isinstance(key, Key):
        raise BadInput(f"the key is {key!r}: write gradcost.Key({key if isinstance(key, int) else 0}).")


def require_bytes(number: Any, what: str) -> int:
    """Return a number of bytes as an int.

    Raises:
        BadInput: it is no whole number above 0.
    """
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1 or number < 1:
        raise BadInput(
            f"{what} is a number of bytes above 0, not {number!r}: write 8 * 10**9 for 8 GB, or 8 << 30 for 8 GiB."
        )
    return int(number)


def require_step(eps: Step) -> Step:
    """Return the step of a finite difference, or None.

    Raises:
        BadInput: it is an integer above 1, which was probably meant as the number of probes.
    """
    if isinstance(eps, int) and eps > 1:
        raise BadInput(f"eps is the length of a step in the weights, such as 1e-3, not {eps}. Or is it probes={eps}?")
    return eps


def require_several(given: Any, name: str) -> list[Any]:
    """Return the items of a list of estimators.

    Raises:
        BadInput: `given` is something else, such as an optimizer or one estimator.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise BadInput(f"{name} is a list, such as [gradcost.mezo()], not {kind}. An optimizer is optimizer=.")
    return list(given)
