"""Find out, at first use, what an evaluation of a loss changes; isolate that at each later evaluation.

A finite difference compares two evaluations, so a loss must be a function of weights, batch and key alone. An
examination evaluates the loss twice under one key. It finds modules and random generators outside of the model, state
that changes in place, and writes into the batch. If the two losses differ, it raises; the message names the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gradcost.core.batching.given_batch import contents, copied
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.evaluation.compiled import is_compiled
from gradcost.core.evaluation.first_use import is_due
from gradcost.core.evaluation.mutable_state import Named, Traversal
from gradcost.core.evaluation.reached_state import (
    Root,
    attribute_state,
    everything,
    function_state,
    modules_and_buffers,
    named_modules,
    visit_classes,
)
from gradcost.core.evaluation.saved_state import Saved, same_bits
from gradcost.core.evaluation.weight_writes import Reads, checksums, refuse_writes
from gradcost.core.fake import is_fake
from gradcost.core.interrupts import undoing
from gradcost.core.isolation import isolated_modules, seeded_objects, shared_storages
from gradcost.core.key import Key
from gradcost.core.notes import warn_once


@dataclass
class Purity:
    """What an examination found. It stores names instead of objects, so that the model can be freed.

    Args:
        writes_batch: the loss writes into its batch, so each evaluation gets a copy.
        attributes: module attributes that contain a random generator or change in place.
        has_class_state: attributes of the modules' classes change.
        reaches_modules: the loss reaches modules outside of the model.
        reaches_generators: the loss, hooks or methods reach random generators that no module attribute contains.
        has_loss_state: the loss changes state in closures, defaults or globals that its value may depend on.
        has_views: buffers share memory with one another, or with attributes.
        moved: names of the buffers that an evaluation changes.
        exposes_weights: the loss reads `.data` of parameters, so each evaluation checks that it writes none.
        uses: number of estimates so far.
    """

    writes_batch: bool = False
    attributes: frozenset[Root] = frozenset()
    has_class_state: bool = False
    reaches_modules: bool = False
    reaches_generators: bool = False
    has_loss_state: bool = False
    has_views: bool = False
    moved: tuple[str, ...] = ()
    exposes_weights: bool = False
    uses: int = field(default=0, compare=False)

    def is_due(self) -> bool:
        """Count a use. Return whether the examination is repeated at this one."""
        self.uses += 1
        return is_due(self.uses)

    def extended(self, later: Purity) -> Purity:
        """Return what this examination and a later one found."""
        merged = {f.name: getattr(self, f.name) | getattr(later, f.name) for f in fields(self) if f.name != "moved"}
        return Purity(**merged | {"moved": later.moved, "uses": self.uses})


class Isolation:
    """Contexts that isolate the evaluations of one loss on one model.

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
            self.modules += tuple(module for _, module in everything(model, loss).modules if module not in known)
        self.named = named_modules(model, self.modules)
        with torch._C.DisableTorchFunction():
            parameters = [p for module in self.modules for p in module._parameters.values() if _has_version(p)]
        self.parameters = list(dict.fromkeys(parameters))
        self.generators = function_state(self.named, loss).generators if purity.reaches_generators else []

    def containers(self) -> list[tuple[nn.Module, str]]:
        """Return (module, attribute name) of each attribute that changes in place or contains a random generator."""
        named = dict(self.named)
        return [(named[name], attribute) for name, attribute in sorted(self.purity.attributes)]

    def entered(self, key: Key) -> AbstractContextManager[list[Named] | None]:
        """Return a context that isolates attributes, buffers, and state and generators that the examination found."""
        purity = self.purity
        if purity.attributes or purity.has_class_state or purity.reaches_generators or purity.has_loss_state:
            return self._entered(key)
        return isolated_modules(self.modules, purity.has_views)

    @contextmanager
    def _entered(self, key: Key) -> Iterator[list[Named]]:
        traversal = Traversal(skipped=modules_and_buffers(self.named))
        purity = self.purity
        for name, module in self.named:
            for attribute in [attribute for owner, attribute in purity.attributes if owner == name]:
                traversal.visit(attribute, vars(module).get(attribute))
            if purity.has_class_state:
                visit_classes(traversal, module)
        traversal.objects += function_state(self.named, self.loss).objects if purity.has_loss_state else []
        saved = Saved(traversal.objects)
        generators = [value for _, value in (*traversal.generators, *self.generators)]
        with (
            undoing(saved.restore),
            isolated_modules(self.modules, purity.has_views),
            seeded_objects(key, generators),
        ):
            yield traversal.objects


# Evaluates the loss once: (isolation, batch, callback) -> loss. It calls the callback before it restores any state.
Evaluate = Callable[[Isolation, Any, Callable[[], None]], Tensor]


def examine(model: nn.Module, modules: tuple[nn.Module, ...], loss: Any, batch: Any, evaluate: Evaluate) -> Purity:
    """Evaluate the loss twice and return what has to be isolated. All changed state is restored.

    Args:
        model: the model.
        modules: its modules.
        loss: the loss.
        batch: any pytree.
        evaluate: evaluates the loss once, always with the same key.
    Raises:
        BadInput: an evaluation writes into a parameter or adds one. The message names the parameter.
        Unsupported: two evaluations give two losses. The message names the first module whose output differs.
    """
    reached, purity = everything(model, loss), Purity()
    purity.reaches_modules = len(reached.modules) > len(modules)
    isolation = Isolation(model, modules, loss, purity)
    purity.has_views = bool(shared_storages(isolation.modules))
    inside, owners, with_generators = attribute_state(isolation.named)
    purity.attributes |= with_generators
    outside = function_state(isolation.named, loss)
    purity.reaches_generators, isolation.generators = bool(outside.generators), outside.generators
    states = Saved(inside.objects), Saved(outside.objects)
    try:
        _examine(isolation, batch, evaluate, states, owners)
    finally:
        for saved in states:
            saved.restore()
    return purity


@contextmanager
def examining_attributes(isolation: Isolation) -> Iterator[None]:
    """Find the attributes that evaluations in this context change in place, and restore them: for fake tensors."""
    inside, owners, with_generators = attribute_state(isolation.named)
    isolation.purity.attributes |= with_generators
    before = Saved(inside.objects)
    try:
        yield
        _note_changes(isolation.purity, before, owners)
    finally:
        before.restore()


def _note_changes(purity: Purity, inside: Saved, owners: dict[int, Root | None]) -> None:
    roots = [owners[id(value)] for _, value in inside.changed()]
    purity.attributes |= {root for root in roots if root is not None}
    purity.has_class_state |= None in roots


def _examine(
    isolation: Isolation,
    batch: Any,
    evaluate: Evaluate,
    states: tuple[Saved, Saved],
    owners: dict[int, Root | None],
) -> None:
    purity, (inside, outside) = isolation.purity, states
    try:
        first_batch = copied(batch)
    except Unsupported:
        first_batch = batch  # no copy is needed unless the loss writes into the batch; then `again` raises
    before, weights = Saved(contents(first_batch)), checksums(isolation.named)
    originals = {id(module): dict(module._buffers) for module in isolation.modules}
    moved: list[str] = []

    def compare_buffers() -> None:
        for name, module in isolation.named:
            for key, buffer in originals[id(module)].items():
                now = module._buffers.get(key)
                if now is None or buffer is None or not same_bits(now, buffer):
                    moved.extend([f"{name}.{key}" if name else key] if now is not buffer else [])

    registries = [dict(module._parameters) for module in isolation.modules]
    reads = Reads()
    watched = nullcontext() if any(map(is_compiled, isolation.modules)) else reads
    with watched:
        first = evaluate(isolation, first_batch, compare_buffers)
    purity.exposes_weights = any(parameter is tensor for _, parameter, _ in weights for tensor in reads.of_data)
    for name, parameter, _ in weights:
        if any(parameter is tensor for tensor in reads.of_grad):
            raise Unsupported(
                f"the loss reads `.grad` of `{name}`. An estimate sets it aside during the backward pass, so the "
                "loss would depend on the method. Copy what the loss needs into a buffer after each step."
            )
    _refuse_new_parameters(isolation, registries)
    refuse_writes(weights)
    purity.moved, purity.writes_batch = tuple(moved), bool(before.changed())
    _note_changes(purity, inside, owners)
    inside.restore()
    if first_batch is batch:
        before.restore()
    del before  # a copy of the batch
    changed = outside.changed()

    def again() -> Tensor:
        batch_again = copied(batch) if purity.writes_batch else first_batch
        with watched:  # under a function mode, nn.TransformerEncoder leaves out its fast path, as in training
            return evaluate(isolation, batch_again, lambda: None)

    if not _is_same_loss(first, again(), isolation.model):
        outside.restore()
        purity.has_loss_state = bool(changed)
        if not changed or not _is_same_loss(first, again(), isolation.model):
            raise Unsupported(_difference(isolation, again))
    elif outside.filled():
        purity.has_loss_state = True  # the loss may read a queue once it is full
    elif counters := outside.counters():
        names = ", ".join(f"`{name}`" for name in counters[:3])
        warn_once(
            isolation.model,
            "state outside of the model",
            f"an evaluation of the loss changes {names}. gradcost does not restore this state, because the next "
            "evaluation gave the same loss. The loss must not depend on this state in later evaluations either.",
        )


def _has_version(parameter: Any) -> TypeGuard[nn.Parameter]:
    is_ordinary = isinstance(parameter, Tensor) and parameter.layout == torch.strided and not is_fake(parameter)
    return is_ordinary and not parameter.is_meta and not parameter.is_inference()


def _refuse_new_parameters(isolation: Isolation, before: list[dict[str, Any]]) -> None:
    for (name, module), parameters in zip(isolation.named, before, strict=True):
        keys = module._parameters.keys()  # TorchScript's registry can be iterated only by its keys()
        for key in [key for key in keys if key not in parameters]:
            del module._parameters[key]
            path = f"{name}.{key}" if name else key
            raise BadInput(
                f"the first evaluation of the loss makes the parameter `{path}`, which is not a leaf of the "
                "objective. Make the Objective after one forward pass of the model."
            )


def _is_same_loss(one: Tensor, other: Tensor, model: nn.Module) -> bool:
    """Return whether two losses differ by at most 16 machine epsilons (on a GPU: of the coarsest dtype)."""
    a, b = float(one), float(other)
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} | {one.dtype}
    # The sums of a GPU are not repeatable.
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
                    tensors = [value.detach().clone() for _, value in contents(output) if isinstance(value, Tensor)]
                    to.append((name, tensors))

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
