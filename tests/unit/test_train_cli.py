"""`gradcost train`: train a task or a model of one's own, resume with the same bits, also after `kill -9`."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gradcost
from gradcost import Adam, Key, mezo
from gradcost.cli.check import _presets
from gradcost.cli.train import train_model
from gradcost.cli.train_options import TrainOptions
from gradcost.core.files import locked
from gradcost.tasks.digits import Digits
from gradcost.training import SGD, recorded
from gradcost.training.recorded import CHECKPOINT, LOSSES
from in_process import inside

FILES = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

def make():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))

def with_loss():
    return make(), lambda model, batch: model(batch["x"]).square().mean()

def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)

def loader(size):
    return DataLoader(TensorDataset(*rows()), size, shuffle=True)

def narrow():
    return nn.Linear(5, 3)

def without_test(size):
    return {"train": loader(size), "validation": loader(size)}

def tuple_of_loaders(size):
    return loader(size), loader(size)

class Drawn(Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, index):
        return torch.randn(6), index % 3

def drawn(size):
    return DataLoader(Drawn(), size, shuffle=True)

def listed(size):
    x, y = rows()
    return [(x[i:i + size], y[i:i + size]) for i in range(0, 24, size)]

def one(size):
    return {"x": rows()[0][:size]}

class Endless:
    def __iter__(self):
        while True:
            yield one(8)

def endless(size):
    return Endless()

def fixed():
    return listed(8)

def empty(size):
    return DataLoader(TensorDataset(*(rows[:0] for rows in rows())), size)

class Nothing:
    def __iter__(self):
        return iter(())

def nothing(size):
    return Nothing()

def nans(size):
    return [(torch.full((size, 6), float("nan")), torch.zeros(size, dtype=torch.long))]

def missing(size):
    from gradcost.core.errors import BadInput
    raise BadInput("the file is missing.")
"""


def run(folder: Path, *arguments: str, code: int = 0) -> Any:
    ran = inside("train", *arguments, folder=folder)
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


def content(folder: Path) -> tuple[bytes, str]:
    return (folder / "weights.safetensors").read_bytes(), (folder / LOSSES).read_text()


def test_a_task_is_trained_as_by_the_library(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    arguments = ["mezo(1e-3)", "--optimizer", "Adam(0.01)", "--task", "Digits(batch=16)", "--steps", "5"]
    ran = run(tmp_path, *arguments, "--seed", "3", "-o", "out", "--json")
    steps = list(gradcost.train(Digits(batch=16), mezo(1e-3), Adam(0.01), Key(3), 5))
    saved = safetensors.load_file(str(tmp_path / "out" / "weights.safetensors"))
    assert all(torch.equal(saved[name], p) for name, p in steps[-1].objective.model.named_parameters())
    lines = (tmp_path / "out" / LOSSES).read_text().splitlines()
    assert lines == ["step,loss", *(f"{step.number},{float(step.loss)!r}" for step in steps)]
    assert json.loads(ran.stdout)["loss"] == float(steps[-1].loss)


@pytest.mark.parametrize("data", ["empty", "nothing"])
def test_a_run_that_fails_before_its_first_step_blocks_no_folder(tmp_path: Path, data: str):
    model = ["backprop()", "--optimizer", "SGD(0.1)", "--model", "my.py:make", "--steps", "2", "-o", "out"]
    (tmp_path / "my.py").write_text(FILES)
    assert "yields no batch" in run(tmp_path, *model, "--data", f"my.py:{data}", code=2).stderr
    run(tmp_path, *model, "--data", "my.py:loader")
    refused = run(tmp_path, *model, "--data", "my.py:loader", code=2)
    assert "add --resume" in refused.stderr


def test_a_run_whose_steps_are_all_skipped_is_no_success(tmp_path: Path):
    model = ["backprop()", "--optimizer", "SGD(0.1)", "--model", "my.py:make", "--steps", "3", "-o", "out"]
    (tmp_path / "my.py").write_text(FILES)
    ran = run(tmp_path, *model, "--data", "my.py:nans", code=1)
    assert "no weight has moved: the loss of all 3 steps was not finite" in ran.stderr


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("narrow", "loader"), "on a train batch: "),
        (("make", "without_test"), None),
        (
            ("make", "tuple_of_loaders"),
            "my.py:tuple_of_loaders returned a tuple of loaders: return the training loader",
        ),
    ],
)
def test_what_the_users_functions_return_is_no_bug_of_ours(
    tmp_path: Path, names: tuple[str, str], message: str | None
):
    (tmp_path / "my.py").write_text(FILES)
    arguments = ["backprop()", "--optimizer", "SGD(0.1)", "--steps", "2", "-o", "out"]
    arguments += ["--model", f"my.py:{names[0]}", "--data", f"my.py:{names[1]}"]
    ran = run(tmp_path, *arguments, code=0 if message is None else 2)
    assert message is None or message in ran.stderr


def test_a_full_gradient_does_not_depend_on_the_global_generator(tmp_path: Path):
    """Two runs of one command differed, and a resumed run from both."""
    (tmp_path / "my.py").write_text(FILES)
    arguments = ["zo_svrg(every=2)", "--optimizer", "SGD(0.1)", "--model", "my.py:make", "--data", "my.py:drawn"]
    run(tmp_path, *arguments, "--steps", "5", "-o", "whole")
    torch.rand(7)
    before = torch.get_rng_state()
    run(tmp_path, *arguments, "--steps", "3", "-o", "parts")
    assert torch.equal(torch.get_rng_state(), before)
    run(tmp_path, *arguments, "--steps", "5", "-o", "parts", "--resume")
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


@pytest.mark.parametrize("way", [[], ["--log"]], ids=["checkpoint", "log"])
def test_a_resumed_run_has_the_files_of_one_run(tmp_path: Path, way: list[str]):
    arguments = ["mezo(1e-3)", "--optimizer", "AdamW(0.01)", "--task", "Digits(batch=16)", *way]
    run(tmp_path, *arguments, "--steps", "7", "-o", "whole")
    run(tmp_path, *arguments, "--steps", "4", "-o", "parts")
    refused = run(tmp_path, *arguments, "--steps", "7", "-o", "parts", code=2)
    assert "add --resume" in refused.stderr
    run(tmp_path, *arguments, "--steps", "7", "-o", "parts", "--resume")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    run(tmp_path, *arguments, "--steps", "7", "-o", "parts", "--resume")
    assert content(tmp_path / "parts") == content(tmp_path / "whole"), "a complete run stays as it is"
    other = [*arguments]
    other[0] = "spsa(1e-3)"
    refused = run(tmp_path, *other, "--steps", "9", "-o", "parts", "--resume", code=2)
    assert "has the method" in " ".join(refused.stderr.split())
    swapped = [part for part in arguments if part != "--log"] + ([] if way else ["--log"])
    refused = run(tmp_path, *swapped, "--steps", "9", "-o", "parts", "--resume", code=2)
    assert ("add --log" if way else "leave --log out") in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("model", "data", "steps"),
    [("make", "loader", 3), ("make", "listed", 3), ("with_loss", "one", 1), ("make", "fixed", 3)],
)
def test_a_model_and_data_of_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str, steps: int
):
    monkeypatch.delitem(sys.modules, "my", raising=False)  # another test's module of this name
    (tmp_path / "my.py").write_text(FILES)
    arguments = ["forward_gradient(2)", "--optimizer", "SGD(0.1)", "--model", f"my.py:{model}"]
    arguments += ["--data", f"my:{data}", "--batch", "8"]
    run(tmp_path, *arguments, "-o", "a")
    assert len((tmp_path / "a" / LOSSES).read_text().splitlines()) == 1 + steps
    run(tmp_path, *arguments, "-o", "b", "--steps", str(steps + 2))
    run(tmp_path, *arguments, "-o", "a", "--steps", str(steps + 2), "--resume")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_wrong_options_are_refused_with_a_way_out(tmp_path: Path):
    (tmp_path / "my.py").write_text(FILES)
    base = ["mezo()", "--optimizer", "SGD(0.1)", "-o", "out"]
    for further, message in [
        (["--model", "my.py:make"], "add --data"),
        (["--data", "my.py:loader"], "add --model"),
        (["--data", "my.py:loader", "--model", "my.py:make", "--task", "digits"], "--task cannot be combined"),
        (["--data", "my.py:absent", "--model", "my.py:make"], "defines no absent"),
        (["--data", "my.py:endless", "--model", "my.py:make"], "has no known length"),
        (["--data", "my.py:missing", "--model", "my.py:make"], "gradcost: the file is missing."),
    ]:
        ran = run(tmp_path, *base, *further, code=2)
        assert message in " ".join(ran.stderr.split()), ran.stderr
    ran = run(tmp_path, "backprop()", *base[1:], "--log", "--steps", "2", code=2)
    assert "cannot be logged" in " ".join(ran.stderr.split())
    ran = run(tmp_path, *base[:3], "-o", "plan", "--dry-run", "--steps", "9")
    assert "4,810 weights" in ran.stdout
    assert not (tmp_path / "plan").exists()


def test_losses_after_the_checkpoint_are_written_once(tmp_path: Path):
    """The run stopped after step 3, its checkpoint is of step 1, and the last line is incomplete."""
    arguments = (Digits(batch=16), mezo(1e-3), SGD(0.01), Key(5))
    list(recorded(gradcost.train(*arguments, 2, tmp_path / CHECKPOINT), tmp_path))
    with (tmp_path / LOSSES).open("a") as file:
        file.write("2,0.5\n3,0.")
    resumed = [step.number for step in recorded(gradcost.train(*arguments, 5, tmp_path / CHECKPOINT), tmp_path)]
    assert resumed == [2, 3, 4]
    expected = [f"{step.number},{float(step.loss)!r}" for step in gradcost.train(*arguments, 5)]
    assert (tmp_path / LOSSES).read_text().splitlines()[1:] == expected


# ---- kill -9


def options(folder: Path, method: str, optimizer: str) -> TrainOptions:
    return TrainOptions(
        method, folder, optimizer, task="Digits(batch=16)", steps=8, seed=1, resume=True, every=0.0, as_json=True
    )


def work(folder: Path, method: str, optimizer: str) -> None:
    torch.set_num_threads(1)
    train_model(options(folder, method, optimizer))
    os._exit(0)


def started(folder: Path, method: str, optimizer: str) -> Any:
    """Start a run in a process that is forked from one with everything imported."""
    context = multiprocessing.get_context("forkserver")
    loaded = [name for name in sys.modules if name.startswith("gradcost.") and "user_code" not in name]
    context.set_forkserver_preload(["gradcost.studies.preload", "sklearn.datasets", *loaded])
    child = context.Process(target=work, args=(folder, method, optimizer))
    child.start()
    return child


def wait_for_step(child: Any, losses: Path, count: int) -> None:
    while child.is_alive() and not (losses.exists() and losses.read_bytes().count(b"\n") > count):
        time.sleep(0.001)


OPTIMIZERS = ("SGD(lr=0.01)", "Nesterov(lr=0.01)", "Adam(lr=0.01)", "AdamW(lr=0.01)")
FURTHER = (
    "VarianceReduced(mezo(1e-3), every=3)",
    "Probing(Jvp(), LazyLowRank(rank=2, every=3))",
    "Momentum(mezo(1e-3))",
)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_is_killed_at_a_random_moment_resumes_with_the_same_bits(optimizer: str, tmp_path: Path):
    """Every preset without a required argument and three stateful methods, with each optimizer: 56 kills."""
    moments, interrupted = random.Random(optimizer), 0
    methods = [*_presets(), *FURTHER]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, method in enumerate(methods):
            whole, killed = tmp_path / f"{number}-whole", tmp_path / f"{number}-killed"
            train_model(options(whole, method, optimizer))
            child = started(killed, method, optimizer)
            wait_for_step(child, killed / LOSSES, moments.randint(1, 7))
            time.sleep(moments.uniform(0.0, 0.01))
            child.kill()
            child.join()
            interrupted += not (killed / "weights.safetensors").exists() and (killed / CHECKPOINT).exists()
            again = started(killed, method, optimizer)
            again.join()
            assert again.exitcode == 0, method
            assert content(killed) == content(whole), method
    finally:
        torch.set_num_threads(threads)
    assert len(methods) == 14
    assert interrupted >= 8, "kills between the first training checkpoint and the end"


# ---- files that are someone else's, damaged, or in use

MEZO = ("mezo()", "--optimizer", "SGD(lr=0.01)")


@pytest.mark.parametrize("name", [LOSSES, "weights.safetensors"])
def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path, name: str):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text("mine")
    for more in ((), ("--resume",)):
        ran = run(tmp_path, *MEZO, "--steps", "2", "-o", "a", *more, code=2)
        assert "give another --output" in ran.stderr
    assert (tmp_path / "a" / name).read_text() == "mine"


def test_the_folder_of_a_study_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "study.json").write_text("{}")
    ran = run(tmp_path, *MEZO, "--steps", "2", "-o", "a", code=2)
    assert "a has the results of a study: give another --output." in ran.stderr
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["study.json"]


def test_an_interrupted_run_is_told_how_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    run(tmp_path, *MEZO, "--steps", "2", "-o", "a")
    monkeypatch.setattr("gradcost.cli.train.train", interrupted)
    ran = run(tmp_path, *MEZO, "--steps", "4", "-o", "a", "--resume", code=130)
    assert "interrupted; the run goes on from its last checkpoint with --resume." in ran.stderr
    ran = run(tmp_path, *MEZO, "--steps", "2", "-o", "b", code=130)
    assert "interrupted; there is no checkpoint yet (--every 30 seconds), so with --resume the run " in ran.stderr


@pytest.mark.parametrize("text", [b"", b"[]", b'{"method"', b"\xff", b"[" * 100_000], ids=lambda text: repr(text[:9]))
def test_a_damaged_list_of_arguments_is_a_sentence(tmp_path: Path, text: bytes):
    run(tmp_path, *MEZO, "--steps", "2", "-o", "a")
    (tmp_path / "a" / "run.json").write_bytes(text)
    ran = run(tmp_path, *MEZO, "--steps", "3", "-o", "a", "--resume", code=2)
    assert "run.json is damaged: delete it" in ran.stderr
    (tmp_path / "a" / "run.json").unlink()
    run(tmp_path, *MEZO, "--steps", "3", "-o", "a", "--resume")


@pytest.mark.parametrize(
    "line", [b"abc,1\n", b"\n", b"\xff\n", b"9" * 5000 + b",1\n"], ids=lambda line: repr(line[:9])
)
def test_a_damaged_line_of_losses_is_a_sentence_with_its_number(tmp_path: Path, line: bytes):
    run(tmp_path, *MEZO, "--steps", "2", "-o", "a")
    losses = tmp_path / "a" / LOSSES
    losses.write_bytes(losses.read_bytes() + line)
    damaged = losses.read_bytes()
    ran = run(tmp_path, *MEZO, "--steps", "3", "-o", "a", "--resume", code=2)
    assert "line 4 of" in ran.stderr
    assert losses.read_bytes() == damaged
    losses.rename(tmp_path / "kept.csv")
    run(tmp_path, *MEZO, "--steps", "3", "-o", "a", "--resume")
    assert losses.read_text().splitlines()[1].startswith("2,")


def test_one_process_trains_in_a_folder_at_a_time(tmp_path: Path):
    """Two of them wrote into one step log, and damaged it."""
    run(tmp_path, *MEZO, "--steps", "2", "--log", "-o", "a")
    before = (tmp_path / "a" / "steps.log").read_bytes()
    with locked(tmp_path / "a"):
        ran = run(tmp_path, *MEZO, "--steps", "3", "--log", "-o", "a", "--resume", code=2)
    assert f"in use by process {os.getpid()}" in ran.stderr
    assert (tmp_path / "a" / "steps.log").read_bytes() == before


def test_another_batch_of_own_data_is_another_run(tmp_path: Path):
    (tmp_path / "mine.py").write_text(FILES)
    own = ("--model", "mine.py:make", "--data", "mine.py:listed")
    run(tmp_path, *MEZO, *own, "--batch", "8", "--steps", "2", "-o", "a")
    ran = run(tmp_path, *MEZO, *own, "--batch", "2", "--steps", "3", "-o", "a", "--resume", code=2)
    assert "batch 8, not mine.py:make on mine.py:listed, batch 2" in " ".join(ran.stderr.split())


def test_weights_that_cannot_be_written_are_a_sentence_and_replace_nothing(tmp_path: Path):
    run(tmp_path, *MEZO, "--steps", "2", "--log", "-o", "a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for output in ("pipe", "folder"):
        ran = inside("replay", "a/steps.log", "-o", output, folder=tmp_path)
        assert ran.returncode == 2
        assert "give another name" in ran.stderr
    assert (tmp_path / "pipe").is_fifo()
    ran = inside("replay", "a/steps.log", "-o", "a/../a/steps.log", folder=tmp_path)
    assert (ran.returncode, "is also read" in ran.stderr) == (2, True)
    assert inside("replay", "a/steps.log", "-o", "b", folder=tmp_path).returncode == 0
    (tmp_path / "new").touch()
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a" / "weights.safetensors").read_bytes()


def test_a_full_disk_under_the_weights_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    safetensors = pytest.importorskip("safetensors.torch")

    def full(model: object, file: str) -> None:
        raise __import__("safetensors").SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors, "save_model", full)
    ran = run(tmp_path, *MEZO, "--steps", "2", "-o", "a", code=2)
    assert "weights.safetensors cannot be written: I/O error: No space left" in " ".join(ran.stderr.split())
    monkeypatch.undo()
    run(tmp_path, *MEZO, "--steps", "2", "-o", "a", "--resume")
    assert not [*(tmp_path / "a").glob(".weights*")]


def test_fewer_steps_than_the_run_has_taken_are_refused(tmp_path: Path):
    run(tmp_path, *MEZO, "--steps", "4", "-o", "a")
    ran = run(tmp_path, *MEZO, "--steps", "3", "-o", "a", "--resume", code=2)
    assert "has taken 4 steps, more than 3" in " ".join(ran.stderr.split())
    run(tmp_path, *MEZO, "--steps", "4", "-o", "a", "--resume")
