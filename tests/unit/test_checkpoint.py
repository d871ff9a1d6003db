"""A training that was stopped goes on as if it had not been, bit for bit; a bad file is refused and nothing lost."""

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
from tables import ESTIMATORS, OBJECTIVES

KEY = Key(14)


def train_state(estimator: str, objective: str, optimizer: Any) -> tuple[TrainState, Any]:
    made, batch = OBJECTIVES[objective].make()
    return TrainState(made, ESTIMATORS[estimator].estimator, optimizer), batch


def state(of: TrainState) -> list[bytes | None]:
    return [bits(t) for t in (*of.objective.model.parameters(), *of.objective.model.buffers(), *of.kept())]


@pytest.mark.parametrize("optimizer", [Adam(1e-2, decay=0.1), Nesterov(1e-2)], ids=repr)
@pytest.mark.parametrize("estimator", [name for name, row in ESTIMATORS.items() if not row.blocks])
def test_a_training_goes_on_bit_for_bit(estimator: str, optimizer: Any, tmp_path: Path):
    objective = "cnn" if ESTIMATORS[estimator].on is None else "mlp"
    whole, batch = train_state(estimator, objective, optimizer)
    for number in range(3):
        whole.step(batch, KEY.fold("step", number))
    checkpoint.write(tmp_path / "at", whole, {"number": 3, "seen": (1.5, None, "text")})
    again, _ = train_state(estimator, objective, optimizer)
    checkpoint.read(tmp_path / "at", again)
    assert checkpoint.notes(tmp_path / "at") == {"number": 3, "seen": (1.5, None, "text")}
    assert again.taken == 3
    assert state(again) == state(whole)
    for number in range(3, 6):
        one, other = (of.step(batch, KEY.fold("step", number)) for of in (whole, again))
        assert bits(one.loss) == bits(other.loss)
    assert state(again) == state(whole)


def test_tied_weights_are_written_once(tmp_path: Path):
    made, batch = train_state("everything", "transformer", AdamW(1e-2))
    made.step(batch, KEY)
    checkpoint.write(tmp_path / "at", made)
    again, _ = train_state("everything", "transformer", AdamW(1e-2))
    checkpoint.read(tmp_path / "at", again)
    assert again.objective.model.head.weight is again.objective.model.embed.weight  # type: ignore[union-attr]
    assert state(again) == state(made)


def test_a_file_that_is_torn_or_another_models_is_refused(tmp_path: Path):
    made, batch = train_state("everything", "mlp", AdamW(1e-2))
    made.step(batch, KEY)
    checkpoint.write(tmp_path / "at", made)
    whole = (tmp_path / "at").read_bytes()
    fresh, _ = train_state("everything", "mlp", AdamW(1e-2))
    before = state(fresh)
    for torn in (b"", whole[:20], whole[:-1], b"x" * 40):
        (tmp_path / "at").write_bytes(torn)
        with pytest.raises(ValueError, match="is no checkpoint of a training, or was cut short"):
            checkpoint.read(tmp_path / "at", fresh)
    (tmp_path / "at").write_bytes(whole)
    other, _ = train_state("everything", "direct", AdamW(1e-2))
    with pytest.raises(ValueError, match="is a checkpoint of another model"):
        checkpoint.read(tmp_path / "at", other)
    assert state(fresh) == before


def test_a_state_that_cannot_be_kept_is_refused_before_anything_is_written(tmp_path: Path):
    made, _ = train_state("everything", "mlp", AdamW(1e-2))
    made.state = {"who": object()}
    with pytest.raises(ValueError, match="a state of a object cannot be kept"):
        checkpoint.write(tmp_path / "at", made)
    assert list(tmp_path.iterdir()) == []


def test_no_file_can_call_what_it_likes():
    for name in ("os:system", "builtins:tuple", "subprocess:Popen"):
        with pytest.raises(ValueError, match="is no named tuple"):
            checkpoint._named(name)


def test_numbers_keep_their_bits(tmp_path: Path):
    made, _ = train_state("everything", "mlp", AdamW(1e-2))
    notes = {"inf": float("inf"), "tiny": 5e-324, "third": 1 / 3, "seed": 2**64 - 1, 3: torch.tensor(7.0)}
    checkpoint.write(tmp_path / "at", made, notes)
    assert checkpoint.notes(tmp_path / "at") == notes


def test_a_loop_goes_on_where_its_file_says(tmp_path: Path):
    task, method = Digits(), mezo(probes=2)
    whole = [bits(step.loss) for step in train(task, method, Adam(1e-3), KEY, 9)]
    for step in train(task, method, Adam(1e-3), KEY, 6):
        if step.number == 4:
            checkpoint.write(tmp_path / "at", step.train_state)
    rest = [(step.number, bits(step.loss)) for step in train(task, method, Adam(1e-3), KEY, 9, tmp_path / "at")]
    assert rest == list(enumerate(whole))[5:]
    assert list(train(task, method, Adam(1e-3), KEY, 5, tmp_path / "at")) == []
