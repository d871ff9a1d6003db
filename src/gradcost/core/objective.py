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
    """A trainable parameter and its place in the vector of all trainable parameters.

    Args:
        name: its first name in `model.named_parameters()`.
        parameter: the parameter.
        start: index of its first element in the vector.
        dimension: length of the vector, the same for every leaf of an objective.
    """

    name: str
    parameter: nn.Parameter
    start: int
    dimension: int


@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """A loss as a function of a model's trainable parameters: `loss(model, batch) -> scalar tensor`.

    Together the trainable parameters are one vector of `dimension` elements, one `Leaf` each, in the order of
    `model.named_parameters()`. A tied parameter is one leaf. Leaves and modules are fixed when the objective is made,
    so make it when the model is complete. Derived objectives and `dataclasses.replace` keep the leaves.

    Law: an evaluation changes nothing. Parameters, buffers, generator states, train/eval flags, requires_grad, hooks
    and `.grad` are bitwise as before, also when the loss raises. Random layers draw from the key alone, so one key is
    one function. Therefore BatchNorm's running statistics do not move; `advance` moves them.

    Args:
        model: the module.
        loss: returns the loss of the model on a batch, a scalar of a floating type.
        parts: micro-batches per batch, cut along the first dimension of its tensors. The loss is their mean, weighted
            by size. At most one micro-batch's activations are in memory.
        data: returns the batches of one pass over the data, for estimators that need a full gradient.
        leaves: leaves of another objective of this model. Empty: the parameters that require a gradient now.
    Raises:
        BadInput: the model has no trainable parameter, or the loss is not a scalar of a floating type.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    parts: int = 1
    data: Callable[[], Iterable[Any]] | None = None
    leaves: tuple[Leaf, ...] = field(default=(), kw_only=True)
    modules: tuple[nn.Module, ...] = field(init=False)
    devices: tuple[torch.device, ...] = field(init=False)  # the accelerators whose generators a key seeds

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
        """d: the number of elements of all leaves together."""
        return self.leaves[0].dimension

    def in_micro_batches(self, count: int) -> Objective:
        """Return this objective with each of its micro-batches cut into `count`."""
        return replace(self, parts=self.parts * count)

    def only(self, names: Collection[str]) -> Objective:
        """Return this objective as a function of the named leaves alone; all others are constant.

        Raises:
            BadInput: no leaf has one of these names.
        """
        chosen = [(leaf.name, leaf.parameter) for leaf in self.leaves if leaf.name in names]
        if not chosen:
            raise BadInput(f"none of the leaves {', '.join(leaf.name for leaf in self.leaves)} is in {names}.")
        return replace(self, leaves=_concatenated(chosen))

    def with_loss(self, loss: Callable[[nn.Module, Any], Tensor]) -> Objective:
        """Return another loss of the same leaves of the same model."""
        return replace(self, loss=loss)

    def at_weights(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Let the leaves read these weights inside the context; restore them afterwards. Nothing is copied.

        Args:
            weights: a tensor for each leaf's name, of the leaf's shape and dtype.
        """
        parameters = [leaf.parameter for leaf in self.leaves]
        return weights_replaced(parameters, [weights[leaf.name] for leaf in self.leaves])

    def evaluate(self, batch: Any, key: Key) -> Tensor:
        """Return the loss at the present weights. Cost: one forward pass.

        Args:
            batch: any pytree; passed to the loss, as micro-batches when `parts` > 1.
            key: seeds the random layers.
        Returns:
            A scalar without a graph.
        """
        with torch.no_grad():
            return functools.reduce(torch.add, (weight * loss for weight, loss in self.losses(batch, key)))

    def losses(self, batch: Any, key: Key) -> Generator[tuple[float, Tensor], None, None]:
        """Yield the weight and the loss of each micro-batch in order, with a graph where gradients are enabled.

        The model stays isolated from the start of a micro-batch until the next one is requested.

        Args:
            batch: any pytree.
            key: seeds the random layers.
        Yields:
            (weight, loss): the micro-batch's share of the batch, and its loss.
        """
        for number, (weight, micro_batch) in enumerate(split(batch, self.parts)):
            # An autocast region around a training loop would otherwise reuse the cast of an older weight.
            torch.clear_autocast_cache()
            # The name "part" determines the random bits of every run: it stays.
            with isolated_modules(self.modules), seeded_generators(key.fold("part", number), self.devices):
                yield weight, self._scalar(self.loss(self.model, micro_batch))

    def advance(self, batch: Any, key: Key) -> None:
        """Run one forward pass that updates buffers, such as BatchNorm's running statistics, as training would.

        Args:
            batch: any pytree; passed to the loss without cutting.
            key: seeds the random layers.
        """
        with torch.no_grad(), seeded_generators(key, self.devices):
            self.loss(self.model, batch)

    def has_running_statistics(self) -> bool:
        """Return whether a forward pass in the present mode would move a layer's running statistics."""
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

    Raises:
        BadInput: the loss cannot be evaluated; a GradcostError passes unchanged.
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
    """Return the leaves of these parameters, one after the other in one vector."""
    sizes = [parameter.numel() for _, parameter in parameters]
    *starts, dimension = itertools.accumulate(sizes, initial=0)
    return tuple(Leaf(*named, start, dimension) for named, start in zip(parameters, starts, strict=True))


def split(batch: Any, count: int) -> list[tuple[float, Any]]:
    """Cut a batch into micro-batches along the first dimension of its tensors.

    Scalars, and entries that are not tensors, go to every micro-batch.

    Args:
        batch: any pytree.
        count: how many micro-batches; 1 returns the batch itself.
    Returns:
        (share of the examples, micro-batch) for each, in order.
    Raises:
        BadInput: the tensors differ in their first dimension, or it is smaller than `count`.
    """
    if count == 1:
        return [(1.0, batch)]
    entries, structure = pytree.tree_flatten(plain(batch))
    size = batch_size(batch)
    if size < count:
        raise BadInput(f"a batch of {size} cannot be cut into {count} micro-batches: use at most {size}.")
    cut = [
        entry.tensor_split(count) if isinstance(entry, Tensor) and entry.ndim else [entry] * count
        for entry in entries
    ]
    lengths = [len(piece) for piece in torch.arange(size).tensor_split(count)]
    return [
        (length / size, pytree.tree_unflatten([pieces[i] for pieces in cut], structure))
        for i, length in enumerate(lengths)
    ]


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the CUDA devices that hold a parameter of the model."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    return tuple(sorted(devices, key=str))
