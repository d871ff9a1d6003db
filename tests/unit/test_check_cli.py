"""`gradcost check` as a person meets it: the table, exit codes and sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import gradcost, inside
from test_plan_cli import MINE

from gradcost.cli import spec

BROKEN = """
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x
    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

class Opaque(nn.Module):
    def forward(self, x):
        return Square.apply(x)

class Cut(nn.Module):
    def forward(self, x):
        return x + 3 * x.detach().tanh()

def opaque(): return nn.Sequential(nn.Linear(32, 16), Opaque(), nn.Linear(16, 16), Opaque(), nn.Linear(16, 10))
def cut(): return nn.Sequential(nn.Linear(32, 16), Cut(), nn.Linear(16, 10))
def one_way(): return make(), lambda model, batch: model(batch[0]).square().mean()
"""
FACTORY = ("--model", "mine.py:make", "--data", "mine.py:batch")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE + BROKEN)
    return tmp_path


def test_a_method_on_the_digits_is_checked_line_by_line(here: Path):
    ran = gradcost("check", "forward_gradient(8)", folder=here)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("Probing(slope=Jvp(together=4), directions=Gaussian(), probes=8")
    assert "4,810 trained weights" in lines[0]
    for what, said in (
        ("agrees with backprop along one direction", "relative"),
        ("nothing disturbed after an estimate", "bitwise"),
        ("cosine to the true gradient", "theory 0.0395 for d = 4,810, n = 8"),
        ("to reach cosine 0.5 you would need", "1,604 probes"),
    ):
        assert any(what in line and said in line for line in lines), what
    assert lines[-1] == "nothing failed"


@pytest.mark.slow
def test_the_same_check_finds_the_same_numbers(here: Path):
    first, second = (gradcost("check", "mezo()", *FACTORY, "--json", folder=here) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    found = json.loads(first.stdout)
    assert found["ok"]
    assert found["subject"].startswith("Sequential, 4,554 trained weights")
    assert {line["verdict"] for line in found["lines"]} == {"ok", "note"}


def test_without_a_method_every_preset_is_checked_in_short(here: Path):
    ran = inside("check", "--task", "digits", "--draws", "4", folder=here)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    rows = {line.split("(")[0]: line for line in lines[3:]}
    assert set(rows) == {name for name in spec.presets() if name != "addax"}  # which needs an argument
    assert all(row.rstrip().endswith("ok") or "cannot be used here" in row for row in rows.values())
    found = json.loads(inside("check", "--draws", "4", "--json", folder=here).stdout)
    assert len(found) == len(rows)


def test_a_module_that_no_tangent_passes_fails_and_all_are_named(here: Path):
    ran = inside("check", "forward_gradient()", "--model", "mine.py:opaque", *FACTORY[2:], folder=here)
    assert ran.returncode == 1
    for said in (
        "not 1, at `return Square.apply(x)`",
        "not 3, at `return Square.apply(x)`",
        "failed: usable with this model and batch",
    ):
        assert said in ran.stdout
    assert inside("check", "mezo()", "--model", "mine.py:opaque", *FACTORY[2:], folder=here).returncode == 0


def test_a_cut_path_fails_for_every_method(here: Path):
    for method in ("backprop()", "mezo()"):
        ran = inside("check", method, "--model", "mine.py:cut", *FACTORY[2:], folder=here)
        assert ran.returncode == 1
        assert ".detach()" in ran.stdout


def test_a_factory_may_bring_its_loss_and_a_batch_its_size(here: Path):
    arguments = ("check", "mezo()", "--model", "mine.py:one_way", "--data", "mine.py:batch", "--batch", "3", "--json")
    assert inside(*arguments, folder=here).returncode == 0


def test_a_loader_is_read_for_a_batch(here: Path):
    """A function that returns one DataLoader was for `train` alone."""
    ran = inside("check", "mezo()", *FACTORY[:3], "mine.py:loader", "--batch", "4", folder=here)
    assert ran.returncode == 0, ran.stderr
    planned = inside("plan", "--memory", "1GiB", *FACTORY[:3], "mine.py:loader", "--batch", "4", folder=here)
    assert "batch 4" in planned.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("mzo()",), "mezo(eps=0.001, probes=1)"),
        (("Jvp()",), "is a part of a method"),
        (("mezo()", "--task", "digts"), "Did you mean digits"),
        (("mezo()", "--model", "mlpp"), "Did you mean mlp"),
        (("mezo()", "--model", "mine.py:mke", *FACTORY[2:]), "defines no mke. Did you mean make?"),
        (("mezo()", "--model", "mine.py:make"), "add --data"),
        (("mezo()", "--model", "mine.py:none", *FACTORY[2:]), "returned type int: it returns"),
        (("mezo()", "--model", "mine.py:boom", *FACTORY[2:]), "could not make a model: KeyError"),
        (("mezo()", "--model", "mine.py:Fails", *FACTORY[2:]), "mine.py, line "),
        (("mezo()", *FACTORY[:3], "mine.py:wrong"), "cannot be evaluated on this batch: RuntimeError"),
        (("mezo()", *FACTORY[:3], "mine.py:two"), "is called with the batch size alone"),
        (("mezo()", *FACTORY, "--batch", "0"), "1 example or more, not 0"),
        (("mezo()", "--data", "mine.py:batch"), "add --model"),
        (("mezo()", "--task", "digits", "--data", "mine.py:batch"), "leave one out"),
        (("mezo()", "--model", "hf:llama.json"), "a check needs weights"),
        (("mezo()", "--draws", "0"), "draws"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, tuple) else "",
)
def test_what_cannot_be_checked_is_a_sentence(here: Path, arguments: tuple[str, ...], told: str):
    ran = inside("check", *arguments, folder=here)
    assert ran.returncode == 2
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
