"""What the user's functions must return: each way of getting it wrong has a sentence.

- make() returns a new torch.nn.Module, or (module, loss).
- loss(model, batch) returns a scalar tensor.
- loaders() or loaders(batch_size) returns {"train": ..., "validation": ..., "test": ...}, each a DataLoader or a
  list of batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from gradcost.core.batching.batches import length_of, require_loader
from gradcost.core.errors import BadInput, GradcostError, brief
from gradcost.core.key import Key
from gradcost.core.objective import Objective, loss_errors
from gradcost.core.user_errors import line_of
from gradcost.tasks.metrics import OWN_LOSS

PARTS = ("train", "validation", "test")


@contextmanager
def naming(what: str, purpose: str) -> Iterator[None]:
    """Convert an exception of the user's code to BadInput: `my:make could not make a model: ...`."""
    try:
        yield
    except GradcostError:
        raise
    except Exception as error:
        raise BadInput(f"{what} could not {purpose}: {brief(error)}{line_of(error)}") from error


def check_make(make: Any, name: str = "make_model") -> Callable[[], Any]:
    """Return the function that makes the model.

    Raises:
        BadInput: it is a model, is not callable, or needs arguments.
    """
    if isinstance(make, nn.Module):
        raise BadInput(
            f"{name} is a {type(make).__name__}, and each run needs a new model: give a function without arguments "
            "that makes and returns it."
        )
    if not callable(make):
        raise BadInput(
            f"{name} is of type {type(make).__name__}: give a function without arguments that returns a model."
        )
    needed = misfit(make, ())
    if needed:
        raise BadInput(f"{name} is called without arguments, which does not fit it: {needed}. Give each a default.")
    return make


def misfit(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """Return why a function cannot be called with these arguments; None if it can, or its signature is not known."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        return str(error)
    except ValueError:
        pass
    return None


def check_function(function: Any, name: str, call: str) -> Callable[..., Any]:
    """Return a function of the user.

    Raises:
        BadInput: it is not callable, or is a criterion of torch, which takes the model's output.
    """
    if not callable(function):
        raise BadInput(f"{name} is of type {type(function).__name__}: give a function {call}.")
    module = getattr(function, "__module__", "") or ""
    if isinstance(function, nn.modules.loss._Loss) or module == "torch.nn.functional":
        written = getattr(function, "__name__", "criterion")
        raise BadInput(
            f"{name} is called as {call}, and {getattr(function, '__name__', type(function).__name__)} takes the "
            f"model's output: write def {name}(model, batch): return {written}(model(batch[0]), batch[1])."
        )
    return function


def model_and_loss(made: Any, label: str) -> tuple[nn.Module, Any]:
    """Return the model and the loss (or None) that the user's function made.

    Raises:
        BadInput: it made something else.
    """
    model, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if made is None:
        raise BadInput(f"{label} returned None: end it with `return model`, or `return model, loss`.")
    if inspect.isclass(made):
        raise BadInput(f"{label} returned the class {made.__name__}: call it, as in `return {made.__name__}()`.")
    if not isinstance(model, nn.Module):
        what = f"type {type(model).__name__}"
        if isinstance(made, tuple):
            is_pair = len(made) == 2
            what = f"({type(model).__name__}, {type(loss).__name__})" if is_pair else f"a tuple of {len(made)}"
        raise BadInput(
            f"{label} returned {what}: it returns a torch.nn.Module, or (module, loss) with a function "
            "loss(model, batch)."
        )
    if loss is not None:
        check_function(loss, "loss", "loss(model, batch)")
    return model, loss


def check_model(model: nn.Module, label: str) -> None:
    """Raise BadInput if a tensor of the model is on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise BadInput(
                f"`{name}` of the model of {label} is on the meta device, which stores no numbers: make the model on "
                "the CPU, or load its weights."
            )


def check_parts(made: Any, label: str) -> None:
    """Raise BadInput unless `made` is a mapping with the loaders "train", "validation" and "test"."""
    form = '{"train": ..., "validation": ..., "test": ...}, each a DataLoader or a list of batches'
    if not isinstance(made, Mapping):
        kind = "None" if made is None else f"a {type(made).__name__}"
        raise BadInput(f"{label} returned {kind}: it returns {form}.")
    missing = [part for part in PARTS if made.get(part) is None]
    if missing:
        reason = {
            "train": "to train on",
            "validation": "on which learning rates are chosen",
            "test": "for the final score, which no choice has seen",
        }
        raise BadInput(f"{label} has no {missing[0]} batches, {reason[missing[0]]}: give {form}.")
    unknown = [str(part) for part in made if part not in PARTS]
    if unknown:
        raise BadInput(f"{label} has {unknown[0]!r}, which nothing reads: give {form}.")


def check_loader(loader: Any, name: str) -> None:
    """Raise BadInput unless an object can be iterated several times and yields a batch."""
    require_loader(loader, name)
    if length_of(loader) == 0:
        raise BadInput(
            f"{name} yields no batch: its data set is empty, or smaller than one batch with drop_last=True."
        )


def check_different(loaders: Mapping[str, Any]) -> None:
    """Raise BadInput if two of the loaders are the same object, or have the same data set."""
    seen: dict[int, str] = {}
    for part, loader in loaders.items():
        data = getattr(loader, "dataset", loader)
        other = seen.setdefault(id(data), part)
        if other != part:
            raise BadInput(
                f"{other} and {part} are the same data: choices on one would show in the other. Split them, for "
                "example with torch.utils.data.random_split."
            )


def batch_argument(loaders: Callable[..., Any], label: str, batch: int | None) -> int | None:
    """Return the batch size with which to call `loaders`; None to call it without arguments.

    Raises:
        BadInput: its parameters do not fit.
    """
    if batch is not None and batch < 1:
        raise BadInput(f"a batch has 1 example or more, not {batch}.")
    alone, sized = misfit(loaders, ()), misfit(loaders, (8,))
    if batch is not None and sized:
        raise BadInput(f"{label} takes no batch size ({sized}): write def {label.rpartition(':')[2]}(batch_size).")
    if batch is None and alone:
        if sized:
            raise BadInput(
                f"{label} is called without arguments or with the batch size, which fits neither: {alone}."
            )
        return 8
    return batch


def check_loss(objective: Objective, batch: Any, part: str, hint: bool = False) -> None:
    """Raise BadInput if the loss of a batch cannot be computed, and say of which part the batch is.

    Args:
        objective: the model and the loss.
        batch: a batch of `part`.
        part: "train", "validation" or "test".
        hint: the user gave no loss; the message says how to.
    """
    try:
        with loss_errors(objective):
            objective.evaluate(batch, Key(0))
    except BadInput as error:
        own = f" {OWN_LOSS}" if hint and OWN_LOSS not in str(error) else ""
        raise BadInput(f"on a {part} batch: {error}{own}") from error
