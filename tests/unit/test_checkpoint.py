"""A resumed training equals an uninterrupted one bit for bit; a bad file is refused and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradcost import Adam, AdamW, mezo, train
from gradcost.core.key import Key
from gradcost.tasks.digits import Digits
from gradcost.training import Nesterov, checkpoint
from gradcost.training.train_state import TrainState
from snapshot import bits
from tables import ESTIMATORS, OBJECTIVES, REPRESENTATIVE

KEY = Key(14)


def train_state(estimator: str, objective: str, optimizer: Any) -> tuple[TrainState, Any]:
    built, batch = OBJECTIVES[objective].make()
    return TrainState(built, ESTIMATORS[estimator].estimator, optimizer), batch


def state(of: TrainState) -> list[bytes | None]:
    return [bits(t) for t in (*of.objective.model.parameters(), *of.objective.model.buffers(), *of.held_tensors())]


@pytest.mark.parametrize("optimizer", [Adam(1e-2, decay=0.1), Nesterov(1e-2)], ids=repr)
@pytest.mark.parametrize("estimator", ["backprop", *REPRESENTATIVE])
def test_a_resumed_training_equals_an_uninterrupted_one(estimator: str, optimizer: Any, tmp_path: Path):
    reference, batch = train_state(estimator, "cnn", optimizer)  # a model with buffers
    for number in range(3):
        reference.step(batch, KEY.fold("step", number))
    checkpoint.write(tmp_path / "at", reference, {"number": 3, "seen": (1.5, None, "text")})
    resumed, _ = train_state(estimator, "cnn", optimizer)
    checkpoint.read(tmp_path / "at", resumed)
    assert checkpoint.notes(tmp_path / "at") == {"number": 3, "seen": (1.5, None, "text")}
    assert resumed.taken == 3
    assert state(resumed) == state(reference)
    for number in range(3, 6):
        one, other = (of.step(batch, KEY.fold("step", number)) for of in (reference, resumed))
        assert bits(one.loss) == bits(other.loss)
    assert state(resumed) == state(reference)


def test_tied_weights_are_written_once(tmp_path: Path):
    trained, batch = train_state("backprop", "transformer", AdamW(1e-2))
    trained.step(batch, KEY)
    checkpoint.write(tmp_path / "at", trained)
    resumed, _ = train_state("backprop", "transformer", AdamW(1e-2))
    checkpoint.read(tmp_path / "at", resumed)
    assert resumed.objective.model.head.weight is resumed.objective.model.embed.weight  # type: ignore[union-attr]
    assert state(resumed) == state(trained)


def test_an_incomplete_file_or_one_of_another_model_is_refused(tmp_path: Path):
    trained, batch = train_state("backprop", "mlp", AdamW(1e-2))
    trained.step(batch, KEY)
    checkpoint.write(tmp_path / "at", trained)
    content = (tmp_path / "at").read_bytes()
    fresh, _ = train_state("backprop", "mlp", AdamW(1e-2))
    before = state(fresh)
    for torn in (b"", content[:20], content[:-1], b"x" * 40):
        (tmp_path / "at").write_bytes(torn)
        with pytest.raises(ValueError, match="is not a training checkpoint, or is incomplete"):
            checkpoint.read(tmp_path / "at", fresh)
    (tmp_path / "at").write_bytes(content)
    other, _ = train_state("backprop", "direct", AdamW(1e-2))
    with pytest.raises(ValueError, match="is a training checkpoint of another model"):
        checkpoint.read(tmp_path / "at", other)
    assert state(fresh) == before


def test_a_state_that_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path):
    trained, _ = train_state("backprop", "mlp", AdamW(1e-2))
    trained.state = {"who": object()}
    with pytest.raises(ValueError, match="cannot store a object"):
        checkpoint.write(tmp_path / "at", trained)
    assert list(tmp_path.iterdir()) == []


def test_a_file_cannot_call_arbitrary_code():
    for name in ("os:system", "builtins:tuple", "subprocess:Popen"):
        with pytest.raises(ValueError, match="is not a named tuple"):
            checkpoint._named_tuple(name)


def test_numbers_keep_their_bits(tmp_path: Path):
    trained, _ = train_state("backprop", "mlp", AdamW(1e-2))
    notes = {"inf": float("inf"), "tiny": 5e-324, "third": 1 / 3, "seed": 2**64 - 1, 3: torch.tensor(7.0)}
    checkpoint.write(tmp_path / "at", trained, notes)
    assert checkpoint.notes(tmp_path / "at") == notes


def test_train_resumes_from_a_file(tmp_path: Path):
    task, method = Digits(), mezo(probes=2)
    losses = [bits(step.loss) for step in train(task, method, Adam(1e-3), KEY, 9)]
    for step in train(task, method, Adam(1e-3), KEY, 6):
        if step.number == 4:
            checkpoint.write(tmp_path / "at", step.train_state)
    rest = [(step.number, bits(step.loss)) for step in train(task, method, Adam(1e-3), KEY, 9, tmp_path / "at")]
    assert rest == list(enumerate(losses))[5:]
    assert list(train(task, method, Adam(1e-3), KEY, 5, tmp_path / "at")) == []
