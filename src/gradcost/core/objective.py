"""What is minimised: a model and a loss, evaluated so that nothing is disturbed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradcost.core.errors import BadInput, GradcostError
from gradcost.core.isolation import randomness, undisturbed, weights_replaced
from gradcost.core.key import Key
from gradcost.core.pytree import plain, tensors


class Leaf(NamedTuple):
    """One trainable parameter and its place in the vector of all of them."""

    name: str
    parameter: nn.Parameter
    start: int  # index of its first element among the objective's `dimension` elements
    dimension: int


@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """A loss of the trainable parameters of a model: `loss(model, batch) -> scalar tensor`.

    The trainable parameters are those that require a gradient when the objective is made, each once (tied
    ones too), in the order of `model.named_parameters()`, frozen from then on: `leaves`. Together they are
    one vector of `dimension` elements. So are the modules: make the objective when the model is complete.

    `parts` cuts a batch into that many micro-batches along the first dimension of its tensors; the loss is
    their mean, weighted by size, and at most one part's activations are alive.

    `data` gives the batches of the whole of the data, once through, for the methods that pass over all of it.

    Law: an evaluation disturbs nothing. Parameters, buffers, RNG states, train/eval flags, requires_grad,
    hooks and `.grad` are bitwise as before, also when the loss raises; random layers draw from the key alone,
    so one key is one function. BatchNorm's running statistics therefore stand still: `advance` moves them.

    Raises: ValueError when nothing is trainable, or the loss is not a scalar of a floating type.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    parts: int = 1
    data: Callable[[], Iterable[Any]] | None = None
    leaves: tuple[Leaf, ...] = field(init=False)
    modules: tuple[nn.Module, ...] = field(init=False)
    devices: tuple[torch.device, ...] = field(init=False)  # the accelerators whose generators a key sets

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise BadInput(f"an Objective needs a torch.nn.Module, not {type(self.model).__name__}.")
        if self.parts < 1:
            raise BadInput(f"a batch is cut into 1 part or more, not {self.parts}.")
        trainable = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        dimension = sum(p.numel() for _, p in trainable)
        if dimension == 0:
            raise BadInput(
                f"{type(self.model).__name__} has no trainable parameters, so there is no gradient to take. "
                "Set requires_grad on those that should train before making the Objective."
            )
        object.__setattr__(self, "leaves", _in_a_row(trainable))
        object.__setattr__(self, "modules", tuple(self.model.modules()))
        if any(getattr(module, "max_norm", None) is not None for module in self.modules):
            raise BadInput(
                "an embedding with max_norm rewrites its table in its forward, so an evaluation would change the "
                "weights. Make it with max_norm=None, and renormalise after a step if you want to."
            )
        object.__setattr__(self, "devices", devices_of(self.model))

    def __repr__(self) -> str:
        return f"Objective({type(self.model).__name__}, {self.dimension:,} weights in {len(self.leaves)} leaves)"

    @property
    def dimension(self) -> int:
        """d: how many numbers are trained."""
        return self.leaves[0].dimension

    def in_parts(self, parts: int) -> Objective:
        """The same objective with each of its parts cut into `parts` micro-batches."""
        made = replace(self, parts=self.parts * parts)
        object.__setattr__(made, "leaves", self.leaves)  # as they were frozen, whatever requires a gradient now
        return made

    def only(self, names: Collection[str]) -> Objective:
        """The same objective as a function of these leaves alone: the others stand still.

        Raises: ValueError when it has none of that name.
        """
        kept = [(leaf.name, leaf.parameter) for leaf in self.leaves if leaf.name in names]
        if not kept:
            raise BadInput(f"none of the leaves {', '.join(leaf.name for leaf in self.leaves)} is in {names}.")
        made = replace(self)
        object.__setattr__(made, "leaves", _in_a_row(kept))
        return made

    def with_loss(self, loss: Callable[[nn.Module, Any], Tensor]) -> Objective:
        """Another loss of the same leaves of the same model."""
        made = replace(self, loss=loss)
        object.__setattr__(made, "leaves", self.leaves)
        return made

    def at_weights(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the leaves read these weights inside the context; nothing is copied, and all is restored after it.

        Args:
            weights: one tensor for each leaf's name, of its shape and dtype.
        """
        parameters = [leaf.parameter for leaf in self.leaves]
        return weights_replaced(parameters, [weights[leaf.name] for leaf in self.leaves])

    def evaluate(self, batch: Any, key: Key) -> Tensor:
        """The loss at the present weights: a scalar without a graph. Costs one forward."""
        with torch.no_grad():
            return functools.reduce(torch.add, (weight * loss for weight, loss in self.losses(batch, key)))

    def losses(self, batch: Any, key: Key) -> Generator[tuple[float, Tensor], None, None]:
        """The weight and the loss of each part, one after the other, with a graph where gradients are on.

        The model is held undisturbed from the start of each part until the next one is asked for.
        """
        pieces = split(batch, self.parts)
        for number, (weight, piece) in enumerate(pieces):
            # An autocast region around a whole training loop would answer with the cast of an older weight.
            torch.clear_autocast_cache()
            with undisturbed(self.modules), randomness(key.fold("part", number), self.devices):
                yield weight, self._scalar(self.loss(self.model, piece))

    def advance(self, batch: Any, key: Key) -> None:
        """One forward in which buffers (BatchNorm's running statistics) advance, as a training step's would."""
        with torch.no_grad(), randomness(key, self.devices):
            self.loss(self.model, batch)

    def has_running_statistics(self) -> bool:
        """Whether a forward in the present mode would move a normalisation layer's running statistics."""
        return any(
            module.training and getattr(module, "track_running_stats", False) and any(True for _ in module.buffers())
            for module in self.modules
        )

    def _scalar(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor):
            raise BadInput(f"the loss must be a scalar tensor; it returned {type(loss).__name__}.")
        if loss.ndim != 0 or not loss.is_floating_point():
            shape, dtype = tuple(loss.shape), str(loss.dtype).removeprefix("torch.")
            raise BadInput(
                f"the loss must be a scalar of a floating type; it has shape {shape} and type {dtype}. "
                "Reduce it, with .mean() for example."
            )
        return loss


@contextmanager
def loss_errors(objective: Objective) -> Iterator[None]:
    """Turn an exception of the user's model or loss into BadInput with its type and first line.

    Raises: BadInput.
    """
    try:
        yield
    except GradcostError:
        raise
    except Exception as error:
        message = (str(error).strip().splitlines() or ["no message"])[0]
        raise BadInput(
            f"the loss of {type(objective.model).__name__} cannot be evaluated on this batch: "
            f"{type(error).__name__}: {message}"
        ) from error


def _in_a_row(parameters: Sequence[tuple[str, nn.Parameter]]) -> tuple[Leaf, ...]:
    dimension = sum(parameter.numel() for _, parameter in parameters)
    starts = itertools.accumulate((parameter.numel() for _, parameter in parameters), initial=0)
    return tuple(Leaf(*named, start, dimension) for named, start in zip(parameters, starts, strict=False))


def split(batch: Any, parts: int) -> list[tuple[float, Any]]:
    """`batch` cut into `parts` along the first dimension of its tensors, each with its share of the whole.

    Raises: ValueError when the tensors differ in that dimension or it is shorter than `parts`.
    """
    if parts == 1:
        return [(1.0, batch)]
    leaves, structure = pytree.tree_flatten(plain(batch))
    size = examples(batch)
    if size < parts:
        raise BadInput(f"a batch of {size} cannot be cut into {parts} parts: use at most {size}.")
    cut = [leaf.tensor_split(parts) if isinstance(leaf, Tensor) and leaf.ndim else [leaf] * parts for leaf in leaves]
    lengths = [len(piece) for piece in torch.arange(size).tensor_split(parts)]
    return [
        (length / size, pytree.tree_unflatten([pieces[i] for pieces in cut], structure))
        for i, length in enumerate(lengths)
    ]


def examples(batch: Any) -> int:
    """How many examples are in a batch: the first dimension of its tensors.

    Raises: ValueError when the tensors differ in that dimension.
    """
    sizes = {leaf.shape[0] for leaf in tensors(plain(batch)) if leaf.ndim}
    if len(sizes) != 1:
        raise BadInput(f"the examples of a batch need tensors of one first dimension; here they have {sizes}.")
    return sizes.pop()


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The accelerators that hold a parameter of the model: the CPU goes without saying."""
    found = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return tuple(sorted(found, key=str))
