"""The objective: a model and a loss, evaluated without changing the model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradcost.core.arguments import require_model_and_loss
from gradcost.core.batching.given_batch import copied, name_in, put_back, watch
from gradcost.core.batching.loss_weights import WeightedLoss, Weights, settled, weighted_sum
from gradcost.core.batching.micro_batches import first_part, split
from gradcost.core.complex_numbers import real_count
from gradcost.core.errors import BadInput, GradcostError, brief
from gradcost.core.evaluation.first_use import can_check, findings
from gradcost.core.evaluation.gradient_mode import evaluated, in_either_mode
from gradcost.core.evaluation.next_state import moving, next_state
from gradcost.core.evaluation.purity import Isolation, Purity, examine
from gradcost.core.evaluation.structure import MOST_LOSSES, Structure
from gradcost.core.evaluation.weight_writes import without_writes
from gradcost.core.fake import is_fake
from gradcost.core.interrupts import interruptible
from gradcost.core.isolation import grads_set_aside, seeded_generators, weights_replaced
from gradcost.core.key import Key
from gradcost.core.user_errors import line_of


class Leaf(NamedTuple):
    """A trainable parameter and its position in the vector of all trainable parameters.

    Args:
        name: the parameter's name in `model.named_parameters()`; the first name if it is tied.
        parameter: the parameter.
        start: index of the parameter's first element in the vector. A complex element counts as two.
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
    is one `Leaf`; a tied parameter is one leaf. Leaves and modules are fixed at construction. After a change to the
    model, make a new objective: the old objective raises at its next evaluation. `dataclasses.replace`,
    `in_micro_batches` and `with_loss` keep the leaves.

    Law: an evaluation changes nothing, even if the loss raises. The following stay bitwise the same:

    - parameters, buffers, train/eval flags, other attributes, requires_grad, hooks and `.grad`;
    - random generators: the default ones of torch, NumPy and `random`, and those that modules or the loss reach;
    - the batch, and modules that only the loss reaches.

    The key alone seeds the generators, so equal keys, weights and batches give equal losses. `prepare` tests
    this with two evaluations. `advance` changes buffers and attributes as a training step in torch does.

    Args:
        model: the module.
        loss: returns the loss of the model on a batch, a scalar of a floating type.
        parts: number of micro-batches per batch (`micro_batches.split`). Their losses are weighted by what the loss
            averages over, such as examples or targets. The activations of one micro-batch are in memory at a time.
        data: returns an iterable of the batches of one epoch, for estimators that need the full gradient.
        leaves: the leaves of another objective of the same model. Empty selects all trainable parameters at
            construction.
        structure: the structure of another objective of the same model. None makes a new one.
    Raises:
        BadInput: an argument is invalid, the model has no trainable parameter, or an embedding has max_norm. An
            evaluation raises it if the loss is not a scalar of a floating type, if it writes into a parameter, or if
            the model has changed since construction.
        Unsupported: an evaluation raises it if two evaluations under one key give two losses.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    parts: int = 1
    data: Callable[[], Iterable[Any]] | None = None
    leaves: tuple[Leaf, ...] = field(default=(), kw_only=True)
    structure: Structure = field(default=cast(Any, None), kw_only=True)  # `replace` passes it on to derived ones

    def __post_init__(self) -> None:
        require_model_and_loss(self.model, self.loss)
        if self.parts < 1:
            raise BadInput(f"a batch is cut into 1 micro-batch or more, not {self.parts}.")
        structure = self.structure
        if structure is None or structure.model is not self.model:
            structure = Structure(self.model)
            object.__setattr__(self, "structure", structure)
        if not structure.ids.issuperset(id(leaf.parameter) for leaf in self.leaves):
            raise BadInput(f"the leaves are not parameters of this {type(self.model).__name__}: leave them out.")
        if not self.leaves:
            object.__setattr__(self, "leaves", _trainable(self.model))

    def __repr__(self) -> str:
        return f"Objective({type(self.model).__name__}, {self.dimension:,} weights in {len(self.leaves)} leaves)"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules of the model."""
        return self.structure.modules

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The CUDA devices whose generators an evaluation seeds."""
        return self.structure.devices

    @property
    def dimension(self) -> int:
        """d, the total number of elements of the leaves. A complex element counts as two real ones."""
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

    @interruptible
    def evaluate(self, batch: Any, key: Key) -> Tensor:
        """Return the loss at the current weights. Cost: one forward pass.

        Args:
            batch: any pytree; passed to the loss, split into micro-batches if `parts` > 1.
            key: seeds the random layers.
        Returns:
            A scalar tensor without an autograd graph.
        """
        if self.parts > 1:
            return settled(self, batch, key, lambda: self._evaluate(batch, key))
        return self._evaluate(batch, key)

    def _evaluate(self, batch: Any, key: Key) -> Tensor:
        return evaluated(self, batch, key, lambda: weighted_sum(self.losses(batch, key)))

    @interruptible
    def prepare(self, batch: Any, key: Key) -> None:
        """Examine at first use what an evaluation of the loss changes, so that later evaluations isolate it.

        Every estimate calls it. Cost: two forward passes without gradient at the first call for a model, loss and
        train/eval mode, and at the 8th, 32nd, 128th and so on (`first_use.is_due`). It does nothing on fake tensors,
        and while FLOPs or memory are counted.

        Args:
            batch: any pytree. The first micro-batch is evaluated.
            key: seeds the random layers.
        Raises:
            BadInput: an evaluation writes into a parameter.
            Unsupported: two evaluations under one key give two losses. The message names the module.
        """
        self.structure.check_unfrozen(self.leaves)  # now, because `Reverse` freezes parameters before `losses`
        training, isolations = self.model.training, self.structure.isolations
        known = isolations.get((id(self.loss), training))
        if (known is not None and not known.purity.is_due()) or not can_check(self.model):
            return
        found = findings(self.model, self.loss)
        earlier = found.pop(("purity", training), None) if known is not None else None
        isolations.pop((id(self.loss), training), None)
        if ("purity", training) not in found:
            part = first_part(batch, self.parts)

            def evaluate(isolation: Isolation, batch: Any, at_end: Callable[[], None]) -> Tensor:
                part_key = key.fold("part", 0)

                def once() -> Tensor:
                    with isolation.entered(part_key), seeded_generators(part_key, self.devices):
                        loss = self._checked(self.loss(self.model, batch))
                        at_end()
                        return loss

                return in_either_mode(once)

            with grads_set_aside(self.model):  # a loss may call backward()
                examined = examine(self.model, self.modules, self.loss, part, evaluate)
            found["purity", training] = examined if earlier is None else earlier.extended(examined)
            if earlier is not None and found["purity", training] != earlier:
                self.structure.moving.clear()
        if len(isolations) > MOST_LOSSES:
            isolations.clear()
        isolations[id(self.loss), training] = Isolation(
            self.model, self.modules, self.loss, found["purity", training]
        )

    @property
    def isolation(self) -> Isolation:
        """The contexts that isolate an evaluation, from the results of `prepare` if it has run."""
        prepared = self.structure.isolations.get((id(self.loss), self.model.training))
        return prepared or Isolation(self.model, self.structure.modules, self.loss, self._known_purity())

    def _known_purity(self) -> Purity:
        found, training = findings(self.model, self.loss), self.model.training
        return found.get(("purity", training)) or found.setdefault(("not examined", training), Purity())

    def losses(
        self, batch: Any, key: Key, before: Callable[[int], None] = lambda number: None
    ) -> Generator[WeightedLoss, None, None]:
        """Yield the weight and the loss of each micro-batch, in order.

        A loss has an autograd graph if gradients are enabled. The model stays isolated until the next loss is
        requested, so a backward pass on the current loss changes no buffer or generator.

        Args:
            batch: any pytree.
            key: seeds the random layers.
            before: called with the number of each micro-batch, before its forward pass.
        Yields:
            (weight, loss, rescale). Law: total = rescale * total + weight * loss, with total = 0 before the first
            micro-batch; the loss of the batch is the last total.
        Raises:
            Unsupported: the loss of the batch is not determined by the losses of its micro-batches.
        """
        is_known = (id(self.loss), self.model.training) in self.structure.isolations
        if not is_known and torch._C._len_torch_function_stack() == 0:
            self.prepare(batch, key)
        self.structure.check(self.leaves)
        isolation = self.isolation
        weights = Weights(self.model, self.loss, self.parts) if self.parts > 1 else None
        for number, (fraction, micro_batch) in enumerate(split(batch, self.parts)):
            torch.clear_autocast_cache()  # inside one region, it has casts of weights from before an update
            before(number)
            # Do not rename "part": the random bits of every run depend on this name.
            part_key = key.fold("part", number)
            with isolation.entered(part_key), seeded_generators(part_key, self.devices):
                if weights is None:
                    yield WeightedLoss(1.0, self.scalar_loss(micro_batch), 1.0)
                else:
                    yield weights.of(fraction, weights.observed(functools.partial(self.scalar_loss, micro_batch)))

    @interruptible
    def advance(self, batch: Any, key: Key) -> None:
        """Run one forward pass that changes the state of the model, as a training step in torch does.

        The state is buffers and attributes: BatchNorm's running statistics, the vectors of spectral normalisation,
        moving averages, codebooks, hidden states. Call `advance` after the estimate and before the optimizer's step,
        as `train` does: then both see the weights and the state of a step in torch. If the first call finds that a
        forward pass changes nothing, as in eval mode, later calls make none.

        Args:
            batch: any pytree; passed to the loss without a split into micro-batches.
            key: seeds the random layers.
        """
        known = moving(self, batch, key)
        if known:
            next_state(self, batch, key, known).install()

    def scalar_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch, without isolation, seeding or micro-batches. The batch stays unchanged.

        Raises:
            BadInput: the loss is no scalar of a floating type, at its first evaluation writes into the batch, or
                writes into a parameter through `.data`.
        """
        isolation = self.isolation
        with_bits = isolation.purity.exposes_weights and can_check(self.model)
        return without_writes(isolation, with_bits, lambda: self._scalar_loss(batch, isolation.purity))

    def _scalar_loss(self, batch: Any, purity: Purity) -> Tensor:
        if purity.writes_batch:
            return self._checked(self.loss(self.model, copied(batch)))
        records = watch(batch)
        try:
            loss = self.loss(self.model, batch)
        finally:
            written = put_back(records)
        if written:
            purity.writes_batch = True  # later evaluations get a copy
            if not is_fake(written[0]):
                raise BadInput(
                    f"the loss wrote into `{name_in(batch, written[0])}` in place, but not at its first use, so this "
                    "batch is changed. Repeat the step with the batch as it was: the loss now gets copies."
                )
        return self._checked(loss)

    def _checked(self, loss: Any) -> Tensor:
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
        BadInput: the model or the loss raised; the message has the type and the first line of the exception, and the
            line of the user's code. A GradcostError is not converted.
    """
    try:
        yield
    except GradcostError:
        raise
    except Exception as error:
        model = type(objective.model).__name__
        raise BadInput(
            f"the loss of {model} cannot be evaluated on this batch: {brief(error)}{line_of(error)}"
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
    sizes = [real_count(parameter) for _, parameter in parameters]
    *starts, dimension = itertools.accumulate(sizes, initial=0)
    return tuple(Leaf(*named, start, dimension) for named, start in zip(parameters, starts, strict=True))
