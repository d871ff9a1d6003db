"""The step log: a training checkpoint of 45 bytes per step of one probe, from which the weights are rebuilt.

A seeded gradient is a list of (seed, coefficient). With the learning rates it determines all weights after the
initial ones. A step is written before the weights move, so a process that is killed loses no step.

File: a line that names the format, then records. A record has its length, the complement of the length (4 bytes
each), its content, and the CRC-32 of this and all earlier contents. The first byte of a content is its kind: H header
(JSON), D directions (text), S step, A audit (a digest of the weights).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from gradcost.core.bits import raw_bytes
from gradcost.core.errors import BadInput, Unsupported
from gradcost.core.files import read_regular, write_whole
from gradcost.core.objective import Objective
from gradcost.estimators.gradient import Gradient, Seeded
from gradcost.training.optimizers import Optimizer

_MAGIC = b"gradcost step log 1\n"
_LENGTHS = struct.Struct("<II")
_STEP = struct.Struct("<cQd")
_AUDIT = struct.Struct("<cQ16s")
_CHECK = struct.Struct("<I")


@dataclass(frozen=True)
class StepLog:
    """Where and how the steps of a training run are logged.

    Args:
        path: the file. If it exists, training continues from its last step.
        audit_every: number of steps between two digests of the weights. A replay compares its weights with them.
    Raises:
        BadInput: audit_every is below 1.
    """

    path: Path
    audit_every: int = 100

    def __post_init__(self) -> None:
        if self.audit_every < 1:
            raise BadInput(f"audit_every is a number of steps, 1 or more, not {self.audit_every}.")


@dataclass(frozen=True, eq=False)
class LoggedStep:
    """One step of a log.

    Args:
        number: the number of the step, from 0.
        lr: the learning rate of the step.
        message: seeds and coefficients (`Seeded.to_bytes`). Empty if the step was skipped, because its loss was not
            finite.
        directions: the repr of the directions.
    """

    number: int
    lr: float
    message: bytes
    directions: str


@dataclass(frozen=True, eq=False)
class Logged:
    """The content of a log.

    Args:
        optimizer: the repr of the optimizer.
        about: what else the writer recorded, such as the repr of the task.
        model: a digest of the names, shapes and dtypes of the trainable parameters.
        steps: the steps, in order.
        audits: digest of the weights by the number of steps taken. That of 0 steps is always present.
        nbytes: bytes of the file up to its last complete record.
        check: the checksum of all contents.
    """

    optimizer: str
    about: dict[str, Any]
    model: str
    steps: tuple[LoggedStep, ...]
    audits: dict[int, bytes]
    nbytes: int
    check: int


def read_log(path: Path) -> Logged:
    """Read a log. An incomplete last record, from a process that was killed while it wrote, is left out.

    Args:
        path: the file of a `StepLog`.
    Returns:
        The content.
    Raises:
        BadInput: the file is not a log, is damaged, or is not a regular file.
        OSError: the file cannot be read.
    """
    data = read_regular(path)
    if not data.startswith(_MAGIC):
        raise BadInput(f"{path} is not a step log of gradcost.")
    header: dict[str, Any] | None = None
    steps: list[LoggedStep] = []
    audits: dict[int, bytes] = {}
    directions, end, check = "", len(_MAGIC), 0
    for record in _records(path, data):
        content, end, check = record
        match content[:1]:
            case b"H":
                header = json.loads(content[1:])
            case b"D":
                directions = content[1:].decode()
            case b"S":
                _, number, lr = _STEP.unpack_from(content)
                if number != len(steps):
                    raise BadInput(f"{path} is damaged: step {number} follows step {len(steps) - 1}.")
                steps.append(LoggedStep(number, lr, content[_STEP.size :], directions))
            case b"A":
                _, taken, digest = _AUDIT.unpack(content)
                audits[taken] = digest
    if header is None or 0 not in audits:
        raise BadInput(f"{path} ends before its first step: delete it.")
    return Logged(header["optimizer"], header["about"], header["model"], tuple(steps), audits, end, check)


def require_same(path: Path, logged: Logged, objective: Objective, optimizer: Optimizer) -> None:
    """Raise BadInput if a log is of another model or optimizer."""
    if logged.model != model_digest(objective):
        raise BadInput(f"{path} is the log of another model: its trainable parameters have other names or shapes.")
    if logged.optimizer != repr(optimizer):
        raise BadInput(f"{path} is the log of a run with {logged.optimizer}, not with {optimizer!r}.")


def _records(path: Path, data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield each complete record's content, the position after it, and the checksum after it."""
    position, check = len(_MAGIC), 0
    while position + _LENGTHS.size <= len(data):
        length, complement = _LENGTHS.unpack_from(data, position)
        start = position + _LENGTHS.size
        end = start + length
        if length != complement ^ 0xFFFFFFFF:
            raise BadInput(_damaged(path, position))
        if end + _CHECK.size > len(data):
            return
        content = data[start:end]
        check = zlib.crc32(content, check)
        if _CHECK.unpack_from(data, end)[0] != check:
            raise BadInput(_damaged(path, position))
        position = end + _CHECK.size
        yield content, position, check


def _damaged(path: Path, position: int) -> str:
    return (
        f"{path} is damaged at byte {position:,}: a checksum is wrong. Restore the file from a copy. Its first "
        f"{position:,} bytes are intact: they are the log of the steps before."
    )


class LogWriter:
    """An open log. `append` writes a step before the weights move, `moved` ends the step.

    Args:
        log: path and audit interval.
        objective: the objective in training.
        optimizer: how parameters move.
        about: what else to record: JSON data.
    Raises:
        BadInput: the file belongs to another model or optimizer, or is damaged.
    """

    def __init__(self, log: StepLog, objective: Objective, optimizer: Optimizer, about: dict[str, Any]) -> None:
        self.log, self.objective, self.optimizer, self.about = log, objective, optimizer, about
        self.earlier = read_log(log.path) if log.path.exists() else None
        self.check, self.directions, self.is_open = 0, "", False
        if self.earlier is not None:
            require_same(log.path, self.earlier, objective, optimizer)
            if self.earlier.steps:
                self.directions = self.earlier.steps[-1].directions

    def append(self, number: int, lr: float, gradient: Gradient | None) -> None:
        """Write one step to the disk.

        Args:
            number: the number of the step, from 0.
            lr: its learning rate.
            gradient: a Seeded gradient; None for a skipped step.
        Raises:
            Unsupported: the gradient is not seeded.
            OSError: the file cannot be written.
        """
        message = b""
        contents: list[bytes] = []
        if gradient is not None:
            seeded = require_seeded(gradient)
            message = seeded.to_bytes()
            if repr(seeded.directions) != self.directions:
                self.directions = repr(seeded.directions)
                contents.append(b"D" + self.directions.encode())
        self._write([*contents, _STEP.pack(b"S", number, lr) + message])

    def moved(self, taken: int) -> None:
        """End a step: after every `audit_every` steps, write a digest of the weights."""
        if taken % self.log.audit_every == 0:
            self._write([_AUDIT.pack(b"A", taken, weights_digest(self.objective))])

    def _write(self, contents: list[bytes]) -> None:
        path = self.log.path
        if not self.is_open:
            self._open()
        with path.open("ab") as file:
            file.write(b"".join(map(self._record, contents)))
            file.flush()
            os.fsync(file.fileno())

    def _record(self, content: bytes) -> bytes:
        self.check = zlib.crc32(content, self.check)
        lengths = _LENGTHS.pack(len(content), len(content) ^ 0xFFFFFFFF)
        return lengths + content + _CHECK.pack(self.check)

    def _open(self) -> None:
        """Create the file, or remove the incomplete last record of an earlier process."""
        self.is_open = True
        if self.earlier is not None:
            os.truncate(self.log.path, self.earlier.nbytes)
            self.check = self.earlier.check
            return
        header = {"optimizer": repr(self.optimizer), "model": model_digest(self.objective), "about": self.about}
        first = [b"H" + json.dumps(header).encode(), _AUDIT.pack(b"A", 0, weights_digest(self.objective))]
        write_whole(self.log.path, _MAGIC + b"".join(map(self._record, first)))


def require_seeded(gradient: Gradient) -> Seeded:
    """Return the gradient if it is seeded.

    Args:
        gradient: any gradient.
    Raises:
        Unsupported: the gradient is not a Seeded.
    """
    if not isinstance(gradient, Seeded):
        raise Unsupported(
            f"a {type(gradient).__name__} gradient is not a list of seeds and coefficients. Use an estimator that is "
            "`replayable`, such as mezo(), spsa() or forward_gradient()."
        )
    return gradient


def model_digest(objective: Objective) -> str:
    """Return a digest of the names, shapes and dtypes of the trainable parameters."""
    described = [(leaf.name, tuple(leaf.parameter.shape), str(leaf.parameter.dtype)) for leaf in objective.leaves]
    return blake2b(repr(described).encode(), digest_size=16).hexdigest()


def weights_digest(objective: Objective) -> bytes:
    """Return a digest of the bits of the trainable parameters."""
    found = blake2b(digest_size=16)
    for leaf in objective.leaves:
        found.update(raw_bytes(leaf.parameter))
    return found.digest()
