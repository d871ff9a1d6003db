"""Whatever the user's own code raises or returns, the command ends with a sentence, the line, and exit code 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gradcost import BadInput, backprop, study
from gradcost.cli import main
from gradcost.core.user_errors import user_errors
from gradcost.studies.comparison import Comparison
from gradcost.tasks.digits import Digits
from in_process import inside

HEAD = """
import sys
from gradcost import SGD, Trial, backprop, study
from gradcost.core.value import value
from gradcost.tasks.digits import Digits

class Stop(BaseException):
    pass

def trial(**more):
    given = {"task": Digits(), "method": "b", "estimator": backprop(), "optimizer": SGD(0.1), "steps": 2}
    return Trial(**(given | more), phase="tune", seed=0)

@value
class Mine(Digits):
    def objective(self, key):
        OBJECTIVE

@study("Does it learn?")
def own():
"""
QUESTION = 'the study "Does it learn?"'
ADVICE = "write `yield [Trial(...), ...]` for each stage."
EXIT = "the code ended the process by sys.exit(0) (FILE, line LAST): leave that call out."


def message(folder: Path, body: str, *, objective: str = "pass", more: tuple[str, ...] = ("--dry-run",)) -> str:
    """Run a study file; return its message, where FILE is the file and LAST the number of its last line."""
    text = HEAD.replace("OBJECTIVE", objective) + body + "\n"
    (folder / "mine.py").write_text(text)
    ran = inside("study", "mine.py", "-o", "st", "-j", "1", *more, folder=folder)
    assert ran.returncode == 2
    assert ran.stdout == ""
    last = ran.stderr.splitlines()[-1].replace(str(folder / "mine.py"), "FILE")
    lines = text.splitlines()
    inner = next((n for n, line in enumerate(lines, 1) if line.strip() == objective != "pass"), len(lines))
    return last.replace(f"line {inner})", "line LAST)").removeprefix("gradcost: ")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("    yield trial()", f"{QUESTION} yields Trial, which is no list of trials: {ADVICE}"),
        ('    yield ["x"]', f"{QUESTION} yields a list with 'x', which is no Trial: {ADVICE}"),
        ("    return [trial()]", f"{QUESTION} returns list, and is no generator: {ADVICE}"),
        ("    pass", f"{QUESTION} returns NoneType, and is no generator: {ADVICE}"),
        ("    yield\n    raise KeyError('a')", f"{QUESTION} yields NoneType, which is no list of trials: {ADVICE}"),
        ("    yield []\n    raise KeyError('a')", f"{QUESTION} failed: KeyError: 'a' (FILE, line LAST)."),
        ("    yield []\n    sys.exit(0)", f"{QUESTION} failed: {EXIT}"),
        ("    yield []\n    raise Stop('now')", f"{QUESTION} failed: Stop: now (FILE, line LAST)."),
        (
            "    yield []\n    raise StopIteration",
            f"{QUESTION} failed: RuntimeError: generator raised StopIteration (FIL",
        ),
        (
            "    pass\nown = study('Does it learn?')(lambda x: x)",
            f"{QUESTION} has a function that needs arguments (missing",
        ),
        ("    yield [trial(task=5)]", f"the task 5 of {QUESTION} is not a task: it has no `objective`. Subclass"),
        (
            "    yield [trial(task=Mine)]",
            f"the task <class 'gradcost_user_mine.Mine'> of {QUESTION} is a class: write Mine()",
        ),
        ("    yield []\n    raise GeneratorExit", f"{QUESTION} failed: GeneratorExit (FILE, line LAST)."),
        ("    yield [trial()]\nsys.exit(0)", f"your own code failed: {EXIT}"),
        ("    yield [trial()]\nraise Stop", "your own code failed: Stop (FILE, line LAST)."),
        ("    yield [trial()]\n1 / 0", "mine.py could not be imported: ZeroDivisionError: division by zero (FILE, "),
    ],
)
def test_a_wrong_study_file_is_a_sentence(tmp_path: Path, body: str, said: str):
    assert message(tmp_path, body).startswith(said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("target=float('nan')", "the target is nan: give a finite number, or None for no target."),
        ("target=float('inf')", "the target is inf: give a finite number, or None for no target."),
        ("steps=0", "a trial of b has 0 steps and 200 points: give 1 or more."),
        ("points=-1", "a trial of b has 2 steps and -1 points: give 1 or more."),
        ("method=5", 'the label of a method is a text, such as "backprop", not 5.'),
        ("optimizer=0.1", "the optimizer of a trial of b is 0.1: give an Optimizer."),
        ("estimator=backprop", "the estimator of a trial of b is <"),
    ],
)
def test_a_wrong_trial_is_refused_with_the_study_and_the_line(tmp_path: Path, wrong: str, said: str):
    found = message(tmp_path, f"    yield [trial({wrong})]")
    assert found.startswith(f"{QUESTION} failed (FILE, line ")
    assert said in found


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("raise RuntimeError('no')", "RuntimeError: no (FILE, line LAST)."),
        ("sys.exit(0)", EXIT),
        ("raise Stop", "Stop (FILE, line LAST)."),
    ],
)
def test_a_task_that_raises_is_a_sentence_with_the_line(tmp_path: Path, objective: str, said: str):
    body = "    yield [trial(task=Mine())]"
    assert message(tmp_path, body, objective=objective, more=()) == f"{QUESTION} failed: {said}"
    ran = inside("compare", "--task", "mine.py:Mine", "--method", "backprop", "-o", "c", folder=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("gradcost: your own code failed: ")
    assert "mine.py, line " in ran.stderr


def test_a_second_stage_that_raises_is_a_sentence_and_the_first_stage_is_kept(tmp_path: Path):
    body = "    yield [trial()]\n    raise KeyError('second')"
    assert message(tmp_path, body, more=()) == f"{QUESTION} failed: KeyError: 'second' (FILE, line LAST)."
    assert '"status":"finished"' in (tmp_path / "st" / "records.jsonl").read_text()


def test_a_question_is_a_text():
    with pytest.raises(BadInput, match=r'write @study\("your question"\)'):
        study(test_a_target_of_a_comparison_is_finite)(lambda: None)  # pyright: ignore[reportArgumentType]


def test_a_target_of_a_comparison_is_finite():
    with pytest.raises(BadInput, match="target"):
        Comparison(Digits(), (("b", backprop()),), (0.1,), 1, (1,), float("inf"))


def test_what_gradcost_itself_raises_is_no_error_of_the_user():
    """The exit of rich, after the reader of standard output has closed it, stays silent; a bug stays a bug."""

    def raises(error: BaseException) -> Any:
        given: dict[str, Any] = {"error": error}
        exec(compile("def f():\n    raise error", main.__file__, "exec"), given)
        return given["f"]

    for error in (SystemExit(1), KeyError("x")):
        with pytest.raises(type(error)), user_errors("the study failed"):
            raises(error)()
    app = typer.Typer()
    app.command()(main.reported(raises(SystemExit(1))))
    ran = CliRunner().invoke(app, [])
    assert (ran.exit_code, ran.output) == (1, "")
