"""Estimates in several threads give the numbers of one thread, and leave the random generators as they were."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gradcost import (
    Key,
    Objective,
    activity_perturbation,
    backprop,
    checkpointed,
    forward_gradient,
    hizoo,
    mezo,
    spsa,
)
from gradcost.core.evaluation import one_at_a_time
from snapshot import bits

METHODS = [backprop(), checkpointed(), forward_gradient(), mezo(), spsa(), hizoo(), activity_perturbation()]
THREADS, ESTIMATES = 4, 6


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def objective() -> Objective:
    torch.manual_seed(3)
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)) for _ in range(2)])
    return Objective(nn.Sequential(*blocks, nn.Linear(6, 2)), loss)


def in_threads(work: Callable[[int], object]) -> list[object]:
    """Return the results of work(0), work(1), ... or raise what one of them raised."""
    results: list[object] = [None] * THREADS

    def run(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for error in results:
        if isinstance(error, BaseException):
            raise error
    return results


@pytest.mark.parametrize("shared", [False, True], ids=["a model each", "one model"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_threads_give_the_numbers_of_one_thread(method: object, shared: bool):
    batch = (torch.randn(5, 6), torch.randn(5, 2))

    def estimates(made: Objective) -> list[bytes | None]:
        found = []
        for number in range(ESTIMATES):
            estimate = method.estimate(made, batch, Key(7).fold("step", number))  # type: ignore[attr-defined]
            found += [bits(estimate.loss), *(bits(part) for _, part in estimate.gradient.leaves())]
        return found

    objectives = [objective()] * THREADS if shared else [objective() for _ in range(THREADS)]
    expected = estimates(objective())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for found in in_threads(lambda number: estimates(objectives[number])):
        assert found == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_a_process_forked_during_an_estimate_of_another_thread_does_not_wait_for_it():
    inside, done = threading.Event(), threading.Event()

    @one_at_a_time.one_at_a_time
    def hold() -> None:
        inside.set()
        done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if one_at_a_time._State.lock.acquire(timeout=5) else 1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        thread.join()
