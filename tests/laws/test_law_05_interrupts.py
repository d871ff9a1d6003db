"""Law 5. A KeyboardInterrupt at any moment of an estimate disturbs nothing, and the next estimate is the same."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradcost
from gradcost.core.evaluation import gradient_mode
from gradcost.core.interrupts import interruptible, undoing
from gradcost.core.key import Key
from gradcost.core.objective import Objective
from gradcost.slopes import forward_mode
from interruption import Moments, after
from snapshot import differences, snapshot
from tables import ESTIMATORS, REPRESENTATIVE, raising

KEY = Key(5)
FAMILIES = ("backprop", "checkpointed", "selective", "gaussian-jvp", "sphere-jvp3", "gaussian-central")
FAMILIES += ("gaussian-forward", *REPRESENTATIVE)


def prepared(estimator: str) -> tuple[Objective, Callable[[], gradcost.Estimate]]:
    """Return an objective with every kind of state, and an estimate of it that has been made twice already."""
    made, batch, _ = raising()
    for number, parameter in enumerate(made.model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number)) if number % 2 == 0 else None

    def work() -> gradcost.Estimate:
        return ESTIMATORS[estimator].estimator.estimate(made, batch, KEY)

    for _ in range(2):
        work()
    return made, work


def assert_same(one: gradcost.Estimate, other: gradcost.Estimate):
    assert torch.equal(one.loss, other.loss)
    for (_, a), (_, b) in zip(one.gradient.leaves(), other.gradient.leaves(), strict=True):
        assert torch.equal(a, b)


def interrupt_many(estimator: str, times: int):
    """Interrupt estimates. Nothing differs while the exception is held, nor when it is gone.

    Every second one by a signal, which interrupts long operations more often; the others at a line chosen at random.
    """
    made, work = prepared(estimator)
    expected, counted, moments = work(), Moments(), random.Random(1)
    counted.of(work)
    start = time.perf_counter()
    work()
    duration = time.perf_counter() - start
    before = snapshot(made.model)
    for number in range(times):
        if number % 2:
            error = after(moments.uniform(0, duration), work)
        else:
            error = Moments(moments.randint(1, counted.count)).of(work)
        assert error is None or isinstance(error, KeyboardInterrupt)
        assert differences(before, snapshot(made.model)) == []
        del error
        if number % 100 == 0:
            gc.collect()
            assert differences(before, snapshot(made.model)) == []
            assert_same(expected, work())
    assert_same(expected, work())


# An interrupt inside a finalizer is reported and dropped by Python.
unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unraisable
@pytest.mark.parametrize("estimator", ["backprop", "checkpointed", "gaussian-jvp", "gaussian-central"])
def test_an_interrupt_at_any_moment_disturbs_nothing(estimator: str):
    interrupt_many(estimator, 20)


@unraisable
@pytest.mark.slow
@pytest.mark.parametrize("estimator", FAMILIES)
def test_a_thousand_interrupts_disturb_nothing(estimator: str):
    interrupt_many(estimator, 1000)


@unraisable
@pytest.mark.parametrize("estimator", [gradcost.backprop(), gradcost.mezo(), gradcost.forward_gradient()], ids=repr)
def test_an_interrupt_in_the_first_estimate_changes_no_later_one(estimator: Any):
    """What is found out at first use is found out again, if an interrupt prevented it."""
    made, batch, _ = raising()
    expected = estimator.estimate(made, batch, KEY)
    counted, moments = Moments(), random.Random(2)
    fresh, _, _ = raising()
    counted.of(lambda: estimator.estimate(fresh, batch, KEY))
    for _ in range(5):
        made, _, _ = raising()
        before = snapshot(made.model)
        at = moments.randint(1, counted.count)
        Moments(at).of(lambda made=made: estimator.estimate(made, batch, KEY))
        assert differences(before, snapshot(made.model)) == []
        assert_same(expected, estimator.estimate(made, batch, KEY))


# ---- the mechanism


def uncollected(run: Callable[[], Any]) -> Any:
    """Return what `run` returns, without garbage collections: a callback of one would swallow the interrupt."""
    gc.disable()
    try:
        return run()
    finally:
        gc.enable()


def test_an_interrupt_at_every_line_of_an_evaluation_leaves_no_state():
    made, batch, _ = raising()
    state = gradient_mode._state
    defaults = {name: value for name, value in vars(type(state)).items() if name in type(state).__annotations__}
    assert {"evaluation", "raises_unknown"} <= {*vars(type(state))}
    for _ in range(2):
        gradcost.mezo().estimate(made, batch, KEY)  # what is found out at first use is known
    counted = Moments()
    counted.of(lambda: made.evaluate(batch, KEY))
    for at in range(1, counted.count + 1):
        error = uncollected(lambda at=at: Moments(at).of(lambda: made.evaluate(batch, KEY)))
        assert isinstance(error, KeyboardInterrupt)
        assert {name: getattr(state, name) for name in defaults} == defaults
        assert torch.is_grad_enabled(), at


def test_an_interrupt_that_another_error_hides_is_no_reason_to_try_again(monkeypatch: pytest.MonkeyPatch):
    made, batch, _ = raising()
    gradcost.mezo().estimate(made, batch, KEY)

    def interrupted(evaluate: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("a level is missing")

    monkeypatch.setattr(forward_mode, "_in_transform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gradcost.forward_gradient(4, together=4).estimate(made, batch, KEY)


def test_an_interrupt_that_the_caller_is_handling_is_not_raised_again():
    made, batch, _ = raising()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(TypeError):
            gradcost.mezo().estimate(made, (batch, "not a batch"), KEY)


def test_an_undo_that_is_interrupted_runs_again():
    calls: list[int] = []

    def undo() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undoing(undo):
        pass
    assert calls == [0, 1]


def test_what_an_interrupt_left_open_is_restored_in_order():
    """Each of two contexts is entered, and no `__exit__` of theirs is called."""
    restored: list[str] = []

    @interruptible
    def work() -> None:
        undoing(lambda: restored.append("outer")).__enter__()
        undoing(lambda: restored.append("inner")).__enter__()
        torch._C._set_grad_enabled(False)
        torch.autograd.forward_ad.enter_dual_level()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert restored == ["inner", "outer"]
    assert torch.is_grad_enabled()
    with torch.autograd.forward_ad.dual_level():  # no level is left
        pass


def test_an_exception_of_the_restoring_code_does_not_hide_the_interrupt():
    @interruptible
    def work() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_what_returns_restores_nothing():
    @interruptible
    def work() -> int:
        torch.set_grad_enabled(False)
        return 3

    try:
        assert work() == 3
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_other_errors_keep_their_type_and_traceback():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise MemoryError("half-way")

    made, batch, _ = raising()
    made.model.append(Fails())  # type: ignore[operator]
    with pytest.raises(MemoryError, match="half-way"):
        gradcost.mezo().estimate(Objective(made.model, made.loss), batch, KEY)
