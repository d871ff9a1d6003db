"""A step log rebuilds the weights bit for bit, continues after `kill -9`, and is refused if it is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gradcost import SGD, Accumulated, Adam, AdamW, Clipped, Key, backprop, forward_gradient, mezo, train
from gradcost.cli.main import app
from gradcost.core.errors import BadInput, Unsupported
from gradcost.directions import Gaussian, Layerwise, LowRank, Rademacher
from gradcost.estimators import Normalized, Probing
from gradcost.slopes.slope import CentralDifference
from gradcost.tasks.digits import Digits
from gradcost.training import Nesterov, StepLog, checkpoint, read_log, replay
from gradcost.training.step_log import weights_digest
from tables import OBJECTIVES

KEY = Key(41)
TASK = Digits(batch=16)


def run(estimator: Any, optimizer: Any, steps: int, path: Path | None, audit_every: int = 100) -> list[bytes]:
    """Train; return the digest of the weights before the first step and after each one."""
    log = None if path is None else StepLog(path, audit_every)
    digests = [weights_digest(initial())]
    for step in train(TASK, estimator, optimizer, KEY, steps, log=log):
        digests.append(weights_digest(step.objective))
    return digests


def initial() -> Any:
    return TASK.objective(KEY.fold("init"))


WAYS = [
    (mezo(1e-3, 2), Gaussian()),
    (forward_gradient(2), Gaussian()),
    (Clipped(Accumulated(mezo(1e-3), 2), 0.1), Gaussian()),
    (Probing(CentralDifference(1e-3), Rademacher(), 3, Normalized()), Rademacher()),
    (Probing(CentralDifference(1e-3), LowRank(2)), LowRank(2)),
]
OPTIMIZERS = [SGD(0.01), SGD(0.01, momentum=0.9, decay=0.1), Nesterov(0.01), Adam(0.01), AdamW(0.01, decay=0.1)]
RUNS = [(*way, AdamW(0.01, decay=0.1)) for way in WAYS[1:]] + [(*WAYS[0], optimizer) for optimizer in OPTIMIZERS]


@pytest.mark.parametrize(("estimator", "directions", "optimizer"), RUNS, ids=lambda part: repr(part)[:24])
def test_a_replay_has_the_bits_of_the_training_run_after_every_step(
    estimator: Any, directions: Any, optimizer: Any, tmp_path: Path
):
    expected = run(estimator, optimizer, 6, tmp_path / "log", audit_every=4)
    assert expected == run(estimator, optimizer, 6, None), "logging changes no bit"
    assert len(set(expected)) == 7
    for to in (6, 0, 3, 5):
        objective = initial()
        assert replay(tmp_path / "log", objective, directions, optimizer, to) == to
        assert weights_digest(objective) == expected[to]
    logged = read_log(tmp_path / "log")
    assert logged.audits == {0: expected[0], 4: expected[4]}
    assert [step.number for step in logged.steps] == list(range(6))


def test_training_continues_from_the_log_without_a_training_checkpoint(tmp_path: Path):
    path = tmp_path / "log"
    expected = run(mezo(1e-3), Adam(0.01), 7, None)
    assert run(mezo(1e-3), Adam(0.01), 4, path)[-1] == expected[4]
    with path.open("ab") as file:
        file.write(b"\x18\x00\x00")  # the process was killed while it wrote the next record
    assert run(mezo(1e-3), Adam(0.01), 7, path)[1:] == expected[5:]
    assert len(read_log(path).steps) == 7


def test_the_log_continues_a_training_checkpoint_that_is_older(tmp_path: Path):
    log = StepLog(tmp_path / "log", 2)
    for step in train(TASK, mezo(1e-3), Adam(0.01), KEY, 5, log=log):
        if step.number == 1:
            checkpoint.write(tmp_path / "at", step.train_state)
    expected = run(mezo(1e-3), Adam(0.01), 6, None)
    resumed = list(train(TASK, mezo(1e-3), Adam(0.01), KEY, 6, tmp_path / "at", log=log))
    assert [step.number for step in resumed] == [5]
    assert weights_digest(resumed[0].objective) == expected[6]
    log.path.unlink()
    with pytest.raises(BadInput, match="has 0 steps, but 2 are taken"):
        next(train(TASK, mezo(1e-3), Adam(0.01), KEY, 6, tmp_path / "at", log=log))


def test_two_branches_from_one_step_have_the_same_weights_before_it(tmp_path: Path):
    run(mezo(1e-3), SGD(0.01), 3, tmp_path / "log")
    branch = tmp_path / "branch"
    branch.write_bytes((tmp_path / "log").read_bytes())
    longer = run(mezo(1e-3), SGD(0.01), 5, tmp_path / "log")
    other = list(train(TASK, mezo(1e-3, probes=3), SGD(0.01), KEY, 5, log=StepLog(branch)))
    assert weights_digest(other[-1].objective) != longer[-1]
    first, second = initial(), initial()
    replay(tmp_path / "log", first, Gaussian(), SGD(0.01), 3)
    replay(branch, second, Gaussian(), SGD(0.01), 3)
    assert weights_digest(first) == weights_digest(second)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("log") / "log"
    run(mezo(1e-3), SGD(0.01), 5, path, audit_every=2)
    return path.read_bytes()


def test_a_change_of_any_byte_is_found(whole: bytes, tmp_path: Path):
    """Also a length that then points beyond the end of the file, which would look like an incomplete record."""
    path = tmp_path / "log"
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        with pytest.raises(BadInput, match=r"damaged|not a step log"):
            read_log(path)


def test_a_file_that_was_cut_anywhere_is_the_log_of_its_complete_steps(whole: bytes, tmp_path: Path):
    path = tmp_path / "log"
    counts = []
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        try:
            counts.append(len(read_log(path).steps))
        except BadInput:  # nothing but a part of the header, which is written atomically with the first audit
            assert counts == []
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3, 4, 5}


def test_removed_and_exchanged_records_are_found(whole: bytes, tmp_path: Path):
    path = tmp_path / "log"
    path.write_bytes(whole)
    size = 45  # a step of one probe
    last, before = whole[-2 * size : -size], whole[-size:]
    assert read_log(path).steps[-1].message in whole[-size:]
    for changed in (whole[: -2 * size] + before, whole[: -2 * size] + before + last):
        path.write_bytes(changed)
        with pytest.raises(BadInput, match="damaged"):
            read_log(path)


def test_another_model_optimizer_direction_start_or_step_is_refused(tmp_path: Path):
    path = tmp_path / "log"
    run(mezo(1e-3), SGD(0.01), 3, path, audit_every=2)
    with pytest.raises(BadInput, match="another model"):
        replay(path, OBJECTIVES["mlp"].make()[0], Gaussian(), SGD(0.01))
    with pytest.raises(BadInput, match=r"SGD\(lr=0\.01.*, not with SGD\(lr=0\.02"):
        replay(path, initial(), Gaussian(), SGD(0.02))
    with pytest.raises(BadInput, match="along Gaussian"):
        replay(path, initial(), Rademacher(), SGD(0.01))
    with pytest.raises(BadInput, match="initial weights"):
        replay(path, TASK.objective(KEY), Gaussian(), SGD(0.01))
    for to in (-1, 4):
        with pytest.raises(BadInput, match="3 steps"):
            replay(path, initial(), Gaussian(), SGD(0.01), to)
    with pytest.raises(BadInput, match="other directions"):
        next(train(TASK, Probing(CentralDifference(1e-3), Rademacher()), SGD(0.01), KEY, 5, log=StepLog(path)))
    with pytest.raises(BadInput, match="initial weights"):
        next(train(TASK, mezo(1e-3), SGD(0.01), Key(0), 5, log=StepLog(path)))


def test_an_audit_finds_weights_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(mezo(1e-3), SGD(0.01), 4, tmp_path / "log", audit_every=2)
    draw = Gaussian.draw

    def other(self: Any, leaf: Any, seeds: Any, scales: Any) -> torch.Tensor:
        return 1.01 * draw(self, leaf, seeds, scales)

    monkeypatch.setattr(Gaussian, "draw", other)
    with pytest.raises(BadInput, match="after step 1 the weights are not those"):
        replay(tmp_path / "log", initial(), Gaussian(), SGD(0.01))


class NeverFinite:
    """A task whose third batch has a loss that is not finite."""

    def objective(self, key: Key) -> Any:
        return TASK.objective(key)

    def batch_at(self, key: Key, step: int) -> Any:
        batch = TASK.batch_at(key, step)
        return batch._replace(x=batch.x * float("nan")) if step in (0, 2) else batch


@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_a_skipped_step_is_logged_and_moves_nothing(tmp_path: Path):
    optimizer = SGD(0.01, decay=0.5)
    log = StepLog(tmp_path / "log", 1)
    steps = list(train(NeverFinite(), mezo(1e-3), optimizer, KEY, 4, log=log))
    assert [step.message == b"" for step in read_log(log.path).steps] == [True, False, True, False]
    objective = initial()
    replay(log.path, objective, Gaussian(), optimizer)
    assert weights_digest(objective) == weights_digest(steps[-1].objective)


def test_what_a_log_cannot_rebuild_is_refused(tmp_path: Path):
    log = StepLog(tmp_path / "log")
    for estimator in (backprop(), Probing(CentralDifference(1e-3), Layerwise())):
        with pytest.raises(Unsupported, match="cannot be logged"):
            next(train(TASK, estimator, SGD(0.01), KEY, 2, log=log))
    assert not log.path.exists()
    with pytest.raises(BadInput, match="audit_every"):
        StepLog(log.path, 0)

    class WithBuffers:
        def objective(self, key: Key) -> Any:
            return OBJECTIVES["cnn"].make()[0]

        def batch_at(self, key: Key, step: int) -> Any:
            return OBJECTIVES["cnn"].make()[1]

    with pytest.raises(Unsupported, match="no buffers"):
        next(train(WithBuffers(), mezo(1e-3), SGD(0.01), KEY, 2, log=log))


def test_an_audit_that_a_kill_has_prevented_is_written_later(tmp_path: Path):
    path = tmp_path / "log"
    run(mezo(1e-3), SGD(0.01), 8, path, audit_every=4)
    size = path.stat().st_size
    run(mezo(1e-3), SGD(0.01), 8, path, audit_every=4)
    assert path.stat().st_size == size
    os.truncate(path, size - 3)  # in the record of the last audit
    run(mezo(1e-3), SGD(0.01), 13, path, audit_every=4)
    assert sorted(read_log(path).audits) == [0, 4, 8, 12]


TRAINS = """
import sys
from pathlib import Path
from gradcost import AdamW, Key, mezo, train
from gradcost.tasks.digits import Digits
from gradcost.training import StepLog
for step in train(Digits(batch=16), mezo(1e-3), AdamW(0.01), Key(41), 120, log=StepLog(Path(sys.argv[1]), 50)):
    print(step.number, flush=True)
"""


def test_kill_9_loses_no_step(tmp_path: Path):
    """Killed twice at a random moment of a step; the third process finishes with the bits of an undisturbed run."""
    path = tmp_path / "log"
    for least in (30, 60):
        with subprocess.Popen(
            [sys.executable, "-c", TRAINS, str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            printed = next(int(line) for line in process.stdout if int(line) >= least)
            time.sleep(0.0013)
            os.kill(process.pid, signal.SIGKILL)
        assert len(read_log(path).steps) >= printed + 1
    expected = run(mezo(1e-3), AdamW(0.01), 120, None)
    assert run(mezo(1e-3), AdamW(0.01), 120, path)[-1] == expected[-1]


@pytest.mark.slow
def test_2000_steps_take_under_100_kb_and_replay_in_a_fifth_of_their_time(tmp_path: Path):
    """In processor seconds, which other programs do not change."""
    begun = time.process_time()
    digest = b""
    for step in train(TASK, mezo(1e-3), SGD(1e-3), KEY, 2000, log=StepLog(tmp_path / "log")):
        digest = weights_digest(step.objective) if step.number == 1999 else b""
    trained = time.process_time()
    objective = initial()
    replay(tmp_path / "log", objective, Gaussian(), SGD(1e-3))
    replayed = time.process_time()
    assert weights_digest(objective) == digest
    assert (tmp_path / "log").stat().st_size < 100_000
    assert replayed - trained < 0.2 * (trained - begun)


# ---- gradcost replay

MODEL = """
from gradcost import Key
from gradcost.tasks.digits import Digits

def begin():
    return Digits(batch=16).objective(Key(41).fold("init")).model

def other():
    return Digits(batch=16).objective(Key(1)).model
"""


def test_the_command_rebuilds_the_weights_of_a_step(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    expected = run(mezo(1e-3), Adam(0.01), 4, tmp_path / "log", audit_every=2)
    (tmp_path / "models.py").write_text(MODEL)
    safetensors.save_model(initial().model, str(tmp_path / "start"))
    log, out = str(tmp_path / "log"), tmp_path / "out.safetensors"
    for further in (
        [],
        ["--model", f"{tmp_path}/models.py:begin"],
        ["--model", f"{tmp_path}/models.py:other", "--weights", str(tmp_path / "start")],
    ):
        ran = CliRunner().invoke(app, ["replay", log, "--to", "3", "-o", str(out), "--json", *further])
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout) == {"steps": 3, "logged": 4, "weights": str(out)}
        objective = TASK.objective(Key(0))
        safetensors.load_model(objective.model, str(out))
        assert weights_digest(objective) == expected[3]
        out.unlink()


def test_the_command_refuses_a_damaged_log_and_other_weights(tmp_path: Path):
    path, out = tmp_path / "log", str(tmp_path / "out")
    run(mezo(1e-3), SGD(0.01), 2, path)
    (tmp_path / "models.py").write_text(MODEL)
    for arguments, message in [
        (["--model", f"{tmp_path}/models.py:other"], "give the initial weights"),
        (["--to", "3"], "has 2 steps"),
        (["--weights", str(tmp_path / "none")], "there is no file"),
        (["--weights", str(path)], "does not contain the weights"),
    ]:
        ran = CliRunner().invoke(app, ["replay", str(path), "-o", out, *arguments])
        assert ran.exit_code == 2
        assert message in " ".join(ran.output.split())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    ran = CliRunner().invoke(app, ["replay", str(path), "-o", out])
    assert ran.exit_code == 2
    assert "damaged" in ran.output
    assert not Path(out).exists()
