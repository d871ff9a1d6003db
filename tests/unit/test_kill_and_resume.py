"""`gradcost.train` with checkpoints, killed at random moments: the weights are those of an undisturbed run."""

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

import gradcost
from gradcost import SGD, Adam, AdamW, Objective, train
from gradcost.core.files import write_whole
from gradcost.core.key import Key
from gradcost.estimators import presets
from gradcost.tasks.digits import Digits
from gradcost.training import Nesterov, checkpoint

METHODS = {
    "backprop": gradcost.backprop(),
    "checkpointed": gradcost.checkpointed(),
    "forward_gradient": gradcost.forward_gradient(),
    "spsa": gradcost.spsa(),
    "mezo": gradcost.mezo(),
    "zo_svrg": gradcost.zo_svrg(every=7),
    "zo_sgd_sign": gradcost.zo_sgd_sign(),
    "fzoo": gradcost.fzoo(),
    "multi_tangent": gradcost.multi_tangent(),
    "hizoo": gradcost.hizoo(),
    "activity_perturbation": gradcost.activity_perturbation(),
    "addax": gradcost.addax(longest=64),
}
OPTIMIZERS = {"SGD": SGD(1e-3), "Nesterov": Nesterov(1e-3), "Adam": Adam(1e-3), "AdamW": AdamW(1e-3)}
STEPS = 30
KEY, TASK = Key(19), Digits(batch=8)
CELLS = [(method, optimizer) for method in METHODS for optimizer in OPTIMIZERS]


def digest(objective: Objective) -> str:
    found = blake2b()
    for parameter in objective.model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def undisturbed(method: str, optimizer: str) -> str:
    *_, last = train(TASK, METHODS[method], OPTIMIZERS[optimizer], KEY, STEPS)
    return digest(last.objective)


def finish(cells: list[tuple[str, str]], folder: Path, told: Connection) -> None:
    """Train each cell from its training checkpoint, write the digest of its weights, and send each step."""
    torch.set_num_threads(1)
    for method, optimizer in cells:
        file, last = folder / f"{method}-{optimizer}.checkpoint", None
        resume = file if file.exists() else None
        for last in train(TASK, METHODS[method], OPTIMIZERS[optimizer], KEY, STEPS, resume):
            checkpoint.write(file, last.train_state)
            told.send(last.number)
        if last is None:  # it was killed between its last step and its digest
            file.unlink()
        else:
            write_whole(folder / f"{method}-{optimizer}", digest(last.objective))


def until_killed(cells: list[tuple[str, str]], folder: Path, chance: random.Random) -> int:
    """Train in a process that is killed after a random number of steps; return whether the kill came in time."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=finish, args=(cells, folder, sender))
    process.start()
    sender.close()
    with receiver, contextlib.suppress(EOFError):
        for _ in range(chance.randrange(1, 80)):
            receiver.recv()
        time.sleep(chance.uniform(0.0, 0.005))
        process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path):
    """For every preset with four optimizers."""
    public = {name for name, each in vars(presets).items() if getattr(each, "__module__", "") == presets.__name__}
    assert {name for name in public if not name.startswith("_")} == set(METHODS)
    chance, kills, missing = random.Random(19), 0, CELLS
    while missing:
        kills += until_killed(missing, tmp_path, chance)
        missing = [cell for cell in missing if not (tmp_path / "-".join(cell)).exists()]
    torch.set_num_threads(1)
    same = sum((tmp_path / "-".join(cell)).read_text() == undisturbed(*cell) for cell in CELLS)
    print({"cells": len(CELLS), "kills": kills, "same weights": same})
    assert same == len(CELLS)
    assert kills >= 15
