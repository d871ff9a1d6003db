"""The objective: a model and a loss, evaluated without changing the model."""

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
from gradcost.core.isolation import isolated_modules, seeded_generators, weights_replaced
from gradcost.core.key import Key
from gradcost.core.pytree import batch_size, plain


class Leaf(NamedTuple):
    """A trainable parameter and its position in the vector of all trainable parameters.

    Args:
        name: the parameter's name in `model.named_parameters()`; the first name if it is tied.
        parameter: the parameter.
        start: index of the parameter's first element in the vector.
        dimension: length of the vector, the same for every leaf of an objective.
    """

    name: str
    parameter: nn.Parameter
    start: int
    dimension: int


@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """A loss as a function of a model's trainable parameters: `loss(model, batch) -> scalar tensor`.

    The trainable parameters form one vector of `dimension` elements, in the order of `model.named_parameters()`. Each
    is one `Leaf`; a tied parameter is one leaf. Leaves and modules are fixed at construction, so build the complete
    model first. `dataclasses.replace`, `in_micro_batches` and `with_loss` keep the leaves.

    Law: an evaluation changes nothing. Parameters, buffers, generator states, train/eval flags, requires_grad, hooks
    and `.grad` are bitwise as before, even if the loss raises. BatchNorm's running statistics are buffers and do not
    change either; `advance` updates them. The key alone seeds the random layers, so equal keys, weights and batches
    give equal losses.

    Args:
        model: the module.
        loss: returns the loss of the model on a batch, a scalar of a floating type.
        parts: number of micro-batches per batch; tensors are split along the first dimension. The loss is the mean
            over micro-batches, weighted by their size. The activations of one micro-batch are in memory at a time.
        data: returns an iterable of the batches of one epoch, for estimators that need the full gradient.
        leaves: the leaves of another objective of the same model. Empty selects all parameters that require a
            gradient at construction.
    Raises:
        BadInput: an argument is invalid, the model has no trainable parameter, or an embedding has max_norm. An
            evaluation raises it if the loss is not a scalar of a floating type.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    parts: int = 1
    data: Callable[[], Iterable[Any]] | None = None
    leaves: tuple[Leaf, ...] = field(default=(), kw_only=True)
    modules: tuple[nn.Module, ...] = field(init=False)
    devices: tuple[torch.device, ...] = field(init=False)  # CUDA devices whose generators an evaluation seeds

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise BadInput(f"an Objective needs a torch.nn.Module, not {type(self.model).__name__}.")
        if self.parts < 1:
            raise BadInput(f"a batch is cut into 1 micro-batch or more, not {self.parts}.")
        modules = tuple(self.model.modules())
        if any(getattr(module, "max_norm", None) is not None for module in modules):
            raise BadInput(
                "an embedding with max_norm rewrites its table in the forward pass, so an evaluation would change "
                "the weights. Make it with max_norm=None, and renormalise after a step if necessary."
            )
        if not {id(leaf.parameter) for leaf in self.leaves} <= {id(p) for p in self.model.parameters()}:
            raise BadInput(f"the leaves are not parameters of this {type(self.model).__name__}: leave them out.")
        leaves = self.leaves or _trainable(self.model)
        for name, value in (("leaves", leaves), ("modules", modules), ("devices", devices_of(self.model))):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Objective({type(self.model).__name__}, {self.dimension:,} weights in {len(self.leaves)} leaves)"

    @property
    def dimension(self) -> int:
        """d, the total number of elements of the leaves."""
        return self.leaves[0].dimension

    def in_micro_batches(self, count: int) -> Objective:
        """Return this objective with `count` times as many micro-batches per batch."""
        return replace(self, parts=self.parts * count)

    def only(self, names: Collection[str]) -> Objective:
        """Return an objective whose leaves are those with these names; all other parameters are constant.

        Raises:
            BadInput: no leaf has one of these names.
        """
        chosen = [(leaf.name, leaf.parameter) for leaf in self.leaves if leaf.name in names]
        if not chosen:
            raise BadInput(f"none of the leaves {', '.join(leaf.name for leaf in self.leaves)} is in {names}.")
        return replace(self, leaves=_concatenated(chosen))

    def with_loss(self, loss: Callable[[nn.Module, Any], Tensor]) -> Objective:
        """Return an objective with the same model and leaves but another loss."""
        return replace(self, loss=loss)

    def at_weights(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Give the leaves these values inside the context; restore the original values afterwards. Nothing is copied.

        Args:
            weights: maps the name of each leaf to a tensor of the leaf's shape and dtype.
        """
        parameters = [leaf.parameter for leaf in self.leaves]
        return weights_replaced(parameters, [weights[leaf.name] for leaf in self.leaves])

    def evaluate(self, batch: Any, key: Key) -> Tensor:
        """Return the loss at the current weights. Cost: one forward pass.

        Args:
            batch: any pytree; passed to the loss, split into micro-batches if `parts` > 1.
            key: seeds the random layers.
        Returns:
            A scalar tensor without an autograd graph.
        """
        with torch.no_grad():
            return functools.reduce(torch.add, (weight * loss for weight, loss in self.losses(batch, key)))

    def losses(self, batch: Any, key: Key) -> Generator[tuple[float, Tensor], None, None]:
        """Yield the weight and the loss of each micro-batch, in order.

        A loss has an autograd graph if gradients are enabled. The model stays isolated until the next loss is
        requested, so a backward pass on the current loss changes no buffer or generator.

        Args:
            batch: any pytree.
            key: seeds the random layers.
        Yields:
            (weight, loss). weight: fraction of the batch's examples that are in the micro-batch. loss: a scalar.
        """
        for number, (weight, micro_batch) in enumerate(split(batch, self.parts)):
            # Inside one autocast region, the cache would otherwise return casts of weights from before an update.
            torch.clear_autocast_cache()
            # Do not rename "part": the random bits of every run depend on this name.
            with isolated_modules(self.modules), seeded_generators(key.fold("part", number), self.devices):
                yield weight, self._scalar(self.loss(self.model, micro_batch))

    def advance(self, batch: Any, key: Key) -> None:
        """Run one forward pass that updates buffers, such as BatchNorm's running statistics, as training would.

        Args:
            batch: any pytree; passed to the loss without a split into micro-batches.
            key: seeds the random layers.
        """
        with torch.no_grad(), seeded_generators(key, self.devices):
            self.loss(self.model, batch)

    def has_running_statistics(self) -> bool:
        """Return whether a forward pass would change running statistics in the current train/eval modes."""
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
    """Convert exceptions of the user's model or loss, raised inside the context, to BadInput.

    Raises:
        BadInput: the model or the loss raised; the message has the type and the first line of the exception. A
            GradcostError passes unchanged.
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


def _trainable(model: nn.Module) -> tuple[Leaf, ...]:
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not sum(parameter.numel() for _, parameter in parameters):
        raise BadInput(
            f"{type(model).__name__} has no trainable parameters, so there is no gradient to take. "
            "Set requires_grad on those that should train before making the Objective."
        )
    return _concatenated(parameters)


def _concatenated(parameters: Sequence[tuple[str, nn.Parameter]]) -> tuple[Leaf, ...]:
    """Make one leaf per parameter, with their positions in the concatenation of these parameters."""
    sizes = [parameter.numel() for _, parameter in parameters]
    *starts, dimension = itertools.accumulate(sizes, initial=0)
    return tuple(Leaf(*named, start, dimension) for named, start in zip(parameters, starts, strict=True))


def split(batch: Any, count: int) -> list[tuple[float, Any]]:
    """Split a batch into micro-batches along the first dimension of its tensors.

    Each micro-batch contains all scalar tensors and all entries that are not tensors.

    Args:
        batch: any pytree.
        count: number of micro-batches. For 1 the batch is returned unchanged.
    Returns:
        One (weight, micro-batch) per micro-batch, in order. weight: fraction of the batch's examples in it.
    Raises:
        BadInput: the tensors differ in their first dimension, or their first dimension is smaller than `count`.
    """
    if count == 1:
        return [(1.0, batch)]
    entries, structure = pytree.tree_flatten(plain(batch))
    size = batch_size(batch)
    if size < count:
        raise BadInput(f"a batch of {size} cannot be cut into {count} micro-batches: use at most {size}.")
    split_entries = [
        entry.tensor_split(count) if isinstance(entry, Tensor) and entry.ndim else [entry] * count
        for entry in entries
    ]
    lengths = [len(piece) for piece in torch.arange(size).tensor_split(count)]
    return [
        (length / size, pytree.tree_unflatten([pieces[i] for pieces in split_entries], structure))
        for i, length in enumerate(lengths)
    ]


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the CUDA devices that hold a parameter of the model."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return tuple(sorted(devices, key=str))
