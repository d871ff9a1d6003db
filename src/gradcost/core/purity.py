"""Find out, at first use, what an evaluation of a loss changes; isolate that at each later evaluation.

A finite difference compares two evaluations, so a loss must be a function of weights, batch and key alone. An
examination evaluates the loss twice under one key. It finds modules and random generators outside of the model, state
that changes in place, and writes into the batch. What cannot be isolated is refused with a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.given_batch import contents, copied
from gradcost.core.interrupts import undoing
from gradcost.core.isolation import isolated_modules, seeded_objects, shared_storages
from gradcost.core.key import Key
from gradcost.core.mutable_state import Named, Saved, Traversal, same_bits, version_of
from gradcost.core.notes import warn_once

Root = tuple[str, str]  # the name of a module, and of an attribute


@dataclass
class Purity:
    """What an examination found. It holds names, not objects, so it keeps no model in memory.

    Args:
        writes_batch: the loss writes into its batch, so each evaluation gets a copy.
        attributes: attributes of modules that hold a random generator, or that change in place.
        has_class_state: attributes of a class of the modules change.
        reaches_modules: the loss reaches modules outside of the model.
        reaches_generators: the loss reaches random generators of its own.
        has_loss_state: the loss depends on state in closures, defaults or globals that it changes.
        has_views: buffers share memory with one another, or with attributes.
        moved: buffers that an evaluation changes, by name.
    """

    writes_batch: bool = False
    attributes: frozenset[Root] = frozenset()
    has_class_state: bool = False
    reaches_modules: bool = False
    reaches_generators: bool = False
    has_loss_state: bool = False
    has_views: bool = False
    moved: tuple[str, ...] = ()


class Isolation:
    """The contexts in which one loss of one model is evaluated.

    Args:
        model: the model.
        modules: its modules.
        loss: the loss.
        purity: what the examination found, or is about to find.
    """

    def __init__(self, model: nn.Module, modules: tuple[nn.Module, ...], loss: Any, purity: Purity) -> None:
        self.model, self.loss, self.purity = model, loss, purity
        self.modules = modules
        if purity.reaches_modules:
            known = set(modules)
            self.modules += tuple(module for _, module in _reached(model, loss).modules if module not in known)
        self.named = _named(model, self.modules)
        self.generators = _outside(self, loss).generators if purity.reaches_generators else []

    def containers(self) -> list[tuple[nn.Module, str]]:
        """Return the attributes of modules that change in place, or that hold a random generator."""
        named = dict(self.named)
        return [(named[name], attribute) for name, attribute in sorted(self.purity.attributes)]

    def entered(self, key: Key) -> AbstractContextManager[list[Named] | None]:
        """Isolate the model: attributes, buffers, and the state and generators that the examination found."""
        found = self.purity
        if found.attributes or found.has_class_state or found.reaches_generators or found.has_loss_state:
            return self._entered(key)
        return isolated_modules(self.modules, found.has_views)

    @contextmanager
    def _entered(self, key: Key) -> Iterator[list[Named]]:
        traversal = Traversal(skipped=_tensors_of(self.modules))
        found = self.purity
        for name, module in self.named:
            for attribute in [attribute for owner, attribute in found.attributes if owner == name]:
                traversal.visit(attribute, vars(module).get(attribute))
            if found.has_class_state:
                _visit_classes(traversal, module)
        traversal.objects += _outside(self, self.loss).objects if found.has_loss_state else []
        saved = Saved(traversal.objects)
        generators = [value for _, value in (*traversal.generators, *self.generators)]
        with undoing(saved.restore), isolated_modules(self.modules, found.has_views), seeded_objects(key, generators):
            yield traversal.objects


# Evaluates the loss once: (isolation, batch, what to call at the end, before anything is put back) -> the loss.
Evaluate = Callable[[Isolation, Any, Callable[[], None]], Tensor]


def examine(model: nn.Module, modules: tuple[nn.Module, ...], loss: Any, batch: Any, evaluate: Evaluate) -> Purity:
    """Evaluate the loss twice and return what has to be isolated. Everything is as before afterwards.

    Args:
        model: the model.
        modules: its modules.
        loss: the loss.
        batch: any pytree.
        evaluate: evaluates the loss once, always with the same key.
    Raises:
        BadInput: an evaluation writes into a parameter. The message names it.
        Unsupported: two evaluations give two losses. The message names the first module whose output differs.
    """
    reached, purity = _reached(model, loss), Purity()
    purity.reaches_modules = len(reached.modules) > len(modules)
    isolation = Isolation(model, modules, loss, purity)
    purity.has_views = bool(shared_storages(isolation.modules))
    inside, owners = Traversal(skipped=_tensors_of(isolation.modules)), []
    for name, module in isolation.named:
        for attribute, value in list(vars(module).items()):
            if attribute not in ("_parameters", "_buffers", "_modules"):
                generators = len(inside.generators)
                inside.visit(f"{name}.{attribute}" if name else attribute, value)
                owners += [(name, attribute)] * (len(inside.objects) - len(owners))
                if len(inside.generators) > generators:
                    purity.attributes |= {(name, attribute)}
        _visit_classes(inside, module)
        owners += [None] * (len(inside.objects) - len(owners))
    outside = _outside(isolation, loss)
    purity.reaches_generators, isolation.generators = bool(outside.generators), outside.generators
    states = Saved(inside.objects), Saved(outside.objects)
    try:
        _examine(isolation, batch, evaluate, states, dict(zip(map(_identity, inside.objects), owners, strict=True)))
    finally:
        for saved in states:
            saved.restore()
    return purity


def _examine(
    isolation: Isolation,
    batch: Any,
    evaluate: Evaluate,
    states: tuple[Saved, Saved],
    owners: dict[int, Root | None],
) -> None:
    purity, (inside, outside) = isolation.purity, states
    try:
        given = copied(batch)
    except Unsupported:
        given = batch  # right unless the loss writes into it
    as_given, weights = Saved(contents(given)), _checksums(isolation)
    originals = {id(module): dict(module._buffers) for module in isolation.modules}
    moved: list[str] = []

    def compare_buffers() -> None:
        for name, module in isolation.named:
            for key, buffer in originals[id(module)].items():
                now = module._buffers.get(key)
                if now is None or buffer is None or not same_bits(now, buffer):
                    moved.extend([f"{name}.{key}" if name else key] if now is not buffer else [])

    registries = [dict(module._parameters) for module in isolation.modules]
    first = evaluate(isolation, given, compare_buffers)
    _refuse_new_parameters(isolation, registries)
    _refuse_written_weights(isolation, weights)
    purity.moved, purity.writes_batch = tuple(moved), bool(as_given.changed())
    roots = [owners[_identity(changed)] for changed in inside.changed()]
    purity.attributes |= {root for root in roots if root is not None}
    purity.has_class_state = None in roots
    inside.restore()
    if given is batch:
        as_given.restore()
    changed = outside.changed()

    def again() -> Tensor:
        return evaluate(
            isolation, copied(batch) if given is not batch or purity.writes_batch else batch, lambda: None
        )

    if not _is_same_loss(first, again(), isolation.model):
        outside.restore()
        purity.has_loss_state = bool(changed)
        if not changed or not _is_same_loss(first, again(), isolation.model):
            raise Unsupported(_difference(isolation, again))
    elif counters := outside.counters():
        names = ", ".join(f"`{name}`" for name in counters[:3])
        warn_once(
            isolation.model,
            "state outside of the model",
            f"an evaluation of the loss changes {names}, and gradcost does not restore it, because the loss is the "
            "same afterwards. The loss must not depend on it later either.",
        )


def _reached(model: nn.Module, loss: Any) -> Traversal:
    """Return everything that the model and the loss reach, functions included."""
    traversal = Traversal(follow_functions=True)
    traversal.visit("", model)
    traversal.visit("loss", loss)
    return traversal


def _outside(isolation: Isolation, loss: Any) -> Traversal:
    """Return what functions reach: the loss, hooks, and methods of the modules' classes. Modules are not entered."""
    inside = Traversal(skipped=_tensors_of(isolation.modules))
    for name, module in isolation.named:
        inside.visit(name, {key: value for key, value in vars(module).items() if key != "_modules"})
        _visit_classes(inside, module)
    functions = {id(function) for _, function in inside.functions}
    skipped = [value for key, value in inside.seen.items() if key not in functions]
    outside = Traversal(follow_functions=True, skipped=skipped)
    for name, function in (*inside.functions, ("loss", loss)):
        outside.visit(name, function)
    return outside


def _visit_classes(traversal: Traversal, module: nn.Module) -> None:
    for kind in type(module).__mro__:
        traversal.visit(kind.__qualname__, kind)


def _tensors_of(modules: tuple[nn.Module, ...]) -> list[Any]:
    """Return the modules, their buffers, and the dictionaries of both: a traversal does not enter them."""
    tensors = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
    return [*modules, *tensors]


def _named(model: nn.Module, modules: tuple[nn.Module, ...]) -> list[tuple[str, nn.Module]]:
    """Return the modules with their names in the model; those outside of it by type and number."""
    names = {id(module): name for name, module in model.named_modules()}
    return [
        (names.get(id(module), f"{type(module).__name__} number {number}, outside of the model"), module)
        for number, module in enumerate(modules)
    ]


def _identity(named: Named) -> int:
    return id(named[1])


def _checksums(isolation: Isolation) -> list[tuple[str, nn.Parameter, tuple[Any, ...]]]:
    """Return each parameter with its version and a sum of its bits, so that no copy is needed."""
    return [
        (f"{name}.{key}" if name else key, parameter, _checksum(parameter))
        for name, module in isolation.named
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def _checksum(parameter: nn.Parameter) -> tuple[Any, ...]:
    version = version_of(parameter)
    values = parameter.detach()
    if values.layout != torch.strided or values.dtype not in _WORDS or values.is_meta:
        return version, parameter.data_ptr() if values.layout == torch.strided else None
    return version, int(values.view(_WORDS[values.dtype]).sum(dtype=torch.int64))


_WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _refuse_new_parameters(isolation: Isolation, before: list[dict[str, Any]]) -> None:
    for (name, module), parameters in zip(isolation.named, before, strict=True):
        held = module._parameters.keys()  # a module of TorchScript has no other iterator
        for key in [key for key in held if key not in parameters]:
            del module._parameters[key]
            path = f"{name}.{key}" if name else key
            raise BadInput(
                f"the first evaluation of the loss makes the parameter `{path}`, which is no leaf of the "
                "objective. Make the Objective after one forward pass of the model."
            )


def _refuse_written_weights(isolation: Isolation, before: list[tuple[str, nn.Parameter, tuple[Any, ...]]]) -> None:
    for name, parameter, checksum in before:
        if _checksum(parameter) != checksum:
            raise BadInput(
                f"an evaluation of the loss writes into the parameter `{name}`, so the next one has other weights. "
                "Write it after the step instead, or make it a buffer."
            )


def _is_same_loss(one: Tensor, other: Tensor, model: nn.Module) -> bool:
    """Return whether two losses agree to their last bits; on a GPU, whose sums are not repeatable, roughly."""
    a, b = float(one), float(other)
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} | {one.dtype}
    coarsest = one.dtype if one.device.type == "cpu" else max(kinds, key=lambda dtype: torch.finfo(dtype).eps)
    return abs(a - b) <= 16 * torch.finfo(coarsest).eps * max(abs(a), abs(b))


def _difference(isolation: Isolation, again: Callable[[], Tensor]) -> str:
    """Return a message with the first module whose output differs between two evaluations."""
    records: list[list[tuple[str, list[Tensor]]]] = []
    for _ in range(2):
        outputs: list[tuple[str, list[Tensor]]] = []
        with ExitStack() as stack:
            for name, module in isolation.named:

                def hook(module: nn.Module, args: Any, output: Any, name: str = name, to: Any = outputs) -> None:
                    found = [value.detach().clone() for _, value in contents(output) if isinstance(value, Tensor)]
                    to.append((name, found))

                stack.callback(module.register_forward_hook(hook).remove)
            again()
        records.append(outputs)
    for (name, one), (other_name, other) in zip(*records, strict=False):
        same = name == other_name and len(one) == len(other) and all(map(same_bits, one, other))
        if not same:
            where = f"`{name or type(isolation.model).__name__}`"
            return f"{where} gives another output at a second evaluation of the loss {_UNKNOWN_STATE}"
    return f"the loss gives another value at a second evaluation {_UNKNOWN_STATE}"


_UNKNOWN_STATE = (
    "with the same weights, batch and key. It depends on a state or on random numbers that cannot be restored, so no "
    "estimate of its gradient is right. Keep the state in buffers or attributes, and draw with torch's generator."
)
