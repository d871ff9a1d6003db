"""The state that a training forward pass leaves in a model: the buffers and attributes that it changes.

An estimate evaluates the loss several times and changes nothing. A training step in torch makes one forward pass,
which changes running statistics of BatchNorm, vectors of spectral normalisation, moving averages and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradcost.core.batching.micro_batches import first_part
from gradcost.core.errors import BadInput
from gradcost.core.evaluation.gradient_mode import evaluated
from gradcost.core.evaluation.mutable_state import SCALARS, Named, is_generator, tensors_in
from gradcost.core.evaluation.saved_state import Saved, is_same_value, same_bits
from gradcost.core.evaluation.structure import MOST_LOSSES
from gradcost.core.fake import is_fake
from gradcost.core.isolation import seeded_generators
from gradcost.core.key import Key
from gradcost.core.pytree import operands

T = TypeVar("T")
Place = tuple[nn.Module, str]  # (module, name of one of its buffers or attributes)
_MISSING = object()


@dataclass(frozen=True, eq=False)
class Moving:
    """What every forward pass of a model changes.

    Args:
        modules: the modules with a buffer that changes.
        attributes: the attributes that are set to another value even in a second forward pass on the same batch. A
            cached table is not one of them.
        has_containers: containers, or tensors that are not buffers, change in place, and in a second forward pass by
            value. A dictionary in which hooks collect features is not one of them.
    """

    modules: frozenset[nn.Module] = frozenset()
    attributes: frozenset[Place] = frozenset()
    has_containers: bool = False

    def __bool__(self) -> bool:
        return bool(self.modules or self.attributes or self.has_containers)


@dataclass(frozen=True, eq=False)
class NextState:
    """Buffers, attributes and containers after a forward pass.

    Args:
        buffers: (module and name, value, whether the buffer was changed in place).
        attributes: (module and name, value).
        containers: the content of all containers; None if no container changes.
    """

    buffers: Sequence[tuple[Place, Tensor | None, bool]]
    attributes: Sequence[tuple[Place, Any]]
    containers: Saved | None

    def install(self) -> None:
        """Give the model this state. A buffer that was changed in place remains the same tensor."""
        with torch.no_grad():
            for (module, name), value, in_place in self.buffers:
                buffer = module._buffers.get(name)
                if in_place and buffer is not None and value is not None and buffer.shape == value.shape:
                    buffer.copy_(value)
                else:
                    module._buffers[name] = value
        for (module, name), value in self.attributes:
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value.detach() if isinstance(value, Tensor) else value
        if self.containers is not None:
            self.containers.restore()


def moving(objective: Any, batch: Any, key: Key) -> Moving:
    """Return what a forward pass of the objective changes. All changes are undone.

    Cost: one forward pass; a second one if it changes attributes or containers. Later calls for the same model,
    loss and train/eval flags return the first result. On fake tensors, a buffer changes if torch's version counter
    records a write, and a tensor in an attribute if it is computed from earlier state or from random numbers.

    Args:
        objective: the Objective.
        batch: any pytree. The first micro-batch is passed to the loss.
        key: seeds the random layers.
    """
    objective.prepare(batch, key)
    results = objective.structure.moving
    identity = id(objective.loss), tuple([module.training for module in objective.modules])
    known = results.get(identity)
    if known is None or known[0] is not objective.loss:  # another loss at the address of one that was freed
        if len(results) > MOST_LOSSES:
            results.clear()
        found = _isolated(objective, first_part(batch, objective.parts), key, _find_moving)
        known = results[identity] = objective.loss, found
    return known[1]


def _find_moving(modules: Sequence[nn.Module], containers: list[Named], forward: Callable[[], object]) -> Moving:
    first, before = _Record(modules, with_bits=True), Saved(containers)
    forward()
    changed = frozenset(module for module, _ in first.changed_buffers())
    if not first.changed_attributes() and not before.changed():
        return Moving(changed)
    second, before = _Record(modules), Saved(containers)
    forward()
    moved = set(second.changed_attributes(by_value=True))
    replaced = {place for place in second.changed_attributes() if any(map(is_fake, _tensors_at(place)))} - moved
    in_containers = bool(before.changed(by_value=True))
    fakes = [] if in_containers else [tensor for tensor in before.new_tensors() if is_fake(tensor)]
    if replaced or fakes:  # the values are unknown
        third, before = _Record(modules), Saved(containers)
        state = [tensor for place in (*second.changed_buffers(), *replaced) for tensor in _tensors_at(place)]
        with _Dependents((*state, *fakes)) as dependents:
            forward()
        again = replaced.intersection(third.changed_attributes())
        moved |= {place for place in again if any(map(dependents.has, _tensors_at(place)))}
        in_containers = in_containers or any(map(dependents.has, before.new_tensors()))
    return Moving(changed, frozenset(moved), in_containers)


def _tensors_at(place: Place) -> list[Tensor]:
    module, name = place
    return tensors_in([module._buffers.get(name), module.__dict__.get(name)])


class _Dependents(TorchDispatchMode):
    """Follows which storages hold results that depend on given tensors or on random numbers."""

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is reused
        for tensor in sources:
            self._add(tensor)

    def has(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._storages

    def _add(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # In train mode, the output of a batch normalisation does not depend on its running statistics.
        read = args[:3] if "batch_norm" in str(func) and len(args) > 5 and args[5] is True else (args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags or any(map(self.has, operands(read))):
            for tensor in operands((out,)):
                self._add(tensor)
        return out


def next_state(objective: Any, batch: Any, key: Key, known: Moving) -> NextState:
    """Make a forward pass and return the state after it. The model does not change before `install`.

    Args:
        objective: the Objective.
        batch: any pytree; passed to the loss without a split into micro-batches.
        key: seeds the random layers.
        known: what `moving` returned.
    """

    def after(modules: Sequence[nn.Module], containers: list[Named], forward: Callable[[], object]) -> NextState:
        record = _Record(modules, with_attributes=False)
        forward()
        places = dict.fromkeys(record.changed_buffers())
        places |= dict.fromkeys((module, name) for module in known.modules for name in module._buffers)
        return NextState(
            [(place, place[0]._buffers[place[1]], record.is_in_place(place)) for place in places],
            [((module, name), module.__dict__.get(name, _MISSING)) for module, name in known.attributes],
            Saved(containers) if known.has_containers else None,
        )

    return _isolated(objective, batch, key, after)


def carried(objective: Any) -> list[tuple[int, str, str, Any]]:
    """Return the state, other than the model's parameters and buffers, on which the next training step depends.

    Returns:
        (index of the module in `isolation.modules`, "_buffers" or "", name, value) of each buffer outside of the
        model, and of each attribute that training steps have changed.
    Raises:
        BadInput: the loss changes state in closures, classes or globals, and its value depends on that state.
    """
    isolation = objective.isolation
    modules, model_size = isolation.modules, len(objective.modules)
    state: dict[tuple[int, str, str], Any] = {}
    numbers = {module: number for number, module in enumerate(modules)}
    for _, known in objective.structure.moving.values():
        purity = isolation.purity
        if known.has_containers and (purity.has_class_state or purity.has_loss_state):
            raise BadInput(
                "the loss depends on state that it changes in a class, closure or global. A training checkpoint "
                "cannot store this state: put it into an attribute or a buffer of a module."
            )
        for module in known.modules:
            if numbers[module] >= model_size:  # outside of the model
                state |= {(numbers[module], "_buffers", name): b for name, b in module._buffers.items()}
        attributes = [(module, name) for module, name in known.attributes]
        if known.has_containers:
            attributes += isolation.containers()
        for module, name in attributes:
            if name in module.__dict__ and not is_generator(module.__dict__[name]):
                state[numbers[module], "", name] = module.__dict__[name]
    return [(*place, value) for place, value in state.items()]


def restore(objective: Any, state: Sequence[tuple[int, str, str, Any]]) -> None:
    """Give the modules the state that `carried` returned for the same objective.

    Raises:
        BadInput: the state belongs to modules outside of the model, and the loss has not been examined.
    """
    modules = objective.isolation.modules
    for number, registry, name, value in state:
        if number >= len(modules):
            raise BadInput(
                "this training checkpoint holds buffers of modules that only the loss reaches: call "
                "`objective.prepare(batch, key)` before loading it, as `train` does."
            )
        holder = modules[number]._buffers if registry else modules[number].__dict__
        holder[name] = value


def _isolated(
    objective: Any,
    batch: Any,
    key: Key,
    observe: Callable[[Sequence[nn.Module], list[Named], Callable[[], object]], T],
) -> T:
    """Return `observe(modules, containers, forward)`, called in isolation. `forward()` makes one forward pass."""
    results: list[T] = []

    def evaluate() -> Tensor:
        losses: list[Tensor] = []
        torch.clear_autocast_cache()
        # Do not fold the key: it seeds dropout, so folding changes the running statistics of layers after dropout.
        with objective.isolation.entered(key) as containers, seeded_generators(key, objective.devices):
            modules = objective.isolation.modules
            results.append(observe(modules, containers or [], lambda: losses.append(objective.scalar_loss(batch))))
        return losses[-1]

    evaluated(objective, batch, key, evaluate)
    return results[-1]


class _Record:
    """A snapshot of the buffers and attributes of modules, to find later changes."""

    def __init__(self, modules: Iterable[nn.Module], with_bits: bool = False, with_attributes: bool = True) -> None:
        self.modules = list(modules)
        self._buffers = {
            (module, name): (buffer, -1 if buffer is None else buffer._version)
            for module in self.modules
            for name, buffer in module._buffers.items()
        }
        self._bits = {place: _copy(buffer) for place, (buffer, _) in self._buffers.items()} if with_bits else {}
        self._attributes = [module.__dict__.copy() for module in self.modules] if with_attributes else []

    def is_in_place(self, place: Place) -> bool:
        return place in self._buffers and self._buffers[place][0] is place[0]._buffers[place[1]]

    def changed_buffers(self) -> list[Place]:
        """Return the buffers that were replaced or written."""
        now = {(module, name): buffer for module in self.modules for name, buffer in module._buffers.items()}
        return [place for place, buffer in now.items() if self._has_changed(place, buffer)]

    def _has_changed(self, place: Place, buffer: Tensor | None) -> bool:
        if not self.is_in_place(place):
            return True
        if buffer is None:
            return False
        bits = self._bits.get(place)  # BatchNorm's kernel does not increment the version counter
        return buffer._version != self._buffers[place][1] or (bits is not None and not same_bits(buffer, bits))

    def changed_attributes(self, by_value: bool = False) -> list[Place]:
        """Return the attributes that were set to another object; with `by_value`, to another value."""
        return [place for place, before, now in self._differing() if not (by_value and is_same_value(before, now))]

    def _differing(self) -> Iterator[tuple[Place, Any, Any]]:
        for module, before in zip(self.modules, self._attributes, strict=True):
            now = module.__dict__
            for name in before.keys() | now.keys():
                old, new = before.get(name, _MISSING), now.get(name, _MISSING)
                if old is not new and not (isinstance(new, SCALARS) and type(old) is type(new) and old == new):
                    yield (module, name), old, new


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None or is_fake(buffer) else buffer.detach().clone()
