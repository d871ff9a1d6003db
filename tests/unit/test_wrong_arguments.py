"""An argument of the wrong type is refused with a sentence that says what to write, by every public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradcost
from gradcost import Key, Objective, backprop, checkpointed, forward_gradient, mezo
from gradcost.core.errors import BadInput, GradcostError, Unsupported
from gradcost.core.notes import Note

BATCH = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))
ADAMW: Any = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
MODEL: Any = nn.Linear(4, 3)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def objective() -> Objective:
    return Objective(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), loss)


def given(argument: Any) -> Any:
    """Return the argument. Its type is hidden from the type checker, which would refuse it."""
    return argument


WRONG: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: gradcost.plan(objective(), BATCH, given("8GB")),
        r"a number of bytes above 0, not '8GB': write 8 \* 10\*\*9",
    ),
    (lambda: gradcost.plan(objective(), BATCH, given(1.5)), "a number of bytes above 0, not 1.5"),
    (lambda: gradcost.plan(objective(), BATCH, given(True)), "a number of bytes above 0, not True"),
    (lambda: gradcost.plan(objective(), BATCH, 10**9, optimizer=ADAMW), r"of type AdamW: give gradcost.SGD\(0.1\)"),
    (lambda: gradcost.plan(objective(), BATCH, 10**9, ADAMW), r"estimators is a list, such as .*, not AdamW"),
    (lambda: gradcost.plan(objective(), BATCH, 10**9, [given(mezo)]), r"mezo, a function: write a value"),
    (
        lambda: gradcost.plan(MODEL, BATCH, 10**9),
        r"the objective is a Linear: write gradcost.Objective\(model, loss\)",
    ),
    (lambda: gradcost.forecast(mezo(), objective(), BATCH, ADAMW), "of type AdamW: give gradcost.SGD"),
    (lambda: gradcost.forecast(given(mezo), objective(), BATCH), r"mezo, a function: write .* gradcost.mezo\(\)"),
    (lambda: gradcost.forecast(mezo(), MODEL, BATCH), "the objective is a Linear"),
    (lambda: gradcost.check(mezo(), MODEL, BATCH), "the objective is a Linear"),
    (lambda: gradcost.measure(given(mezo())), "TrainingStep"),
    (lambda: gradcost.instruments.TrainingStep(objective(), BATCH, mezo(), ADAMW), "of type AdamW"),
    (lambda: gradcost.surrogate_loss(mezo(), MODEL, BATCH, Key(0)), "the objective is a Linear"),
    (lambda: gradcost.train(objective(), [BATCH], mezo(), ADAMW), "of type AdamW"),
    (
        lambda: given(gradcost.train)(objective(), [BATCH], mezo()),
        r"'optimizer': write train\(objective, loader, est",
    ),
    (lambda: gradcost.train(objective(), [BATCH], mezo(), gradcost.SGD(0.1), steps=given(1e3)), "not 1000.0"),
    (lambda: mezo(4), r"such as 1e-3, not 4. Or is it probes=4\?"),
    (lambda: gradcost.hizoo(4), r"Or is it probes=4\?"),
    (lambda: mezo().estimate(objective(), BATCH, given(0)), r"the key is 0: write gradcost.Key\(0\)"),
    (lambda: backprop().estimate(objective(), BATCH, given(torch.Generator())), r"write gradcost.Key\(0\)"),
    (lambda: mezo().estimate(MODEL, BATCH, Key(0)), "the objective is a Linear"),
    (
        lambda: Objective(MODEL, given(F.cross_entropy)),
        r"lambda model, batch: cross_entropy\(model\(batch\[0\]\), batch",
    ),
    (lambda: Objective(MODEL, nn.CrossEntropyLoss()), r"lambda model, batch: nn.CrossEntropyLoss\(\)\(model\(batch"),
    (lambda: Objective(MODEL, given(3)), "int cannot be called"),
    (lambda: Objective(given(loss), loss), "needs a torch.nn.Module, not function"),
    (lambda: gradcost.Accumulated(given(mezo), 2), r"of type Estimator, not mezo: write mezo\(\)"),
    (lambda: gradcost.Clipped(given(mezo), 1.0), "of type Estimator, not mezo"),
    (lambda: gradcost.Probing(given(0.001)), "slope of Probing is a value of type Slope, not 0.001"),
    (lambda: gradcost.Reverse(given(gradcost.checkpointing.Blocks)), r"of type Saving, not Blocks: write Blocks\(\)"),
    (lambda: gradcost.compare("digits", [backprop()], optimizer=ADAMW), "of type AdamW"),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG)
def test_a_wrong_argument_is_refused_with_what_to_write(call: Callable[[], Any], sentence: str):
    with pytest.raises(BadInput, match=sentence):
        call()


@pytest.mark.parametrize("method", [backprop(), checkpointed(), mezo(), forward_gradient()], ids=repr)
def test_an_estimate_of_a_model_on_the_meta_device_is_a_sentence(method: gradcost.Estimator):
    on_meta = Objective(objective().model.to("meta"), loss)
    with pytest.raises(
        BadInput, match=r"`0\.weight` is on the meta device, which stores no numbers: load the weights"
    ):
        method.estimate(on_meta, BATCH, Key(0))
    assert gradcost.forecast(method, on_meta, BATCH).peak > 0


@pytest.mark.parametrize("method", [backprop(), checkpointed(), forward_gradient()], ids=repr)
def test_a_loss_of_another_model_is_no_gradient_of_zeros(method: gradcost.Estimator):
    other = objective().model
    wrong = Objective(objective().model, lambda model, batch: loss(other, batch))
    with pytest.raises(GradcostError, match=r"does not depend on the trainable parameters|uses another model"):
        method.estimate(wrong, BATCH, Key(0))


def test_a_difference_of_a_loss_of_another_model_says_so():
    other = objective().model
    wrong = Objective(objective().model, lambda model, batch: loss(other, batch))
    with pytest.warns(Note, match="the loss uses another model: it must use its first argument"):
        mezo().estimate(wrong, BATCH, Key(0))


def test_a_parameter_that_one_batch_does_not_use_has_a_gradient_of_zeros():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    gradient = dict(backprop().estimate(Objective(Branches(), loss), BATCH, Key(0)).gradient.leaves())
    assert gradient["first.weight"].norm() > 0
    assert gradient["second.weight"].norm() == 0


def test_forward_mode_names_the_lstm_and_the_way_out():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x.unsqueeze(1))[0][:, -1])

    with pytest.raises(Unsupported, match=r"`cells` cannot be differentiated forward.* mezo\(\)"):
        forward_gradient().estimate(Objective(Recurrent(), loss), BATCH, Key(0))


def test_a_loss_that_is_not_finite_has_no_estimate():
    wrong = Objective(objective().model, lambda model, batch: loss(model, batch) * float("nan"))
    for method in (backprop(), mezo()):
        with pytest.raises(GradcostError, match="the loss of this batch is nan"):
            method.estimate(wrong, BATCH, Key(0))
        with pytest.raises(GradcostError, match="the loss of this batch is nan"):
            method.estimate(objective(), (BATCH[0][:0], BATCH[1][:0]), Key(0))
