"""Check, at the first use of recomputation, which blocks compute the same when they run again (a rerun)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradcost.checkpointing.caches import CacheRule
from gradcost.checkpointing.call_state import BlockModules, reads_buffers, statistics_of
from gradcost.checkpointing.containers import is_same_copy, packed, tensors_in
from gradcost.checkpointing.kept_outputs import KeptOutputs
from gradcost.checkpointing.region import Call, Forward, Region, run_call
from gradcost.checkpointing.versioned_tensor import RecomputationError
from gradcost.core import memory_events
from gradcost.core.bits import bits_of
from gradcost.core.blocks import Block
from gradcost.core.errors import first_line
from gradcost.core.evaluation.first_use import can_check, findings, is_due
from gradcost.core.evaluation.generator_states import numpy_words, python_state
from gradcost.core.evaluation.mutable_state import is_generator
from gradcost.core.evaluation.saved_state import version_of
from gradcost.core.interrupts import raise_interrupt
from gradcost.core.key import Key
from gradcost.core.notes import warn_once
from gradcost.core.objective import Objective
from gradcost.core.precision import coarsest

RegionCall = Callable[[Region, Forward, Any, Any, BlockModules, KeptOutputs | None], Any]
Routed = Callable[["Replay", RegionCall, CacheRule], AbstractContextManager[None]]

_MAX_PASSES = 6  # of the check. Each restores the state that earlier passes found, and runs blocks that they skipped
_WRITES_AFTER_SAVING = {F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_, torch.ops.aten.rrelu_with_noise}
_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"forward"}


class Replay:
    """The results of the check: the state that reruns of a model's blocks need, and the blocks not to recompute.

    Before the check has run, the states of all generators are recorded, and every block is recomputed.
    """

    def __init__(self) -> None:
        self.draws_python = self.draws_numpy = True  # whether a forward pass draws from these generators
        self._generators: list[Any] | None = None
        self.uses, self.is_in_loop = 1, False  # whether other code may run between a forward and its backward pass
        self.keeps_caches = False  # whether blocks get empty key-value caches
        self.reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # modules that are not recomputed
        self.changing: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # see `BlockModules`
        self.to_end: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # see `BlockModules`
        self.ran: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether the check saw a call of a block

    def generators_of(self, blocks: Sequence[Block]) -> list[Any]:
        """Return the generator objects among the attributes of the blocks' modules. The search runs once."""
        if self._generators is None:
            modules = [inner for block in blocks for module in block for inner in module.modules()]
            by_id = {id(v): v for module in modules for v in vars(module).values() if is_generator(v)}
            self._generators = list(by_id.values())
        return self._generators

    def modules_of(self, block: nn.Module) -> BlockModules:
        self.ran.setdefault(block, False)
        return BlockModules(block, self.changing, block in self.to_end)


def checked_replay(objective: Objective, batch: Any, routed: Routed, keep: frozenset[str]) -> Replay:
    """Return the results of the check of the blocks' reruns.

    The first use of a model and a loss runs the check, and the uses for which `first_use.is_due` repeat it.

    A forward pass records checksums of the tensors that each call of a block returns or saves. Then each call runs
    again, and the checksums are compared. A block with other checksums is not recomputed; a `Note` names it. Nothing
    is checked on fake tensors or while a FLOP counter or a memory tracker is active.

    Args:
        objective: the model and the loss.
        batch: any pytree.
        routed: (replay, function that runs a call, caches) -> a context manager inside which blocks are recomputed.
        keep: the names of the operators whose outputs are saved.
    """
    model = objective.model
    known, purpose = findings(model, objective.loss), " ".join(["recomputation", *sorted(keep)])
    replay: Replay | None = known.get((purpose, model.training))
    if replay is not None:
        replay.uses += 1
        if not is_due(replay.uses):
            return replay
    can_run = can_check(model) and not memory_events.is_observed()
    if replay is not None and can_run:
        draws = [replay.draws_python, replay.draws_numpy]  # a later check adds to the results of the earlier ones
    elif can_run:
        replay, draws = Replay(), [False, False]
    else:
        return replay or Replay()
    for number in range(_MAX_PASSES):
        key = Key(number).fold("recomputation")
        check = _Check(replay, is_last=number == _MAX_PASSES - 1)
        routes = routed(replay, check.call, check.caches)
        with torch.enable_grad(), routes, closing(objective.losses(batch, key)) as losses:
            loss = next(losses)[1].detach()
            found = check.finish()
        draws = [before or now for before, now in zip(draws, check.draws, strict=True)]
        if not found and check.caches.left_out and not _is_near(objective, loss, _plain_loss(objective, batch, key)):
            replay.keeps_caches = found = True
        if not found and all(replay.ran.values()):
            break
    replay.draws_python, replay.draws_numpy = draws
    _warn(model, replay)
    known[purpose, model.training] = replay
    return replay


def _plain_loss(objective: Objective, batch: Any, key: Key) -> Tensor | None:
    """Return the loss without recomputation, or None if it cannot be evaluated without gradients."""
    try:
        with torch.no_grad(), closing(objective.losses(batch, key)) as losses:
            return next(losses)[1].detach()
    except Exception as error:
        raise_interrupt(error)
        return None


def _is_near(objective: Objective, loss: Tensor, plain: Tensor | None) -> bool:
    """Return whether two losses differ by no more than a sum in another order; True if `plain` is None."""
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(coarsest(objective), 2e-2)
    return plain is None or bool(torch.isclose(loss, plain, rtol=tolerance, atol=tolerance, equal_nan=True))


def not_recomputed(objective: Objective) -> dict[str, str]:
    """Return the blocks that are not recomputed because they failed the check: name -> reason."""
    names = {module: name for name, module in objective.model.named_modules()}
    known = findings(objective.model, objective.loss).items()
    replays = [replay for replay in dict(known).values() if isinstance(replay, Replay)]
    return {names.get(m, type(m).__name__): reason for replay in replays for m, reason in replay.reasons.items()}


def _warn(model: nn.Module, replay: Replay) -> None:
    names = {module: name for name, module in model.named_modules()}
    for module, reason in replay.reasons.items():
        name = names.get(module, "a block")
        warn_once(
            model,
            f"recomputation of {name}",
            f"{name} ({type(module).__name__}) is not recomputed in the backward pass: {reason}. It saves its "
            "activations, as under Everything().",
        )


class DrawWatch:
    """Detects draws from a generator whose states are not recorded because the check saw no draws from it.

    Args:
        replay: the findings of the check.
    """

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self._python: Any = None
        self._numpy: Any = None
        self._is_started = False
        self._seed = 0

    def start(self) -> None:
        """Store the generator states at the first call of a forward pass."""
        seed = torch.default_generator.initial_seed()  # a new seed: a new forward pass, even without a backward pass
        if not self._is_started or seed != self._seed:
            self._is_started, self._seed = True, seed
            self._python = None if self.replay.draws_python else python_state()
            self._numpy = None if self.replay.draws_numpy else numpy_words()

    def check(self) -> None:
        """Compare the generator states at the first rerun of a backward pass with the stored ones.

        Raises:
            RecomputationError: the forward pass drew numbers. From then on, the states are recorded.
        """
        if not self._is_started:
            return
        self._is_started = False
        drawn = []
        if self._python is not None and python_state() != self._python:
            self.replay.draws_python = True
            drawn.append("Python's `random`")
        if self._numpy is not None and numpy_words() != self._numpy:
            self.replay.draws_numpy = True
            drawn.append("NumPy's global generator")
        if drawn:
            raise RecomputationError(
                f"the forward pass drew from {' and '.join(drawn)}, and the earlier ones did not, so the states that "
                "the recomputation of its blocks needs are not recorded. They are from now on: repeat this step."
            )


class _Watch(TorchFunctionMode):
    """Detects calls of functions that fill a tensor after they saved it for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.writes_after_saving = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.writes_after_saving |= func in _WRITES_AFTER_SAVING
        return func(*args, **(kwargs or {}))


class _Recorded:
    """A call of a block in the check: checksums of what it returned and saved, and its modules' state before.

    The checksum of a running statistic that is saved in train mode is None: the backward pass does not read it.
    """

    def __init__(
        self, module: Any, call: Call, bits: list[Any], before: list[tuple[nn.Module, str, Any, Any]]
    ) -> None:
        self.module, self.call, self.bits, self.before = module, call, bits, before


class _Check:
    """One pass of the check.

    Args:
        replay: the results, to which the pass adds.
        is_last: whether this is the last pass. Only before it, a block that fails and has newly found state gets
            another pass.
    """

    def __init__(self, replay: Replay, is_last: bool) -> None:
        self.replay, self.is_last = replay, is_last
        self.regions: dict[Region, list[_Recorded]] = {}
        self.caches = CacheRule(replay.keeps_caches)
        self.draws = [False, False]
        self._states: tuple[Any, Any] | None = None

    def call(
        self, region: Region, forward: Forward, args: Any, kwargs: Any, block: BlockModules, kept: KeptOutputs | None
    ) -> Any:
        """Run and record a call of a block."""
        if self._states is None:
            self._states = _states()
        before = [
            (module, name, value, packed(value, _Mark))
            for module in block.modules
            for name, value in (*vars(module).items(), *module._buffers.items())
            if name not in _MODULE_INTERNALS
        ]
        statistics = statistics_of(block.modules)
        saved: list[Tensor | None] = []

        def record(tensor: Tensor) -> None:
            layer = statistics.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
            saved.append(tensor.detach() if layer is None or not layer.training else None)

        region.on_value = record
        with _Watch() as watch:
            out = region.forward(forward, args, kwargs, block, kept)
        region.on_value = None
        if watch.writes_after_saving and block.owner is not None:
            self.replay.to_end[block.owner] = True
        if block.owner is not None:
            self.replay.ran[block.owner] = True
        bits = [bits_of(tensor) for tensor in (*tensors_in(out), *saved)]
        self.regions.setdefault(region, []).append(_Recorded(block.owner, region.calls[-1], bits, before))
        return out

    def finish(self) -> bool:
        """Run all blocks again, after the forward pass. Return whether there are new findings."""
        if self._states is not None:
            self.draws = [before != now for before, now in zip(self._states, _states(), strict=True)]
        changed = self._changed_modules()
        found = bool(changed)
        if self.caches.is_read_again:
            self.replay.keeps_caches = found = True
        for region, calls in reversed(self.regions.items()):  # in the order of a backward pass
            with region.generators.restored(), torch.enable_grad():
                failure = _first_failure(calls)
            if failure is not None:
                module, reason = failure
                found = True
                changed |= self._changed_modules(with_statistics=set(module.modules()))
                if self.is_last or not any(inner in changed for inner in module.modules()):
                    self.replay.reasons[module] = reason
        self.regions.clear()  # they hold the inputs of the blocks, and refer to this check
        return found

    def _changed_modules(self, with_statistics: Collection[nn.Module] = ()) -> set[nn.Module]:
        """Return the modules with attributes that changed in place since a call; add them to `replay.changing`.

        Args:
            with_statistics: the modules whose running statistics count. A rerun in train mode does not read them.
        """
        changed: set[nn.Module] = set()
        for recorded in (recorded for calls in self.regions.values() for recorded in calls):
            for module, name, value, copy in recorded.before:
                buffer = module._buffers.get(name)
                current = vars(module).get(name, buffer)
                known = self.replay.changing.setdefault(module, set())
                if current is value and name not in known and not is_same_copy(copy, packed(value, _Mark)):
                    if buffer is value and version_of(value) != copy.version:
                        continue  # the version shows the change: `CallState` restores the buffer
                    if buffer is value and module not in with_statistics and not reads_buffers(module):
                        continue
                    known.add(name)
                    changed.add(module)
        return changed


def _first_failure(calls: list[_Recorded]) -> tuple[nn.Module, str] | None:
    """Run the calls of a region again. Return the module of the first call that differs, and why."""
    leaves: list[Tensor | None] = []
    for recorded in calls:
        saved: list[Tensor] = []
        try:
            out = run_call(recorded.call, leaves, lambda index, tensor, saved=saved: saved.append(tensor.detach()))
        except Exception as error:
            raise_interrupt(error)
            sentence = first_line(error)
            return recorded.module, sentence.removesuffix("Use Everything()").rstrip(" .")
        outputs = tensors_in(out)
        bits = [bits_of(tensor) for tensor in (*outputs, *saved)]
        if len(bits) != len(recorded.bits) or any(
            before not in (None, now) for before, now in zip(recorded.bits, bits, strict=True)
        ):
            return recorded.module, "run again from the same inputs, it computes something else"
        leaves = [*outputs]
    return None


class _Mark:
    """The identity, version and bits of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.version, self._values = version_of(tensor), (id(tensor), bits_of(tensor))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self._values == other._values

    __hash__ = None  # type: ignore[assignment]


def _states() -> tuple[Any, Any]:
    return python_state(), numpy_words()
