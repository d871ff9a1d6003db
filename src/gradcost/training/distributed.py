"""Many processes: probing on torch.distributed, in which a step sends one number per probe and no gradient.

Every process has the model. From the key and the slopes of all processes each one regenerates the same directions and
moves its weights by the same bits. Start the processes with torchrun, and call `init_process_group` first.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcost.core.batching.candidate_weights import SUM, Candidate, count_of
from gradcost.core.batching.denominators import observed
from gradcost.core.batching.loss_weights import rule_of, settled
from gradcost.core.batching.micro_batches import split
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.files import read_regular, write_whole
from gradcost.core.finite import require_finite
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.core.pytree import batch_size
from gradcost.core.value import value
from gradcost.directions import Directions
from gradcost.estimators.estimator import Estimate, Estimator, Facts, LeafConsumer, State
from gradcost.estimators.probing import Probing, replayed
from gradcost.training.step_log import read_log, weights_digest


class _Parallel(Estimator):
    """An estimator whose processes measure slopes and send them to one another."""

    estimator: Probing

    @property
    def facts(self) -> Facts:
        return self.estimator.facts._replace(inner=self.estimator)

    def init(self, objective: Objective) -> State | None:
        return None

    def estimate(self, objective: Objective, batch: Any, key: Key, state: State | None = None) -> Estimate:
        if (reason := _no_group() or _refusal(self.estimator)) is not None:
            raise Unsupported(reason)
        directions = self.estimator.directions
        assert isinstance(directions, Directions)
        seeds = directions.seeds(key, self.estimator.probes, objective.dimension)
        loss, slopes = self._measured(objective, batch, key, directions, seeds)
        require_finite(loss, slopes)
        gradient = self.estimator.combine.gradient(objective, directions, seeds, slopes.tolist())
        device = objective.leaves[0].parameter.device
        return Estimate(loss.to(device), gradient, slopes)

    @abstractmethod
    def _measured(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the slope along each direction, from all processes: float64, the same bits in each."""

    def stream(
        self, objective: Objective, batch: Any, key: Key, use: LeafConsumer, state: State | None = None
    ) -> Estimate:
        return replayed(self.estimate(objective, batch, key, state), use)

    def objection(self, objective: Objective, batch: Any) -> str | None:
        return _no_group() or _refusal(self.estimator) or self.estimator.objection(objective, batch)


@value
class DirectionParallel(_Parallel):
    """Direction-parallel probing: each process measures the slopes along some of the directions.

    Give every process the same batch and the same key.

    Law: equals `estimator` on one process, up to rounding of the slopes. All processes have the same bits.
    Message: 8 bytes for each own slope and 24 further bytes per process and step.

    Args:
        estimator: the probing that is shared out.
    Raises:
        BadInput: `estimator` is not a Probing along directions without state.
        Unsupported: an estimate raises it without a process group.
    """

    estimator: Probing

    def __post_init__(self) -> None:
        _require_probing(self, self.estimator)

    def _measured(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        processes = dist.get_world_size()
        own = seeds[dist.get_rank() :: processes]
        width = -(-len(seeds) // processes)
        message = torch.zeros(3 + width, dtype=torch.float64)
        message[0], message[1] = _stamp(self, key), len(own)
        if own:
            loss, slopes = self.estimator.slope.measure(objective, batch, key, directions, own)
            message[2], message[3 : 3 + len(own)] = loss, slopes
        rows = _gathered(message, objective)
        slopes = rows[:, 3:].T.flatten()[: len(seeds)].clone()
        measured = rows[:, 1] > 0
        return (rows[measured, 1] * rows[measured, 2]).sum() / len(seeds), slopes


@value
class BatchParallel(_Parallel):
    """Data-parallel probing: each process measures the slopes along all directions, on its own part of the batch.

    Give every process its own part, for example by a DistributedSampler or `part_of`, and the same key.

    Law: equals `estimator` on one process with the whole batch, up to rounding, if nothing draws random numbers; the
    random layers of each process have a key of their own. All processes have the same bits. The weight of a process
    is its share of what the loss averages over, as in `Accumulated`: examples, targets that are not ignored, or class
    weights.
    Message: 8 bytes per slope and 24 further bytes per process and step.
    Cost: if the loss does not average over examples, one further forward pass counts what it averages over.

    Args:
        estimator: the probing that is shared out.
    Raises:
        BadInput: `estimator` is not a Probing along directions without state.
        Unsupported: an estimate raises it without a process group, or if the losses of the parts do not determine
            that of the batch.
    """

    estimator: Probing

    def __post_init__(self) -> None:
        _require_probing(self, self.estimator)

    def _measured(
        self, objective: Objective, batch: Any, key: Key, directions: Directions, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        own_key = key.fold("process", dist.get_rank())
        kind, weight = _weight(objective, batch, own_key)
        loss, slopes = self.estimator.slope.measure(objective, batch, own_key, directions, seeds)
        start = torch.tensor([_stamp((self, kind), key), weight, 0.0], dtype=torch.float64)
        message = torch.cat([start, slopes.double().cpu()])
        message[2] = loss
        rows = _gathered(message, objective)
        rows = rows[rows[:, 1] > 0]  # a part without targets has no loss
        shares = rows[:, 1] if kind == SUM else rows[:, 1] / rows[:, 1].sum()
        return shares @ rows[:, 2], shares @ rows[:, 3:]


def _require_probing(parallel: Any, estimator: Any) -> None:
    if not isinstance(estimator, Probing):
        raise BadInput(
            f"{type(parallel).__name__} shares out a Probing, such as mezo(probes=4), not {estimator!r}. Put "
            f"wrappers around it: Clipped({type(parallel).__name__}(mezo()))."
        )
    if (reason := _refusal(estimator)) is not None:
        raise BadInput(reason)


def _refusal(estimator: Probing) -> str | None:
    if isinstance(estimator.directions, Directions):
        return None
    return f"{estimator.directions} have a state, which processes do not share: use Gaussian(), for example."


def _no_group() -> str | None:
    if dist.is_available() and dist.is_initialized():
        return None
    return "there is no process group: start with torchrun, and call torch.distributed.init_process_group first."


def _stamp(what: Any, key: Key) -> float:
    """Return a hash that a float64 holds exactly. Processes with another estimator, key or step have another one."""
    return float(int.from_bytes(blake2b(repr((what, key)).encode(), digest_size=6).digest(), "little"))


def _gathered(message: Tensor, objective: Objective) -> Tensor:
    """Send a message whose first entry is a `_stamp` to all processes; return theirs, one row each, on the CPU."""
    device = objective.leaves[0].parameter.device if dist.get_backend() == "nccl" else torch.device("cpu")
    rows = [torch.empty_like(message, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, message.to(device))
    found = torch.stack(rows).cpu()
    other = [rank for rank, stamp in enumerate(found[:, 0].tolist()) if stamp != float(message[0])]
    if other:
        raise BadInput(
            f"process {other[0]} has another estimator, key or step than process {dist.get_rank()}. Start all "
            "processes with equal arguments, after `share_log`."
        )
    return found


def _weight(objective: Objective, batch: Any, key: Key) -> tuple[Candidate, float]:
    """Return what the loss averages over, and how much of it this process's part of the batch has."""
    settled(objective.in_micro_batches(2), batch, key, lambda: None)
    rule = rule_of(objective.model, objective.loss)
    kind: Candidate = (rule.candidates or ["examples"])[0]
    examples = float(batch_size(batch))
    if isinstance(kind, str):
        return kind, 1.0 if kind == SUM else examples
    alone, total = replace(objective, parts=1), 0.0
    for fraction, part in split(batch, objective.parts):
        total += count_of(kind, fraction, observed(partial(alone.evaluate, part, key)))
    if not total >= 0:
        raise Unsupported("the weight of this part of the batch is not known: its loss divides by another number.")
    return kind, total


def part_of(batch: Any) -> Any:
    """Return this process's part of a batch that every process has, for `BatchParallel`.

    Args:
        batch: any pytree; `core.batching.micro_batches.split` defines how it is cut.
    Returns:
        A pytree of the same kind, with the process's share of the examples.
    Raises:
        BadInput: there is no process group, or the batch has fewer examples than there are processes.
    """
    if (reason := _no_group()) is not None:
        raise BadInput(reason)
    return split(batch, dist.get_world_size())[dist.get_rank()][1]


def require_equal_weights(objective: Objective) -> None:
    """Raise if the processes have different trainable parameters. Sends 8 bytes per process.

    Args:
        objective: the objective to train.
    Raises:
        BadInput: there is no process group, or the weights differ.
    """
    if (reason := _no_group()) is not None:
        raise BadInput(reason)
    digest = int.from_bytes(weights_digest(objective)[:6], "little")
    found = _integers([digest], objective.leaves[0].parameter.device)
    other = [rank for rank, row in enumerate(found) if row != [digest]]
    if other:
        raise BadInput(
            f"process {other[0]} has other weights than process {dist.get_rank()}: make or load the same in all."
        )


def share_log(path: Path) -> int:
    """Give every process the longest of their step logs. Then `train(log=StepLog(path))` goes on in all at one step.

    Call it in every process before `train`, each with a file of its own. A process that was killed, or joins late
    without a file, gets the records that it lacks from another one. `train` then rebuilds the weights from them.

    Args:
        path: this process's log. It may not exist yet.
    Returns:
        The number of steps in the log.
    Raises:
        BadInput: there is no process group, a log is damaged, or the logs are of different runs.
    """
    if (reason := _no_group()) is not None:
        raise BadInput(reason)
    error, own = None, b""
    try:
        own = read_regular(path)[: read_log(path).nbytes] if path.exists() else b""
    except BadInput as found:
        error = found
    rows = _integers([-1 if error is not None else len(own)])
    if error is not None:
        raise error
    damaged = [rank for rank, (length,) in enumerate(rows) if length < 0]
    if damaged:
        raise BadInput(f"the step log of process {damaged[0]} is damaged: restore or delete it.")
    lengths = [length for (length,) in rows]
    source = lengths.index(max(lengths))
    whole = _sent(own, lengths, source)
    if zlib.crc32(own) != zlib.crc32(whole[: len(own)]):
        error = BadInput(f"{path} is the log of another run than that of process {source}: delete one of them.")
    if any(failed for (failed,) in _integers([int(error is not None)])):
        raise error or BadInput("the step logs of the processes are of different runs: delete those of one run.")
    if len(whole) > len(own):
        write_whole(path, whole)
    return len(read_log(path).steps) if path.exists() else 0


def _sent(own: bytes, lengths: Sequence[int], source: int) -> bytes:
    """Return the bytes of the source process, from its message."""
    data = bytearray(own if dist.get_rank() == source else bytes(lengths[source]))
    if data:
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        sent = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.broadcast(sent, source)
        tensor.copy_(sent)
    return bytes(data)


def _integers(own: Sequence[int], device: torch.device | None = None) -> list[list[int]]:
    """Send integers to all processes; return those of each."""
    place = (device or torch.device("cuda")) if dist.get_backend() == "nccl" else torch.device("cpu")
    message = torch.tensor(own, dtype=torch.int64, device=place)
    rows = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, message)
    return [row.tolist() for row in rows]
