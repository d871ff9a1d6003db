"""`gradcost.train` with checkpoints, killed at random steps: the weights are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import time
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from gradcost import Objective, train
from gradcost.core.files import write_whole
from gradcost.core.key import Key
from gradcost.studies.processes import PRELOADED
from gradcost.training import checkpoint
from presets_under_test import METHODS, OPTIMIZERS, Points, public_presets

STEPS = 30
KEY, TASK = Key(19), Points(batch=8)


def digest(objective: Objective) -> str:
    found = blake2b()
    for parameter in objective.model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def undisturbed(method: str, optimizer: str) -> str:
    *_, last = train(TASK, METHODS[method], OPTIMIZERS[optimizer], KEY, STEPS)
    return digest(last.objective)


def finish(method: str, optimizer: str, file: Path, told: Connection) -> None:
    """Train from the training checkpoint, if there is one, send each step, and write the digest of the weights."""
    torch.set_num_threads(1)
    last, resume = None, file if file.exists() else None
    for last in train(TASK, METHODS[method], OPTIMIZERS[optimizer], KEY, STEPS, resume):
        checkpoint.write(file, last.train_state)
        told.send(last.number)
    if last is None:  # it was killed between its last step and its digest
        file.unlink()
    else:
        write_whole(file.with_suffix(".weights"), digest(last.objective))


def until_killed(method: str, optimizer: str, file: Path, chance: random.Random) -> int:
    """Train in a process that is killed after a random number of steps; return whether the kill came in time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=finish, args=(method, optimizer, file, sender))
    process.start()
    sender.close()
    with receiver, contextlib.suppress(EOFError):
        for _ in range(chance.randrange(1, STEPS // 2)):
            receiver.recv()
        time.sleep(chance.uniform(0.0, 0.005))
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == -signal.SIGKILL


def test_all_presets_are_trained_here():
    assert set(METHODS) == public_presets()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, method: str):
    """With four optimizers."""
    chance, kills, same = random.Random(method), 0, 0
    torch.set_num_threads(1)
    for optimizer in OPTIMIZERS:
        file = tmp_path / f"{optimizer}.checkpoint"
        weights = file.with_suffix(".weights")
        while not weights.exists():
            kills += until_killed(method, optimizer, file, chance)
        same += weights.read_text() == undisturbed(method, optimizer)
    print({"preset": method, "optimizers": len(OPTIMIZERS), "kills": kills, "same weights": same})
    assert same == len(OPTIMIZERS)
    assert kills >= len(OPTIMIZERS)
